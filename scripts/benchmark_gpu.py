"""Measures where a training step goes on one GPU, in less than ten minutes.

    python scripts/benchmark_gpu.py

It times the products and copies that bound everything else, then steps of train.py as people start them, and profiles
the kernels of such a step. Then come the vocabulary loss, attention, and torch.compile. The tables are printed and
written to results/speed/<card>.md, each as soon as it is ready. A part that fails or exceeds its time limit says so in
one line, and the next part runs.

--count needs no GPU: it counts the kernel launches, memory traffic and matrix work of a step on fake tensors. --tiny
runs every part in seconds, also on a CPU, to see that it works; its times mean nothing.

The teacher is a BERT-base with random weights, the student has 6 layers, dropout is on, and everything computes in
bfloat16. Sequence lengths are log-normal like those of Wikipedia: 116 tokens on average, at most 512.

What the columns of a step mean:
    ms        from one step to the next, without waiting in between, as in training
    host      the time in which the CPU launches the step's kernels, starting from an idle GPU
    GPU       the time in which kernels run, according to the profiler
    idle      the share of ms in which no kernel runs
    launches  kernels, copies and fills
    GiB       peak memory, including weights and optimizer state
"""

import argparse
import contextlib
import gc
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise PyTorch's profiler logs every start and stop
import torch
import transformers
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from distiller import Distiller
from files.atomic import atomic_write
from files.paths import check_output_file
from models.memory import peak_memory
from scripts import benchmark_kernels, benchmark_launches
from scripts.benchmark_kernels import forget_peak, relative_error, setup_for
from scripts.benchmark_launches import FULL, TINY, Setup, Step, class_of, steps_of
from scripts.benchmark_training import changed
from training import losses
from training.distributed import describe_device, now
from utils import RunError, logger, path, reason_of

FOLDER = Path(__file__).resolve().parent.parent / "results" / "speed"


# ----------------------------------------------------------------------------------------------------- measuring a step


STEP_HEADER = ["step", "micro-batches", "tokens", "ms", "host", "GPU", "idle", "launches", "tokens/s", "MFU", "GiB"]


class Measured(NamedTuple):
    """The mean of some steps; the top of this file says what each figure means."""

    micro_batches: float
    tokens: float
    ms: float
    host: float
    gpu: float
    launches: float
    mfu: float | None
    gib: float

    @property
    def idle(self) -> float:
        return max(0.0, 1 - self.gpu / self.ms)

    def row(self, title: str) -> list[str]:
        return [
            title, f"{self.micro_batches:.1f}", f"{self.tokens:,.0f}", f"{self.ms:.1f}", f"{self.host:.1f}",
            f"{self.gpu:.1f}", f"{self.idle:.0%}", f"{self.launches:,.0f}", f"{1000 * self.tokens / self.ms:,.0f}",
            f"{self.mfu:.1%}" if self.mfu else "-", f"{self.gib:.1f}",
        ]  # fmt: skip


def measure(distiller: Distiller, steps: list[Step], rounds: int) -> Measured:
    """Takes the steps several times: to warm up, to time them, to time the host alone, to profile them."""
    device, n = distiller.world.device, len(steps)
    forget_peak(device)
    seconds = [take_steps(distiller, steps) for _ in range(rounds + 1)]
    gib = peak_memory(device) / 2**30
    host = 0.0
    for step in steps:
        start = now(device)
        distiller.step(*step)
        host += time.perf_counter() - start
    kernels = kernels_of(lambda: take_steps(distiller, steps), device)
    per_step = statistics.median(seconds[1:]) / n
    flops = sum(distiller.objective.work.flops(counts) for _, counts in steps) / n
    peak = distiller.peak_flops
    return Measured(
        micro_batches=sum(len(micro_batches) for micro_batches, _ in steps) / n,
        tokens=sum(counts.tokens for _, counts in steps) / n,
        ms=1000 * per_step,
        host=1000 * host / n,
        gpu=sum(ms for _, ms in kernels) / n,
        launches=len(kernels) / n,
        mfu=flops / per_step / peak if peak else None,
        gib=gib,
    )


def take_steps(distiller: Distiller, steps: list[Step]) -> float:
    """Seconds."""
    start = now(distiller.world.device)
    for step in steps:
        distiller.step(*step)
    return now(distiller.world.device) - start


