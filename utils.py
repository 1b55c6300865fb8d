"""What every command needs: errors, the command line, logging, seeds, signals.

Imports no other file of the project.
"""

import argparse
import contextlib
import functools
import logging
import math
import os
import random
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

logger = logging.getLogger("distil")
LOG_FILE = os.environ.get("DISTIL_LOG")

EXIT_OK = 0
EXIT_FAILED = 1  # the run itself failed: loss not finite, disk full
EXIT_BAD_INPUT = 2  # a flag or a file is wrong; also what argparse uses
EXIT_KEYBOARD = 130  # Ctrl-C, as shells have it
EXIT_INTERRUPTED = 75  # stopped by a signal after saving its state: run the same command with --resume (EX_TEMPFAIL)


class InputError(ValueError):
    """What the user gave can't be used. The message is one sentence: the thing, what is wrong, the way out."""


class RunError(RuntimeError):
    """The run can't continue. The message is one sentence, shown without a traceback."""


class ToldAlready(Exception):
    """Ends a process whose failure has been reported, by itself or by another process of its run.

    Args:
        status: what to exit with.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def why_not_loaded(name: str, error: Exception) -> str:
    """In a few words, why a hub name or folder could not be loaded."""
    if not Path(name).exists():
        return "it is not a local folder, and the hub does not have it or can't be reached"
    return reason_of(error)


def reason_of(error: Exception, length: int = 160) -> str:
    """What an error of a library says, on one line and not longer than `length`."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= length else f"{text[: length - 3]}..."


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Wrong flags raise an InputError, which `command_line` shows as it shows all others. Beside the flags there is
    `command`, as the user typed it."""

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        command = shlex.join(["python", *(sys.argv if args is None else [self.prog, *args])])
        parsed.command = command.encode(errors="replace").decode()  # it is written to files, which are UTF-8
        return parsed

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; --help explains the flags.")


def make_parser(description: str, **options) -> Parser:
    """A parser that shows `description`, a script's docstring, as it is written."""
    return Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
    )


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text) if len(text) < 100 else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{_shortened(text)} is not a whole number from {low:,} to {high:,}")
        return value

    return parse


def real(low: float, high: float = math.inf, low_allowed: bool = True) -> Callable[[str], float]:
    """The type of a flag: a finite number from `low` (or above it) to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and (low_allowed or value > low)):
            bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
            bounds = bounds if low_allowed else f"above {low:g}" + (f", up to {high:g}" if math.isfinite(high) else "")
            raise argparse.ArgumentTypeError(f"{_shortened(text)} is not a number {bounds}")
        return value

    return parse


def path(text: str) -> str:
    """The type of a flag: a name that a file or a folder could have, or a model on the hub."""
    try:
        parts = text.encode().split(b"/")  # libraries that are not Python's take only names in UTF-8
    except UnicodeEncodeError:
        parts = []
    if not parts or not text.strip() or "\0" in text or len(text) > 4000 or max(map(len, parts)) > 255:
        raise argparse.ArgumentTypeError(f"{_shortened(text)} can't be the name of a file or a folder")
    return text


def words(text: str) -> str:
    """The type of a flag: any text in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{_shortened(text)} is not UTF-8") from None
    return text


def check_needed(args: argparse.Namespace, parser: argparse.ArgumentParser, needed: str, *names: str) -> None:
    """Raises InputError if a flag of these was given a value, but the one that it has no effect without was not."""
    for name in names:
        if getattr(args, name) != parser.get_default(name) and not getattr(args, needed):
            raise InputError(f"--{name} has no effect without --{needed}: give that too, or leave it out.")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def command_line(make_parser: Callable[[], argparse.ArgumentParser]) -> Callable:
    """Turns a function of parsed flags into a script's `main(argv) -> exit status`.

    Expected errors become one line on stderr and an exit status; bugs keep their traceback.
    """

    def decorate(run: Callable[[argparse.Namespace], int | None]) -> Callable[[list[str] | None], int]:
        @functools.wraps(run)
        def main(argv: list[str] | None = None) -> int:
            try:
                setup_logging()
                return run(make_parser().parse_args(argv)) or EXIT_OK
            except ToldAlready as told:
                return told.status
            except EXPECTED as error:
                if os.environ.get("RANK", "0") != "0":
                    time.sleep(LET_FIRST_SPEAK)
                return tell(error)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                return tell(error)

        return main

    return decorate


