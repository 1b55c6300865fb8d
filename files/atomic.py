"""Files and folders that appear under their names whole or not at all, whatever library writes them."""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils import InputError, RunError, logger


@contextlib.contextmanager
def naming_write_errors(path: str | Path) -> Iterator[None]:
    """Wraps a library's writing: its error for a full disk or the like becomes an OSError that names the path.

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
        if found.filename is None or ".tmp" in str(found.filename):  # users don't know our temporary names
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
    """Locks for as long as the handle is open. Raises: InputError if another process writes to this path."""
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
    """Makes a rename in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: object) -> None:
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, default=str)
        file.write("\n")


def append_json_lines(path: str | Path, *records: object) -> None:
    """Appends each record as a line, in place of a last line that a kill cut short; they are on the disk when this
    returns."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming_write_errors(Path(path)), open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


# -------------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name whole, in place of the one before it, when the block ends.

    A process that is killed between the two renames leaves the one before under the name of `old_folder`.

    Raises: OSError with the path; the folder that stood under the name before is then untouched.
    """
    with _to_fill(unfinished(path), path) as temporary:
        yield temporary
        _settle(temporary)
        shutil.rmtree(old_folder(path), ignore_errors=True)
        if path.exists():
            os.rename(path, old_folder(path))
        os.rename(temporary, path)
    shutil.rmtree(old_folder(path), ignore_errors=True)
    fsync_folder(path.parent)


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to fill, whose files take their places in `folder`, each whole, when the block ends; others stay there.

    Raises: OSError with the path; the files that stood there before are then untouched.
    """
    with _to_fill(folder / ".new.tmp", folder) as temporary:
        yield temporary
        _settle(temporary)
        for file in temporary.iterdir():
            file.replace(folder / file.name)
        temporary.rmdir()


@contextlib.contextmanager
def _to_fill(temporary: Path, path: Path) -> Iterator[Path]:
    """An empty folder, which is removed after an error; errors of writing name `path`."""
    with naming_write_errors(path):
        temporary.mkdir(parents=True, exist_ok=True)
        with only_writer(temporary, path):
            try:
                remove(*temporary.iterdir())  # what a killed process left
                yield temporary
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def _settle(temporary: Path) -> None:
    """Gives all files in a folder their permissions, and makes sure that they are on the disk."""
    for file in (path for path in temporary.rglob("*") if path.is_file()):
        file.chmod(new_file_mode())  # safetensors makes it private
        with open(file, "rb") as written:
            os.fsync(written.fileno())


def new_file_mode() -> int:
    """The permissions that the user's umask gives a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def remove(*paths: Path) -> None:
    """Files and whole folders."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def old_folder(path: Path) -> Path:
    """Where a folder lies while another one takes its place."""
    return path.with_name(f".{path.name}.old.tmp")