def kernels_of(work: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """Name and milliseconds of everything that the device runs; on a CPU, PyTorch's operations."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        work()
    if not on_gpu:
        return [(event.name, event.self_cpu_time_total / 1000) for event in profiler.events()]
    events = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    return [(event.name, event.time_range.elapsed_us() / 1000) for event in events]


# ----------------------------------------------------------------------------------------------------------- the parts


def recipes(setup: Setup) -> Iterator[str]:
    """The recipe as people type it, and what its flags and the price of a micro-batch change."""
    masked, related = {"restrict_ce_to_mask": True}, {"alpha_relation": 1.0}
    large = f"--tokens_per_batch {setup.size.tokens}"
    padded, unfused = {"padding_free": False}, {"gradient_kernel": lambda device: None}
    prices = (0, setup.price // 2, 2 * setup.price)
    cases = [
        ("as typed", setup.typed, {}, {}),
        ("as typed, without the kernel for the loss", setup.typed, {}, unfused),
        ("as typed, padded", replace(setup.typed, **padded), {}, {}),
        *((f"as typed, padded, price {p}", replace(setup.typed, **padded), {"price": p}, {}) for p in prices),
        (large, setup.large, {}, {}),
        (f"{large}, without the kernel", setup.large, {}, unfused),
        ("as typed, --restrict_ce_to_mask", replace(setup.typed, **masked), {}, {}),
        ("as typed, --alpha_relation 1", replace(setup.typed, **related), {}, {}),
        ("the same, padded", replace(setup.typed, **related, **padded), {}, {}),
        (f"{large} --restrict_ce_to_mask", replace(setup.large, **masked), {}, {}),
    ]
    rows = []
    for title, recipe, price, form in cases:
        with changed(setup, **price), changed(losses, **form):
            distiller = setup.distiller(recipe)
            steps = steps_of(distiller, setup.size.n_steps)
            rows.append(measure(distiller, steps, setup.size.rounds).row(title))
    yield utils.markdown_table(STEP_HEADER, rows)


def kernels(setup: Setup) -> Iterator[str]:
    """What the kernels of a large step do."""
    distiller, n_steps = setup.distiller(setup.large), setup.size.n_steps
    steps = steps_of(distiller, n_steps)
    for _ in range(3):
        seconds = take_steps(distiller, steps)
    found = [
        (class_of(name), name, ms / n_steps)
        for name, ms in kernels_of(lambda: take_steps(distiller, steps), setup.device)
    ]
    whole, busy = 1000 * seconds / n_steps, sum(ms for *_, ms in found)
    rows = []
    for kind in sorted({kind for kind, *_ in found}):
        times = [ms for other, _, ms in found if other == kind]
        rows.append([kind, f"{len(times) / n_steps:,.0f}", f"{sum(times):.2f}", f"{sum(times) / whole:.0%}"])
    rows.append(["idle", "", f"{max(0.0, whole - busy):.2f}", f"{max(0.0, 1 - busy / whole):.0%}"])
    rows.append(["the step", f"{len(found) / n_steps:,.0f}", f"{whole:.2f}", "100%"])
    yield utils.markdown_table(["class", "launches", "ms", "share"], rows)
    by_name: dict[tuple[str, str], list[float]] = {}
    for kind, name, ms in found:
        by_name.setdefault((kind, short_name(name)), []).append(ms)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
    rows = [[name, kind, f"{len(times) / n_steps:,.0f}", f"{sum(times):.2f}"] for (kind, name), times in longest]
    yield utils.markdown_table(["the longest kernels", "class", "launches", "ms"], rows)


def short_name(kernel: str) -> str:
    """A C++ name without namespaces, types and arguments that fill lines."""
    name = re.sub(r"\b(?:void|at|native|cuda|detail|c10|std|\(anonymous namespace\)|<unnamed>)\b(?:::)?", "", kernel)
    return " ".join(name.replace("|", " ").split())[:70]


def repeatability(setup: Setup) -> Iterator[str]:
    """Whether one step from the same weights and seeds gives gradients with the same bits twice."""
    first, second = (step_gradients(setup) for _ in range(2))
    groups: dict[str, list[tuple[bool, float]]] = {}
    for name, gradient in first.items():
        layer = re.search(r"layer\.\d+", name)
        group = layer[0] if layer else name.removeprefix("model.").removeprefix("distilbert.").rpartition(".")[0]
        difference = relative_error(second[name], gradient.double())
        groups.setdefault(group, []).append((torch.equal(gradient, second[name]), difference))
    rows = []
    for group, found in groups.items():
        same, differences = zip(*found, strict=True)
        rows.append([group, str(len(found)), str(sum(same)), f"{max(differences):.1e}"])
    yield utils.markdown_table(["gradients of a step, twice", "tensors", "same bits", "largest difference"], rows)


def step_gradients(setup: Setup) -> dict[str, torch.Tensor]:
    """By name, of one step from the first weights."""
    distiller = setup.distiller(replace(setup.large, max_grad_norm=1e9))  # unclipped, so that one does not change all
    found = {}

    def keep(*_) -> None:
        trained = ((name, p) for name, p in distiller.student.named_parameters() if p.requires_grad)
        found.update({name: p.grad.clone() for name, p in trained})

    distiller.optimization.optimizer.register_step_pre_hook(keep)
    distiller.step(*steps_of(distiller, 1)[0])
    return found


def compiling(setup: Setup) -> Iterator[str]:
    """Whole steps, eager and with --compile, which pads."""
    for title, recipe in ((f"--tokens_per_batch {setup.size.tokens}", setup.large), ("as typed", setup.typed)):
        rows = []
        for compiled in (False, True):
            torch.compiler.reset()
            counters.clear()
            distiller = setup.distiller(replace(recipe, compile=compiled, padding_free=False))
            steps = steps_of(distiller, 3 * setup.size.n_steps)  # shapes that compile anew
            first = take_steps(distiller, steps)
            n_graphs = counters["stats"]["unique_graphs"]
            row = measure(distiller, steps, setup.size.rounds).row(f"{title}, {'compiled' if compiled else 'eager'}")
            rows.append([*row, f"{first:.0f}", str(n_graphs), str(counters["stats"]["unique_graphs"] - n_graphs)])
        # The layers of a model share a graph, but it is compiled again for each kind of batch (padded or not).
        yield utils.markdown_table([*STEP_HEADER, "first steps, s", "graphs", "and later"], rows)


PARTS = {  # and the seconds that each may take
    "ceilings": (benchmark_kernels.ceilings, 40),
    "recipes": (recipes, 120),
    "kernels": (kernels, 40),
    "vocabulary": (benchmark_kernels.vocabulary, 90),
    "attention": (benchmark_kernels.attention, 40),
    "repeatability": (repeatability, 30),
    "compiling": (compiling, 230),
}


# --------------------------------------------------------------------------------------------------------- all of them


class OutOfTime(Exception):
    pass


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block when they are over. (A kernel that hangs is not interrupted.)"""

    def stop(*_) -> None:
        raise OutOfTime(f"longer than {seconds:g} s")

    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def run_parts(setup: Setup, names: list[str], output: Path) -> list[str]:
    """Prints what each part finds, and writes all of it to a file. Returns the names of those that failed."""
    failed, text = [], ""

    def show(section: str) -> None:
        nonlocal text
        print(f"{section}\n", flush=True)
        text += f"{section}\n\n"
        with atomic_write(output, "w") as file:
            file.write(text.rstrip("\n") + "\n")

    show(title_of(setup))
    for name in names:
        part, seconds = PARTS[name]
        logger.info("%s: %s", name, part.__doc__.splitlines()[0])
        try:
            with time_limit(seconds):
                for section in part(setup):
                    show(section)
        except Exception as error:  # it is reported, and the other parts are still worth their time
            failed.append(name)
            show(f"{name} failed: {type(error).__name__}, {reason_of(error)}")
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def title_of(setup: Setup) -> str:
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Transformers {transformers.__version__}"
    shape = f"{setup.size.layers} layers of {setup.size.dim} to {setup.size.layers // 2}, bfloat16"
    return f"# {describe_device(setup.device)}\n\n{versions}; {shape}; by `python scripts/benchmark_gpu.py`"


def usual_output(device: torch.device) -> Path:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', card.lower())}.md"


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    add("--output", type=path, help="file to write (default: results/speed/<card>.md)")
    add("--tiny", action="store_true", help="a small size, to try it, also on a CPU")
    add("--count", action="store_true", help="only count launches and bytes of a step, which needs no GPU")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if args.count:
        print(benchmark_launches.report(TINY if args.tiny else FULL))
        return
    setup = setup_for(args.tiny)
    output = Path(args.output or usual_output(setup.device))
    check_output_file(output, "--output")
    if failed := run_parts(setup, args.parts, output):
        raise RunError(f"{output} lacks what failed: {', '.join(failed)}.")


if __name__ == "__main__":
    raise SystemExit(main())