EXPECTED = (InputError, RunError, OSError, KeyboardInterrupt)
# Seconds. What all processes of a launcher got wrong alike is told by the first, which ends the rest.
LET_FIRST_SPEAK = 3


def tell(error: BaseException) -> int:
    """Says in one line on stderr what went wrong; of a bug, its traceback. Returns the exit status."""
    status, message = EXIT_FAILED, f"error: {error}"
    if isinstance(error, InputError):
        status = EXIT_BAD_INPUT
    elif isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit doesn't try to flush
        return status
    elif isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        message = f"error: {error.strerror or error}{where}"
    elif isinstance(error, KeyboardInterrupt):
        status, message = EXIT_KEYBOARD, "interrupted"
    elif is_out_of_memory(error):
        message = (
            f"error: out of memory ({reason_of(error)}). Smaller batches take less: --tokens_per_micro_batch of "
            f"train.py, with the same result, and --batch_size of other scripts."
        )
    elif not isinstance(error, RunError):
        message = "".join(traceback.format_exception(error)).rstrip()
    print(message, file=sys.stderr)
    return status


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is about memory, of a GPU or of the machine; PyTorch and Python say so in different ways."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)


class Unbreakable:
    """A stream whose reader may go away: losing the log must not end the run."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def setup_logging(is_master: bool | None = None) -> None:
    """One line a record on stderr, above a progress bar if there is one; only warnings from the other processes.

    Where the environment names a file in DISTIL_LOG, the lines are added to that file, and only warnings are shown.

    Args:
        is_master: None: what the launcher says, if there is one.

    Raises: OSError if that file can't be written.
    """
    from tqdm import tqdm

    class AboveProgressBar(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    if not isinstance(sys.stderr, Unbreakable):
        sys.stderr = Unbreakable(sys.stderr)

    if is_master is None:
        is_master = os.environ.get("RANK", "0") == "0"
    logger.handlers[:] = [AboveProgressBar()]
    if LOG_FILE:
        logger.handlers[0].setLevel(logging.WARNING)
        logger.handlers.append(logging.FileHandler(LOG_FILE))
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.propagate = False
    logger.setLevel(logging.INFO if is_master else logging.WARNING)


def progress_bar(shown: bool = True, lines: bool = True, **options):
    """A bar on a terminal; elsewhere a line every half minute. `options` are tqdm's.

    Args:
        lines: False: nothing elsewhere, for work whose log tells how far it is.
    """
    from tqdm import tqdm

    if shown and sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, leave=False, **options)
    form = "{desc}: {percentage:.0f} %, {remaining} left" if options.get("total") else "{desc}: {n_fmt}{unit}"
    pace = {"delay": HALF_A_MINUTE, "mininterval": HALF_A_MINUTE, "maxinterval": 2 * HALF_A_MINUTE, "miniters": 1}
    return tqdm(disable=not (shown and lines), file=Lines(), bar_format=form, leave=False, **pace, **options)


HALF_A_MINUTE = 30


class Lines:
    """Where a progress bar writes, if there is no terminal to move about on: each state of it becomes a line."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


@functools.cache
def quiet_transformers() -> None:
    """Silences load reports, progress bars, and retry notes, which repeat our own messages."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def distinct_names(paths: list[str], flag: str) -> list[str]:
    """The last components of hub names or folders, by which a table tells them apart.

    Raises: InputError if two of them are the same.
    """
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"{flag}: two of them have the same name, which a table could not tell apart.")
    return names


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers, aligned to the right."""
    rows = [header, *rows]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    lines.insert(1, ["-" * first, *(f"{'-' * (width - 1)}:" for width in others)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --------------------------------------------------------------------------------------------------- seeds and signals


def set_seed(*seed: int) -> None:
    """Seeds every global generator with a mix of `seed`, so that e.g. (seed, step, rank) never collide."""
    import torch

    words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def n_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def ignore_stop_signals(*_) -> None:
    """For helper processes: a signal to the whole group must not end them before the main process does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
