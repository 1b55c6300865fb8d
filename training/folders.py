"""Folders and their files that appear whole or not at all, whatever library writes them."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils import InputError, check_output_folder, fsync_folder, naming_write_errors, only_writer, unfinished


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


def check_new_folder(path: str | Path, flag: str) -> None:
    """Raises: InputError unless a folder can be made there, and nothing has that name yet."""
    check_output_folder(path, flag)
    if Path(path).exists():
        raise InputError(f"{flag} {path} exists; give a new folder, or remove this one first.")


def remove(*paths: Path) -> None:
    """Files and whole folders."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def old_folder(path: Path) -> Path:
    """Where a folder lies while another one takes its place."""
    return path.with_name(f".{path.name}.old.tmp")
