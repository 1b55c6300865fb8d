"""What can't be written whole is not there, and the error names it."""

import errno
import fcntl
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from files.atomic import atomic_folder, atomic_write, replacing_files
from utils import InputError, logger


@pytest.fixture
def small_files_only():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_a_library_can_not_write_is_told_with_the_path(tmp_path, small_files_only):
    for name in ("folder", "files"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "before").write_text("whole")
    values = {"a": torch.zeros(1000)}
    with pytest.raises(OSError, match=r"File too large: '.*/file'"), atomic_write(tmp_path / "file") as file:
        torch.save(values, file)
    with pytest.raises(OSError, match=r"File too large: '.*/folder'"), atomic_folder(tmp_path / "folder") as folder:
        safetensors.torch.save_file(values, folder / "before")
    with pytest.raises(OSError, match=r"File too large: '.*/files'"), replacing_files(tmp_path / "files") as folder:
        Tokenizer(WordLevel({str(i): i for i in range(1000)}, "0")).save(str(folder / "before"))
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"before": "whole"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "folder"]


def test_an_error_that_is_none_of_writing_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), replacing_files(tmp_path / "files") as folder:
        (folder / "new").write_text("")
        raise RuntimeError("a bug")
    assert not list((tmp_path / "files").iterdir())


def test_what_the_user_got_wrong_is_told_as_it_is(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"), atomic_folder(tmp_path / "new" / "folder"):
        raise InputError("no tokenizer in x (No such file or directory (os error 2))")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("left", [".file.tmp", ".folder.tmp", "files/.new.tmp"])
def test_what_a_killed_process_left_is_overwritten_and_a_living_one_is_left_alone(tmp_path, left):
    makers = {".file.tmp": atomic_write, ".folder.tmp": atomic_folder, "files/.new.tmp": replacing_files}
    path = tmp_path / {".file.tmp": "file", ".folder.tmp": "folder", "files/.new.tmp": "files"}[left]
    if left == ".file.tmp":
        (tmp_path / left).write_text("half of somethi")
    else:
        (tmp_path / left / "more").mkdir(parents=True)
        (tmp_path / left / "more" / "half").write_text("x")
    with makers[left](path) as place:
        with pytest.raises(InputError, match="is being written by another process"), makers[left](path):
            pass
        if left == ".file.tmp":
            place.write(b"whole")
        else:
            (place / "whole").write_text("whole")
    files = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"file" if left == ".file.tmp" else f"{path.name}/whole": "whole"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_disk_without_locks_is_told_once(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: messages.append(text % values))

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for name in "abc":
        with atomic_write(tmp_path / name) as file:
            file.write(b"x")
    told = "no locks on this disk (No locks available); see that no other process writes there"
    assert messages == [f"{tmp_path}: {told}"]


def test_no_error_names_a_temporary_file(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match=r"No space left on device: '[^']*/file'"), atomic_write(tmp_path / "file"):
        pass
