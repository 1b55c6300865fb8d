"""The processes that train together, the device of each, and what it computes in.

A failure of one process ends all of them. Left alone, the others would wait for it in the next exchange, and each would
end in its own error about a lost connection. So the one that fails first reports it: on stderr, and to the others
through the store that they found each other by (see `World.__exit__`).
"""

import argparse
import contextlib
import datetime
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from utils import InputError, RunError, ToldAlready, reason_of, tell

PATIENCE = 4  # seconds, of a process that failed, for the others to notice


@dataclass(frozen=True)
class World:
    """This process, its place among those that train together, and its device."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        """Closes the connections; after a failure, ends all processes with its status.

        The first to fail prints its message and sets the status in the store, then closes its connections, so that
        whoever waits for it in an exchange wakes up with an error, looks into the store, and ends silently with the
        same status. It stays until all have looked, since the store may be its own.

        Raises: ToldAlready instead of `error`, if there are several processes.
        """
        if self.size == 1:
            return
        if error is None:
            dist.destroy_process_group()
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, as soon as the first process has ended
        status = None
        with contextlib.suppress(RuntimeError):  # the store may have gone with the process that held it
            is_first = self.store.add("failures", 1) == 1
            if is_first:
                status = tell(error)
                self.store.set("status", str(status))
            else:
                status = int(self.store.get("status"))
            self.store.add("informed", 1)
            dist.destroy_process_group()
            if is_first or self.rank == 0:
                self._wait_for("informed", self.size)
            if is_first:
                self.store.add("left", 1)  # the last that the first one asks of the store
            elif self.rank == 0:
                self._wait_for("left", 1)  # which this process holds; without it, the other would print a C++ backtrace
        raise ToldAlready(tell(error) if status is None else status) from None

    def _wait_for(self, name: str, n: int) -> None:
        """Until a number in the store has come to n, or there is no PATIENCE left."""
        deadline = time.monotonic() + PATIENCE
        while self.store.add(name, 0) < n and time.monotonic() < deadline:
            time.sleep(0.02)

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums `tensor` over all processes, in place: over gloo if it lies in main memory, over NCCL on a GPU."""
        self.begin_all_reduce(tensor)()

    def begin_all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
        """As `all_reduce`, without waiting. Returns: what waits; until then, `tensor` may not be looked at."""
        if self.size == 1:
            return lambda: None
        with _telling_of_lost_processes():
            exchange = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _telling_of_lost_processes():
                exchange.wait()

        return wait

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each is true on any process. Exchanged in main memory, so that no device is waited for."""
        if self.size == 1:
            return flags
        n = torch.tensor([float(flag) for flag in flags])
        self.all_reduce(n)
        return tuple((n > 0).tolist())

    def make_once(self, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays that `make` returns: made by one process of each machine, mapped from a file by the others.

        The file lies in the folder for temporary files (TMPDIR chooses it), and is gone from there on return.

        Raises: RunError if that folder is full.
        """
        if self.size == 1:
            return make()
        folder = None
        try:
            if self.local_rank == 0:
                made = make()
                folder = tempfile.mkdtemp(prefix="distil-")
                try:
                    for name, array in made.items():
                        np.save(os.path.join(folder, name), array)
                except OSError as error:
                    raise RunError(f"{folder} has no room for the index of the text ({error}); set TMPDIR.") from None
            folders: list = [None] * self.size
            with _telling_of_lost_processes():
                dist.all_gather_object(folders, folder)
            ours = Path(folders[self.rank - self.local_rank])  # launchers number the processes of a machine in a row
            arrays = {file.stem: np.load(file, mmap_mode="r") for file in ours.glob("*.npy")}
            with _telling_of_lost_processes():
                dist.barrier()
        finally:
            if folder:
                shutil.rmtree(folder)  # what is mapped stays readable
        return arrays


