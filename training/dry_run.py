"""What a run will take, measured on a few of its steps. Writes nothing; the student it trains is discarded. `distiller`
is the run's `Distiller`.

The time of the timed steps is scaled by tokens to the whole run. The first step, which chooses kernels and makes
buffers, is not timed, nor are the next four on a GPU, which find memory for micro-batches of many shapes, or with
--compile. The largest micro-batch follows from the memory of two micro-batches of different size, made of the longest
sequences; a tenth of the free memory is kept in reserve.
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.memory import PeakAbove, available_memory, peak_memory
from training.batches import MicroBatch, StepCounts, cut_micro_batches, prepare_batch
from training.distributed import now
from training.losses import usual_chunk
from training.objective import loss_weights

RESERVE = 0.1  # of the free memory
GIB = 2**30


@dataclass
class Estimate:
    """What the whole run takes; times in seconds, memory and disk in bytes."""

    steps_timed: int
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
    largest_micro_batch: int  # tokens

    @property
    def hours(self) -> float:
        return (self.training + self.evaluations) / 3600


def make_estimate(distiller, n_steps: int) -> Estimate:
    """Takes up to n_steps steps after the warm-up, one evaluation and two micro-batches. Called by all processes."""
    timed, tokens, flops, seconds = time_steps(distiller, n_steps)
    per_second = tokens / seconds
    n_evaluations, evaluation = 0, 0.0
    if distiller.data.held_out:
        n_evaluations = 1 + distiller.n_steps // distiller.eval_interval
        start = time.monotonic()
        distiller.evaluate()
        evaluation = time.monotonic() - start
    peak = peak_memory(distiller.world.device)
    available, per_token, largest = largest_micro_batch(distiller)
    disk, while_saving = disk_space(distiller)
    return Estimate(
        steps_timed=timed,
        tokens_per_second=per_second,
        mfu=flops / seconds / distiller.world.size / distiller.peak_flops if distiller.peak_flops else None,
        training=distiller.recipe.n_epoch * distiller.data.train_sampler.n_tokens / per_second,
        n_evaluations=n_evaluations,
        evaluations=n_evaluations * evaluation,
        peak_memory=peak,
        available_memory=available,
        disk=disk,
        disk_while_saving=while_saving,
        bytes_per_token=per_token,
        largest_micro_batch=largest,
    )


def time_steps(distiller, n_steps: int) -> tuple[int, float, float, float]:
    """Returns: steps timed, tokens and FLOPs in them on all processes, seconds."""
    device = distiller.world.device
    n_steps = min(n_steps, max(1, distiller.steps_per_epoch - 1))
    usual = 5 if device.type == "cuda" or distiller.recipe.compile else 1
    warm_up = min(usual, distiller.steps_per_epoch - n_steps)
    tokens = flops = 0.0
    with distiller.meter.progress():
        steps = distiller.steps()
        for done in range(warm_up + n_steps):
            if done == warm_up:
                start = now(device)
            micro_batches, counts = next(steps)
            distiller.step(micro_batches, counts)
            if done >= warm_up:
                tokens += counts.tokens
                flops += distiller.objective.work.flops(counts)
        seconds = now(device) - start
    return n_steps, tokens, flops, seconds


def largest_micro_batch(distiller) -> tuple[int, float, int]:
    """Returns: free memory (with weights and optimizer loaded), bytes a token, and how many tokens fit."""
    device = distiller.world.device
    longest = int(distiller.data.train_set.lengths.max())
    few = math.ceil(usual_chunk(device, distiller.student.model.config.vocab_size, distiller.dtype) / longest)
    sizes = (few, 4 * few)  # sequences; from a whole chunk of logits on, memory grows by the token
    memory = []
    for n in sizes:
        micro_batch = _longest_micro_batch(distiller, n).to(device)
        with PeakAbove(device) as peak:
            try_micro_batch(distiller, micro_batch)
        memory.append(peak.bytes)
    available = int((1 - RESERVE) * available_memory(device))
    per_token = max(1.0, (memory[1] - memory[0]) / (longest * (sizes[1] - sizes[0])))
    fixed = max(0.0, memory[0] - per_token * longest * sizes[0])
    return available, per_token, int((available - fixed) / per_token)


def try_micro_batch(distiller, micro_batch: MicroBatch) -> None:
    """Runs it forward and backward, to see what that takes."""
    weights = loss_weights(distiller.recipe.alphas, StepCounts.of([micro_batch]))
    distiller.objective.begin_step()
    s, t = distiller.objective.read_as_student(micro_batch), distiller.objective.read_as_teacher(micro_batch)
    loss, _ = distiller.objective(s, t, micro_batch, weights)
    distiller.optimization.backward(loss)
    distiller.optimization.forget_gradients()


def _longest_micro_batch(distiller, n: int) -> MicroBatch:
    data = distiller.data
    sequences = [data.train_set[int(data.train_set.lengths.argmax())]] * n
    batch = prepare_batch(sequences, data.masking, np.random.default_rng(0))
    return cut_micro_batches([batch], data.padding, 0, data.head_on_all_tokens(distiller.recipe))[0]


def disk_space(distiller) -> tuple[int, int]:
    """Returns: what the run leaves in its folder, and what it takes besides while the largest file is replaced."""
    model = distiller.student.model
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    trained = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters() if tensor.requires_grad)
    state = weights + 2 * trained  # Adam's two moments
    n_models = 2 + distiller.recipe.n_epoch + bool(distiller.data.held_out)  # checkpoint.pth, model.safetensors, best
    return n_models * weights + distiller.recipe.keep_checkpoints * state, state


def report(estimate: Estimate, distiller, dump_path: str) -> str:
    """The estimate as a table to read."""
    world = distiller.world
    folder = Path(dump_path).absolute()
    folder = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    unit = "GPU-hours" if world.device.type == "cuda" else "process-hours"
    needed = estimate.disk + estimate.disk_while_saving
    total = estimate.training + estimate.evaluations
    rows = {
        "timed": f"{estimate.steps_timed} of {distiller.n_steps:,} steps: {estimate.tokens_per_second:,.0f} tokens/s, "
        f"MFU {'unknown' if estimate.mfu is None else format(estimate.mfu, '.1%')}",
        "the whole run": f"{_duration(total)} ({estimate.hours * world.size:.3g} {unit} on {world.size}), "
        f"{_duration(estimate.evaluations)} of it for {estimate.n_evaluations} evaluations",
        "peak memory": f"{estimate.peak_memory / GIB:.2f} GiB a process; "
        f"{estimate.available_memory / GIB:.1f} more are free",
        "micro-batch": f"at most about {estimate.largest_micro_batch:,} tokens, padding included, at "
        f"{estimate.bytes_per_token / 2**20:.2f} MiB each: the limit of --tokens_per_micro_batch",
        "disk": f"{estimate.disk / GIB:.2f} GiB, and {estimate.disk_while_saving / GIB:.2f} more while saving; "
        f"{free / GIB:.1f} are free" + ("" if free > needed else ": NOT ENOUGH"),
    }
    return "\n".join(f"{name:>14}  {text}" for name, text in rows.items())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} hours"
