"""Notes that this process should stop, and why."""

import contextlib
import math
import os
import signal
import time

from utils import STOP_SIGNALS

STEP_SECONDS = 8  # after a signal, until a step that is not finished is dropped


class StopSignal:
    """Remembers that this process should stop, so that the training loop sees it at the end of a step.

    The reason can be SIGTERM, SIGUSR1 (Slurm's warning, if so configured), SIGHUP (a terminal that goes away, unless
    `nohup` said to ignore it), Ctrl-C (a second one stops at once), or by the end of the launcher that started it.

    Attributes:
        name: of the reason; None so far.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = math.inf
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopSignal":
        self._previous = {
            number: signal.signal(number, self._note)
            for number in STOP_SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        at_once = "; again to stop at once, without saving" if number == signal.SIGINT else ""
        self._stop(signal.Signals(number).name, at_once)

    def _stop(self, name: str, more: str = "") -> None:
        self.name = name
        self._since = min(self._since, time.monotonic())
        with contextlib.suppress(OSError):  # the terminal may be what went away
            os.write(2, f"\n{name}: finishing this step, then saving{more}\n".encode())  # safe in a handler

    @property
    def came(self) -> bool:
        """Whether to stop at the end of this step."""
        if self.name is None and self._launcher is not None and os.getppid() != self._launcher:
            self._stop("the end of the launcher")
        return self.name is not None

    @property
    def is_pressing(self) -> bool:
        """Whether there is no time left to finish a long step: a launcher kills after 30 seconds."""
        return self.came and time.monotonic() - self._since > STEP_SECONDS
