"""Folders and their files that appear whole or not at all, whatever library writes them."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils import fsync_folder, naming_write_errors, new_file_mode, new_folder_mode


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name whole, in place of the one before it, when the block ends.

    A process that is killed between the two renames leaves the one before under the name of `old_folder`.

    Raises: OSError with the path; the folder that stood under the name before is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=path.parent))
    try:
        with naming_write_errors(path):
            yield temporary
            for file in (path for path in temporary.rglob("*") if path.is_file()):
                file.chmod(new_file_mode())  # safetensors makes it private
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        temporary.chmod(new_folder_mode())  # mkdtemp makes it private
        shutil.rmtree(old_folder(path), ignore_errors=True)
        if path.exists():
            os.rename(path, old_folder(path))
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old_folder(path), ignore_errors=True)
    fsync_folder(path.parent)


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to fill, whose files take their places in `folder`, each whole, when the block ends; others stay there.

    Raises: OSError with the path; the files that stood there before are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as temporary:
        with naming_write_errors(folder):
            yield Path(temporary)
        for file in Path(temporary).iterdir():
            file.chmod(new_file_mode())  # safetensors makes it private
            file.replace(folder / file.name)


def old_folder(path: Path) -> Path:
    """Where a folder lies while another one takes its place."""
    return path.with_name(f".{path.name}.old.tmp")
