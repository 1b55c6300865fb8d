"""Times the same steps of train.py on one process and on several, and what these wait for.

    python scripts/benchmark_scaling.py --processes 1 2 4 8

trains, on this machine, with one GPU for each process if it has any. Over several machines, start it on each of them as
you would start train.py; then there is one line, for all of the processes together:

    torchrun --nnodes 4 --nproc_per_node 8 ... scripts/benchmark_scaling.py

A step holds as many tokens however many processes share it, and the efficiency of the first line is 100 %. The last
columns say how long the mean process waits in each exchange of a step, before which its device finishes what it has to
do: for the slowest process, for the gradients, and for the numbers of what a step holds, which were sent a step ahead.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from distiller import Distiller
from scripts.benchmark_launches import FULL, TINY, Setup, Size
from training.batches import MICRO_BATCH_PRICE, StepCounts
from training.configurations import default_tokens_per_micro_batch
from training.distributed import World, describe_device, has_native_bf16, init_world, now
from utils import InputError, RunError, integer

ON_A_CPU = Size(4, 256, 4, 30522, 16, 16384, (), 1200, 4, 1, 0.3)
LIMIT = 1800  # seconds, for one number of processes
WORKER = "DISTIL_SCALING"  # in the environment of processes that this script starts
# What the mean process waits for.
WAITS = {"slowest": "waits for the slowest", "gradients": "exchange of gradients", "counts": "what a step holds"}


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--processes", type=integer(1, 1 << 12), nargs="+", default=[1, 2], help="numbers of them to compare (1 2)")
    add("--n_steps", type=integer(1, 10_000), help="steps to time (default: 4; 20 on a GPU)")
    add("--tiny", action="store_true", help="small models and steps, to see that it works")
    add("--n_gpu", type=integer(0, 1 << 20), help="0 for the CPU (default: what there is)")
    return parser


@dataclass(frozen=True)
class TimedWorld(World):
    """Lets a device finish before each exchange, and notes the seconds that this process then waits."""

    waits: Counter = field(default_factory=Counter)

    def timed(self, what: str, exchange: Callable):
        """What `exchange()` returns."""
        if self.size == 1:
            return exchange()
        start = now(self.device)
        result = exchange()
        self.waits[what] += now(self.device) - start
        return result

    def any(self, *flags: bool) -> tuple[bool, ...]:
        # The first exchange after all micro-batches: whoever is done waits here for the others.
        return self.timed("slowest", lambda: super(TimedWorld, self).any(*flags))

    def begin_all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
        wait = super().begin_all_reduce(tensor)
        what = "counts" if tensor.shape == (len(StepCounts._fields),) else "other"
        return lambda: self.timed(what, wait)


def measure(args: argparse.Namespace, world: World) -> dict:
    """A line of the table; times are in seconds a step."""
    on_gpu = world.device.type == "cuda"
    size = TINY if args.tiny else FULL if on_gpu else ON_A_CPU
    if size.batches % world.size:
        raise InputError(f"{world.size} processes can't share {size.batches} batches evenly; choose another number.")
    n_steps = args.n_steps or (20 if on_gpu else 4)
    dtype = torch.bfloat16 if has_native_bf16(world.device) else torch.float32
    timed_world = TimedWorld(world.device, world.rank, world.local_rank, world.size, world.store)
    setup = Setup(size, timed_world, default_tokens_per_micro_batch(world.device), dtype)
    setup.price = MICRO_BATCH_PRICE.get(world.device.type, 0)
    distiller = setup.distiller(replace(setup.typed, gradient_accumulation_steps=size.batches // world.size))
    exchange = distiller.optimization.exchange
    distiller.optimization.exchange = lambda parts: timed_world.timed("gradients", lambda: exchange(parts))
    steps = distiller.steps()
    take(distiller, steps, 2)  # the first steps choose kernels and make buffers
    timed_world.waits.clear()
    tokens, seconds = take(distiller, steps, n_steps)
    waits = torch.tensor([timed_world.waits[what] for what in WAITS], dtype=torch.float64)
    world.all_reduce(waits)
    means = (waits / world.size / n_steps).tolist()
    found = {"processes": world.size, "seconds": seconds / n_steps, "tokens": tokens / n_steps}
    return found | {"waits": means, "where": f"{describe_device(world.device)}, {str(dtype).split('.')[1]}"}


def take(distiller: Distiller, steps: Iterator, n: int) -> tuple[float, float]:
    """Takes n steps. Returns: tokens of all processes, seconds."""
    tokens, start = 0.0, now(distiller.world.device)
    for micro_batches, counts in itertools.islice(steps, n):
        distiller.step(micro_batches, counts)
        tokens += counts.tokens
    return tokens, now(distiller.world.device) - start


def measure_apart(n: int, argv: list[str]) -> dict:
    """What `measure` finds on n processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, utils.n_cores() // n)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, WORKER: "1"}
    try:
        command = [*launcher, __file__, *argv]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=True)
    except subprocess.CalledProcessError as error:
        raise RunError(f"{n} processes: they ended with status {error.returncode}; see above.") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{n} processes: no result in {LIMIT} s.") from None
    return json.loads(result.stdout.splitlines()[-1])


def table_of(found: list[dict]) -> str:
    first, lines = found[0], []
    for each in found:
        rate, first_rate = each["tokens"] / each["seconds"], first["tokens"] / first["seconds"]
        efficiency = rate / each["processes"] / (first_rate / first["processes"])
        waits = [f"{1000 * wait:.1f} ({wait / each['seconds']:.1%})" for wait in each["waits"]]
        lines.append([str(each["processes"]), f"{each['seconds']:.3f}", f"{rate:,.0f}", f"{efficiency:.0%}", *waits])
    header = ["processes", "s a step", "tokens/s", "efficiency", *(f"{name}, ms" for name in WAITS.values())]
    return utils.markdown_table(header, lines)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if "RANK" in os.environ:
        with init_world(args.n_gpu) as world:
            found = measure(args, world)
            if world.is_master:
                print(json.dumps(found) if WORKER in os.environ else told([found]))
        return
    given = {name: getattr(args, name) for name in ("n_steps", "n_gpu")}
    argv = ["--tiny"] * args.tiny + [f"--{name}={value}" for name, value in given.items() if value is not None]
    print(told([measure_apart(n, argv) for n in args.processes]))


def told(found: list[dict]) -> str:
    """The table, and what it is of."""
    return f"{table_of(found)}\n\nSteps of some {found[0]['tokens']:,.0f} tokens; {found[0]['where']}."


if __name__ == "__main__":
    raise SystemExit(main())
