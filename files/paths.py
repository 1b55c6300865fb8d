"""Names of files and folders that a user gives: whether they can be read or written, before any work is done."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from utils import InputError


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
            problem = "is not a regular file (a pipe or a device?); copy what it gives into a file"
        else:
            problem = f"does not exist{f'; {hint}' if hint else ''}"
    except OSError as error:
        problem = f"can't be read ({error.strerror})"
    raise InputError(f"{flag} {path} {problem}.".strip())


def check_output_file(path: str | Path, flag: str) -> None:
    """Raises InputError unless a file of this name can be written. Leaves nothing behind."""
    path = Path(path)
    _check_kind(flag, path, Path.is_file, "is not a regular file; give the name of a file")
    _check_can_create(flag, path, path.absolute().parent)


def check_output_folder(path: str | Path, flag: str) -> None:
    """Raises InputError unless files can be written into a folder of this name. Leaves nothing behind."""
    path = Path(path)
    _check_kind(flag, path, Path.is_dir, "is not a folder; give the name of a folder")
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
    """Tries it in the nearest folder that exists, because permissions don't show a read-only disk or /proc."""
    try:
        nearest = next(parent for parent in (folder, *folder.parents) if parent.is_symlink() or parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as error:
        reason = error.strerror
    raise InputError(f"{flag} {path} can't be written ({reason}); choose another place.")


def check_new_folder(path: str | Path, flag: str) -> None:
    """Raises: InputError unless a folder can be made there, and nothing has that name yet."""
    check_output_folder(path, flag)
    if Path(path).exists():
        raise InputError(f"{flag} {path} exists; give a new folder, or remove this one first.")
