"""Services of a process: errors, the command line of a script, logging, seeds, atomic files, signals.

Imports no other file of the project.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
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
    """Ends a process whose failure has been told, by itself or by another one of its run.

    Args:
        status: what to exit with.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def why_not_loaded(name: str, error: Exception) -> str:
    """In a few words, why a hub name or folder could not be loaded."""
    if not Path(name).exists():
        return "it is no folder here, and the hub does not have it or can't be reached"
    return reason_of(error)


def reason_of(error: Exception, length: int = 160) -> str:
    """What an error of a library says, on one line and not longer than `length`."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= length else f"{text[: length - 3]}..."


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Wrong flags raise an InputError, which `command_line` shows as it shows all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; --help explains the flags.")


def make_parser(description: str, **options) -> Parser:
    """A parser that shows `description`, a script's docstring, as it is written."""
    return Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text) if len(text) < 100 else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{_shortened(text)} is no whole number from {low:,} to {high:,}")
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
            raise argparse.ArgumentTypeError(f"{_shortened(text)} is no number {bounds}")
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
    """Of a GPU or of main memory, as PyTorch and Python tell it."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)


class Unbreakable:
    """A stream whose reader may go away: a log that can't be written must not end what it tells about."""

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
    """Its load reports, bars and notes on retries repeat what our own messages say."""
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


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def ignore_stop_signals(*_) -> None:
    """For helpers of a process: a signal to the whole group must not end them before it, which ends them itself."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------- files


def check_input_file(path: str | Path, flag: str = "", hint: str = "") -> None:
    """Raises InputError unless there is a regular file to read.

    Args:
        flag: that named it.
        hint: where such a file comes from.
    """
    path = Path(path)
    try:
        if path.is_file():
            with open(path, "rb") as file:
                file.read(1)
            return
        if path.is_dir():
            problem = "is a folder; name a file in it"
        elif path.is_symlink() and not path.exists():
            problem = f"is a link to {os.readlink(path)}, which does not exist"
        elif path.exists():
            problem = "is no regular file (a pipe or a device?); copy what it gives into a file"
        else:
            problem = f"does not exist{f'; {hint}' if hint else ''}"
    except OSError as error:
        problem = f"can't be read ({error.strerror})"
    raise InputError(f"{flag} {path} {problem}.".strip())


def check_output_file(path: str | Path, flag: str) -> None:
    """Raises InputError unless a file of this name can be written. Leaves nothing behind."""
    path = Path(path)
    _check_kind(flag, path, Path.is_file, "is no regular file; give the name of a file")
    _check_can_create(flag, path, path.absolute().parent)


def check_output_folder(path: str | Path, flag: str) -> None:
    """Raises InputError unless files can be written into a folder of this name. Leaves nothing behind."""
    path = Path(path)
    _check_kind(flag, path, Path.is_dir, "is no folder; give the name of a folder")
    _check_can_create(flag, path, path.absolute())


def check_picture(path: str | Path, flag: str) -> None:
    """Raises InputError unless a picture can be written under this name."""
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"{flag} {path}: pictures are written as .png, .pdf or .svg; give such a name.")
    check_output_file(path, flag)


def _check_kind(flag: str, path: Path, is_right: Callable[[Path], bool], problem: str) -> None:
    try:
        if path.is_symlink() and not path.exists():
            problem = f"is a link to {os.readlink(path)}, which does not exist; remove it, or give another name"
        elif is_right(path) or not path.exists():
            return
        elif path.is_dir():
            problem = f"is a folder; give the name of a file, such as {path / 'name'}"
    except OSError as error:
        problem = f"can't be written ({error.strerror}); choose another place"
    raise InputError(f"{flag} {path} {problem}.")


def _check_can_create(flag: str, path: Path, folder: Path) -> None:
    """Tries it in the nearest folder that exists: permissions alone don't tell (a read-only disk, /proc)."""
    try:
        nearest = next(parent for parent in (folder, *folder.parents) if parent.is_symlink() or parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as error:
        reason = error.strerror
    raise InputError(f"{flag} {path} can't be written ({reason}); choose another place.")


@contextlib.contextmanager
def naming_write_errors(path: str | Path) -> Iterator[None]:
    """Around the writing of a library: its error for a full disk or the like becomes an OSError that names the path.

    PyTorch raises a RuntimeError with the OSError behind it, and libraries written in Rust (safetensors, tokenizers) an
    error of their own, which says "os error 28", or "Os { code: 28" in older ones.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        number = re.search(r"(?:\(os error |\bOs \{ code: )(\d+)", str(error))
        if isinstance(error, OSError):
            found = error
        elif type(error) is RuntimeError and isinstance(error.__context__, OSError):
            found = error.__context__
        elif number:
            found = OSError(int(number[1]), os.strerror(int(number[1])))
        else:
            raise
        if found.filename is None or ".tmp" in str(found.filename):  # the user knows no temporary names
            found.filename = str(path)
        raise found from None


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator:
    """A file that appears under its name whole or not at all: temporary file beside it, fsync, rename.

    Raises: OSError with the path; the file that stood under the name before is then untouched.
    """
    path = Path(path)
    temporary = unfinished(path)
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        with only_writer(temporary, path):
            try:
                with open(temporary, mode) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    fsync_folder(path.parent)


def unfinished(path: Path) -> Path:
    """Where a file or folder lies until it is whole. What a killed process left there, the next one overwrites."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def only_writer(temporary: Path, path: Path) -> Iterator[None]:
    """Locks what will have the name `path` when it is whole. Raises: InputError if another process writes it."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        lock(handle, path)
        if not (temporary.exists() and os.path.samestat(temporary.stat(), os.fstat(handle))):
            raise InputError(f"{path} has just been written by another process; call this again.")
        yield
    finally:
        os.close(handle)


def lock(handle: int, path: str | Path) -> None:
    """For as long as the handle is open. Raises: InputError if another process writes to this path."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is being written by another process; wait for it, or stop it.") from None
    except OSError as error:
        _tell_of_no_locks(str(Path(path).parent), error.strerror)


@functools.cache
def _tell_of_no_locks(folder: str, reason: str) -> None:
    """Once for each folder."""
    logger.warning("%s: no locks on this disk (%s); see that no other process writes there", folder, reason)


def fsync_folder(folder: Path) -> None:
    """Makes a rename in it outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: object) -> None:
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, default=str)
        file.write("\n")
