"""Process services: errors, logging, devices and process groups, seeds, git, atomic files, signals.

Imports no other file of the project.
"""

import contextlib
import datetime
import functools
import glob
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("distil")

EXIT_OK = 0
EXIT_FAILED = 1  # the run itself failed: loss not finite, disk full
EXIT_BAD_INPUT = 2  # a flag or a file is wrong; also what argparse uses
EXIT_INTERRUPTED = 75  # stopped by a signal after saving its state: run the same command with --resume (EX_TEMPFAIL)


class InputError(ValueError):
    """What the user gave can't be used. The message is one sentence: the thing, what is wrong, the way out."""


def why_not_loaded(name: str, error: Exception) -> str:
    """In a few words, why a hub name or folder could not be loaded."""
    if not Path(name).exists():
        return "it is no folder here, and the hub does not have it or can't be reached"
    return first_line(error)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class RunError(RuntimeError):
    """The run can't go on. The message is one sentence, shown without a traceback."""


def cli(main: Callable) -> Callable:
    """Wraps a script's `main(argv)`: expected errors become one line on stderr and an exit status, bugs keep their
    traceback."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or EXIT_OK
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit doesn't try to flush
            return EXIT_FAILED
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            print(f"error: {error.strerror or error}{where}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


def setup_logging(is_master: bool = True) -> None:
    """One line a record on stderr, above a progress bar if there is one; only warnings from the other ranks."""
    from tqdm import tqdm

    class AboveProgressBar(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    handler = AboveProgressBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_master else logging.WARNING)


def quiet_transformers() -> None:
    """Its load reports, bars and notes on retries repeat what our own messages say."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


# ------------------------------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class World:
    """Where this process stands among all that train together, and the device it computes on."""

    device: "torch.device"
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: "torch.Tensor") -> None:
        """Sums `tensor` over all processes, in place; between processors if it lies in main memory."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def share(self, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays that `make` returns: made by one process of each machine, mapped from a file by the others.

        The file lies in the folder for temporary files (TMPDIR chooses it), and is gone from there on return.
        """
        if self.size == 1:
            return make()
        import torch.distributed as dist

        folder = None
        if self.local_rank == 0:
            made = make()
            folder = tempfile.mkdtemp(prefix="distil-")
            try:
                for name, array in made.items():
                    np.save(os.path.join(folder, name), array)
            except OSError as error:
                shutil.rmtree(folder)
                raise RunError(f"{folder} has no room for the index of the text ({error}); set TMPDIR.") from None
        folders: list = [None] * self.size
        dist.all_gather_object(folders, folder)
        ours = Path(folders[self.rank - self.local_rank])  # launchers number the processes of a machine in a row
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in ours.glob("*.npy")}
        dist.barrier()
        if folder:
            shutil.rmtree(folder)  # what is mapped stays readable
        return arrays

    def close(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def init_world(n_gpu: int | None, local_rank: int = -1) -> World:
    """The device of this process, and the process group if a launcher started several.

    Args:
        n_gpu: number of GPUs over all machines; 0 for the CPU; None for what there is.
        local_rank: as a launcher of old passes it; `LOCAL_RANK` of the environment comes first.
    """
    import torch

    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
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
        torch.cuda.set_device(device)
    if size > 1:
        import torch.distributed as dist

        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30)
        )
    return World(device, rank, local_rank, size)


def describe_device(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"GPU {device.index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    return f"CPU ({torch.get_num_threads()} threads): no GPU is used"


def has_native_bf16(device: "torch.device") -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself (elsewhere it is emulated, and slower than float32)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, so asked for by name
    return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))


def set_seed(*seed: int) -> None:
    """Seeds every global generator with a mix of `seed`, so that e.g. (seed, step, rank) never collide."""
    import torch

    words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) for the training loop to see at the end of an update.

    A second SIGINT stops at once, for a person at the keyboard.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        at_once = "; again to stop at once, without saving" if number == signal.SIGINT else ""
        os.write(2, f"\n{self.name}: finishing this update, then saving{at_once}\n".encode())  # safe in a handler


# ---------------------------------------------------------------------------------------------------------------- files


def new_file_mode() -> int:
    """The permissions that the user's umask gives a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator:
    """A file that appears under its name whole or not at all: temporary file beside it, fsync, rename.

    Raises: OSError as `open` and `write` do; the file that stood under the name before is then untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # what the user knows
        raise
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, new_file_mode())  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes a rename in it outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def expand_globs(names: list[str]) -> list[str]:
    """The paths that paths and globs name, in order.

    Raises: InputError if a glob matches nothing, or a file comes twice. Whether a path exists is for the caller to see.
    """
    paths: list[str] = []
    for name in map(str, names):
        found = [name] if os.path.exists(name) or not glob.has_magic(name) else sorted(glob.glob(name, recursive=True))
        if not found:
            raise InputError(f"no file matches {name}.")
        paths += found
    twice = [path for path, n in Counter(map(os.path.realpath, paths)).items() if n > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice.")
    return paths


def write_json(path: str | Path, value: object) -> None:
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, default=str)
        file.write("\n")


def git_log(folder: str | Path) -> dict:
    """Which code this is: commit, branch and whether the files differ from it; what can't be told is None."""
    found = {"repo_sha": None, "repo_branch": None, "repo_dirty": None}
    try:
        import git

        repository = git.Repo(folder, search_parent_directories=True)
        found["repo_dirty"] = repository.is_dirty()
        found["repo_sha"] = repository.head.commit.hexsha
        found["repo_branch"] = None if repository.head.is_detached else repository.active_branch.name
    except ImportError as error:  # gitpython asks for the git program as soon as it is imported
        warnings.warn(f"git is not installed, so git_log.json stays empty ({error.__class__.__name__})", stacklevel=2)
    except (git.GitError, ValueError) as error:  # a copy without .git; a repository without commits
        logger.info("no git commit to note in git_log.json: %s", error or "not a git repository")
    return found