@contextlib.contextmanager
def _telling_of_lost_processes() -> Iterator[None]:
    """An exchange fails only if another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another process of this run has ended without a message (killed, or out of memory?); continue with "
            f"--resume ({reason_of(error)})."
        ) from None


def init_world(n_gpu: int | None, local_rank: int = -1) -> World:
    """The device of this process, and the process group if a launcher started several.

    Args:
        n_gpu: number of GPUs over all machines; 0 for the CPU; None for what there is.
        local_rank: as a launcher of old passes it; `LOCAL_RANK` of the environment comes first.
    """
    size = _n_launched()
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", max(local_rank, 0)))
    n_here = torch.cuda.device_count()
    if n_gpu is None:
        n_gpu = size if n_here else 0
    if n_gpu > 0 and n_here == 0:
        raise InputError(f"--n_gpu {n_gpu}: no GPU can be used on this machine; leave --n_gpu out to run on the CPU.")
    if n_gpu > 0 and n_gpu != size:
        raise InputError(
            f"--n_gpu {n_gpu}: this command was started as {size} process(es), one GPU each; "
            f"start it with torchrun --nproc_per_node, or leave --n_gpu out."
        )
    if n_gpu > 0 and local_rank >= n_here:
        raise InputError(f"local rank {local_rank}: this machine has only {n_here} GPU(s); lower --nproc_per_node.")
    device = torch.device("cuda", local_rank) if n_gpu > 0 else torch.device("cpu")
    if device.type == "cuda":
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
            # Nearly every micro-batch has another size; in blocks of fixed sizes, that leaves gaps which fit none.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        # cuDNN plans anew for each shape that a batch has for the first time, which takes many times as long as a step,
        # and text keeps bringing new shapes.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return World(device, rank, local_rank, size, _join(device, rank, size) if size > 1 else None)


def make_deterministic() -> None:
    """From now on, kernels of a GPU give the same bits for the same input. Some are slower that way: backward passes of
    attention and of embeddings, for example, usually add in whatever order their parts are ready."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # helps to find bugs, and takes time


def single_process(n_gpu: int | None) -> World:
    """The world of a script that is one process.

    Args:
        n_gpu: 0 for the CPU, 1 for a GPU, None for what there is.

    Raises: InputError if a launcher started several processes.
    """
    if _n_launched() > 1:
        raise InputError("this script uses one device: start it with python, without a launcher.")
    return init_world(n_gpu)


def _n_launched() -> int:
    """Processes that a launcher has started, over all machines; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def _join(device: torch.device, rank: int, size: int) -> dist.Store:
    """Connects the processes. Returns the store by which they found each other, which also carries news of failures.

    A launcher that restarts them keeps its store, so each attempt uses its own names there.

    Raises: RunError if they don't find each other.
    """
    limit = datetime.timedelta(minutes=30)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"the processes could not find each other at {where} ({reason_of(error)}); is the port taken by another "
            f"program, or the first machine out of reach?"
        ) from None
    return store


def now(device: torch.device) -> float:
    """Seconds, as of `time.perf_counter`, when the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"GPU {device.index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    return f"CPU ({torch.get_num_threads()} threads): no GPU is used"


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, so asked for by name
    return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))


def add_precision_flags(group) -> None:
    """--bf16, --fp16 and --fp32, of which one may be given, on a parser or a group of its flags."""
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="compute in bfloat16 (default where it is native)")
    precision.add_argument("--fp16", action="store_true", help="compute in float16 with loss scaling (GPU only)")
    precision.add_argument("--fp32", action="store_true", help="compute in float32 (default elsewhere)")


def choose_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What these flags say, by default bfloat16 where the hardware multiplies it. Raises: InputError if it can't be."""
    if args.fp16:
        if device.type == "cpu":
            raise InputError("--fp16 needs a GPU; on a CPU use --bf16 or --fp32.")
        return torch.float16
    if args.bf16:
        return torch.bfloat16
    return torch.float32 if args.fp32 or not has_native_bf16(device) else torch.bfloat16
