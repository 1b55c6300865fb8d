"""What a run shows while it works: mean losses, rates, time left, a progress bar.

Between two log lines, sums stay on the device, so that nothing waits for it.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from models.memory import peak_memory
from training.distributed import World
from utils import LOG_FILE, RunError, logger, progress_bar


class Meter:
    """Sums over the steps since the last log line.

    Args:
        alphas: of the terms of the loss.
        n_steps: of the whole run.
        world: this process among all. What is added is summed over all processes already.
        peak_flops: FLOP/s that the device could do; None: unknown.

    Attributes:
        tokens: trained on so far, in the whole run.
        steps: since the last log line.
    """

    def __init__(self, alphas: dict[str, float], n_steps: int, world: World, peak_flops: float | None) -> None:
        self.alphas, self.n_steps = alphas, n_steps
        self.world, self.peak_flops = world, peak_flops
        self.tokens = 0
        self.bar: tqdm | None = None
        self._start_interval()

    def _start_interval(self) -> None:
        device = self.world.device
        # What the terms add to the loss, summed over the steps that were finite.
        self._parts = torch.zeros(len(self.alphas), dtype=torch.float64, device=device)
        self._bad = torch.zeros((), dtype=torch.float64, device=device)  # steps left out, since they were not
        self.steps, self._tokens, self._flops = 0, 0, 0.0
        self._start = time.monotonic()

    # -------------------------------------------------------------------------------------------------- while training

    @contextlib.contextmanager
    def progress(self, total: int | None = None, done: int = 0) -> Iterator[None]:
        """A progress bar, in sequences of this process, on the master's terminal."""
        lines = LOG_FILE is not None  # without a terminal, the log says how much time is left
        with progress_bar(
            self.world.is_master, lines, desc="training", total=total, initial=done, unit="seq"
        ) as self.bar:
            yield
        self.bar = None

    def advance(self, n_sequences: int) -> None:
        if self.bar is not None:  # a bar without a total has no truth value
            self.bar.update(n_sequences)

    def add(self, parts: torch.Tensor, bad: torch.Tensor, tokens: float, flops: float) -> None:
        """Notes a step.

        Args:
            parts: (n_terms,) what each term adds to the loss.
            bad: scalar bool tensor, whether the step was left out.
            tokens, flops: of all processes.
        """
        self._parts += torch.where(bad, 0.0, parts)
        self._bad += bad
        self.tokens += int(tokens)
        self._tokens += int(tokens)
        self._flops += flops
        self.steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wraps whatever isn't training, so that tokens/s counts training alone."""
        start = time.monotonic()
        yield
        self._start += time.monotonic() - start

    def check_finite(self, step: int, allowed: int) -> None:
        """Whether the steps since the last log line went well; checked there and before a save, not in every step,
        because it waits for the device.

        Args:
            step: number of steps done.
            allowed: how many may have been left out, since their loss or gradient was not finite.

        Raises: RunError if more were.
        """
        n_bad = int(self._bad.item())
        where = f"in {n_bad} of the last {self.steps} steps, up to {step} of {self.n_steps}"
        if n_bad > allowed:
            raise RunError(
                f"the loss or its gradient was not finite {where}; the last checkpoint is kept. A lower "
                f"--learning_rate or a longer --warmup_prop usually helps, and so does --bf16 instead of --fp16."
            )
        if n_bad:
            logger.warning("the loss or its gradient was not finite %s, which were left out", where)

    # ---------------------------------------------------------------------------------------------------- at a log line

    def read(self, step: int, lr: float) -> tuple[dict[str, float | None], str]:
        """Means and rates since the last time, as a record of metrics and as a line to read; then starts over.

        Waits for the device. `step` is the number of steps done, `lr` the rate of the next.
        """
        # In one copy from the device, and before the clock is read, since it waits for all that is computed.
        *totals, n_bad = torch.cat([self._parts, self._bad[None]]).tolist()
        seconds = time.monotonic() - self._start
        parts = [total / max(1, self.steps - n_bad) for total in totals]
        means = {term: part / alpha for (term, alpha), part in zip(self.alphas.items(), parts, strict=True)}
        flops = self._flops / seconds / self.world.size
        metrics = {"loss": sum(parts)}
        metrics |= {f"loss_{term}": mean for term, mean in means.items()}
        metrics |= {"lr": lr, "tokens_per_second": self._tokens / seconds}
        metrics |= {"tflops": flops / 1e12, "mfu": flops / self.peak_flops if self.peak_flops else None}
        metrics |= {"peak_memory_gib": peak_memory(self.world.device) / 2**30}
        words = (
            f"step {step}/{self.n_steps} ({100 * step / self.n_steps:.1f} %)",
            f"loss {metrics['loss']:.4f}",
            *(f"{term} {mean:.4f}" for term, mean in means.items()),
            f"lr {lr:.2e}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"MFU {metrics['mfu']:.1%}" if self.peak_flops else "MFU unknown",
            f"peak {metrics['peak_memory_gib']:.1f} GiB",
            f"{tqdm.format_interval((self.n_steps - step) * seconds / self.steps)} left",
        )
        self._start_interval()
        return metrics, "  ".join(words)

    # ------------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict:
        return {
            "parts": self._parts,
            "bad": self._bad,
            "steps": self.steps,
            "interval_tokens": self._tokens,
            "interval_flops": self._flops,
            "interval_seconds": time.monotonic() - self._start,
            "tokens": self.tokens,
        }

    def load_state_dict(self, state: dict) -> None:
        device = self.world.device
        self._parts, self._bad = state["parts"].to(device), state["bad"].to(device)
        self.steps, self.tokens = state["steps"], state["tokens"]
        self._tokens, self._flops = state["interval_tokens"], state["interval_flops"]
        self._start = time.monotonic() - state["interval_seconds"]
