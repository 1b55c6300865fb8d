"""What a run will take, told from some of its own updates. Writes nothing; the student that it trains is thrown away.

The time is that of the timed updates, by the tokens in them and in the whole run; a first update, in which kernels are
chosen and buffers made, is not timed. The largest budget of tokens follows from the memory of two passes over the
longest sequences, of different size; a tenth of what is free is left alone.
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distiller import Distiller
from memory import PeakAbove, available_memory, peak_memory
from micro_batches import MicroBatch, prepare_batch_clm, prepare_batch_mlm
from vocabulary_loss import CHUNK_ROWS

RESERVE = 0.1  # of the free memory
GIB = 2**30


@dataclass
class Estimate:
    """Of the whole run; times in seconds, memory and disk in bytes."""

    updates_timed: int
    tokens_per_second: float  # over all processes
    mfu: float | None
    training: float
    n_evaluations: int
    evaluations: float
    peak_memory: int
    available_memory: int
    disk: int
    disk_while_saving: int  # more than `disk`, while a file is replaced
    bytes_per_token: float
    largest_pass: int  # tokens

    @property
    def hours(self) -> float:
        return (self.training + self.evaluations) / 3600


def estimate(distiller: Distiller, n_updates: int) -> Estimate:
    """Runs up to n_updates + 1 updates, one evaluation and two passes. Called by all processes."""
    timed, tokens, flops, seconds = time_updates(distiller, n_updates)
    per_second = tokens / seconds
    n_evaluations, evaluation = 0, 0.0
    if distiller.corpus.held_out:
        n_evaluations = 1 + distiller.n_updates // distiller.eval_interval
        start = time.monotonic()
        distiller.evaluate()
        evaluation = time.monotonic() - start
    peak = peak_memory(distiller.world.device)
    available, per_token, largest = largest_pass(distiller)
    disk, while_saving = disk_space(distiller)
    peak_flops = distiller.peak_flops
    return Estimate(
        updates_timed=timed,
        tokens_per_second=per_second,
        mfu=flops / seconds / distiller.world.size / peak_flops if peak_flops else None,
        training=distiller.recipe.n_epoch * distiller.corpus.train_set.n_tokens / per_second,
        n_evaluations=n_evaluations,
        evaluations=n_evaluations * evaluation,
        peak_memory=peak,
        available_memory=available,
        disk=disk,
        disk_while_saving=while_saving,
        bytes_per_token=per_token,
        largest_pass=largest,
    )


def time_updates(distiller: Distiller, n_updates: int) -> tuple[int, float, float, float]:
    """Returns: updates timed, tokens and FLOPs in them on all processes, seconds."""
    device = distiller.world.device
    n_updates = min(n_updates, max(1, distiller.updates_per_epoch - 1))
    warm_up = 1 if distiller.updates_per_epoch > 1 else 0
    tokens = flops = 0.0
    distiller.corpus.train_sampler.set_epoch(0)
    shown = None if distiller.world.is_master else True  # None: only on a terminal
    with tqdm(unit="seq", dynamic_ncols=True, disable=shown) as distiller.progress:
        windows = distiller.windows()
        for done in range(warm_up + n_updates):
            if done == warm_up:
                start = _now(device)
            window = next(windows)
            counts = distiller.count(window, stop=False)
            distiller.optimize(window, counts)
            if done >= warm_up:
                tokens += counts.tokens
                flops += distiller.flops(counts)
        seconds = _now(device) - start
    return n_updates, tokens, flops, seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def largest_pass(distiller: Distiller) -> tuple[int, float, int]:
    """Returns: free memory (beside what stands: weights, optimizer), bytes a token, and how many tokens fit."""
    device = distiller.world.device
    longest = int(distiller.corpus.train_set.lengths.max())
    few = math.ceil(CHUNK_ROWS.get(device.type, 1) / longest)
    sizes = (few, 4 * few)  # sequences; from a whole chunk of logits on, memory grows by the token
    memory = []
    for n in sizes:
        batch = _longest_batch(distiller, n, longest).to(device)
        with PeakAbove(device) as peak:
            distiller.try_pass(batch)
        memory.append(peak.bytes)
    available = int((1 - RESERVE) * available_memory(device))
    per_token = max(1.0, (memory[1] - memory[0]) / (longest * (sizes[1] - sizes[0])))
    fixed = max(0.0, memory[0] - per_token * longest * sizes[0])
    return available, per_token, int((available - fixed) / per_token)


def _longest_batch(distiller: Distiller, n: int, longest: int) -> MicroBatch:
    corpus = distiller.corpus
    first = int(corpus.train_set.lengths.argmax())
    sequences = [corpus.train_set[first]] * n
    if corpus.masking is None:
        return prepare_batch_clm(sequences, corpus.pad_id)
    generator = np.random.default_rng(0)
    return prepare_batch_mlm(sequences, corpus.pad_id, corpus.masking, generator, distiller.recipe.head_on_all_tokens)


def disk_space(distiller: Distiller) -> tuple[int, int]:
    """Returns: what the run leaves in its folder, and what it takes besides while the largest file is replaced."""
    model = distiller.student.model
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    trained = sum(tensor.numel() * tensor.element_size() for tensor in distiller.parameters)
    state = weights + 2 * trained  # Adam's two moments
    return (2 + distiller.recipe.n_epoch) * weights + state, state  # checkpoint.pth, model.safetensors, one an epoch


def report(found: Estimate, distiller: Distiller, dump_path: str) -> str:
    """The estimate as a table to read."""
    world = distiller.world
    folder = Path(dump_path).absolute()
    folder = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    unit = "GPU-hours" if world.device.type == "cuda" else "process-hours"
    needed = found.disk + found.disk_while_saving
    rows = {
        "timed": f"{found.updates_timed} of {distiller.n_updates:,} updates: {found.tokens_per_second:,.0f} tokens/s, "
        f"MFU {'unknown' if found.mfu is None else format(found.mfu, '.1%')}",
        "the whole run": f"{_duration(found.training + found.evaluations)} ({found.hours * world.size:.3g} {unit} on "
        f"{world.size}), {_duration(found.evaluations)} of it for {found.n_evaluations} evaluations",
        "peak memory": f"{found.peak_memory / GIB:.2f} GiB a process; {found.available_memory / GIB:.1f} more are free",
        "largest pass": f"about {found.largest_pass:,} tokens, padding included, at "
        f"{found.bytes_per_token / 2**20:.2f} MiB each: the limit of --tokens_per_batch and --tokens_per_pass",
        "disk": f"{found.disk / GIB:.2f} GiB, and {found.disk_while_saving / GIB:.2f} more while saving; "
        f"{free / GIB:.1f} are free" + ("" if free > needed else ": NOT ENOUGH"),
    }
    return "\n".join(f"{name:>14}  {text}" for name, text in rows.items())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} hours"
