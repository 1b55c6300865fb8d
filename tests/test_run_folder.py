"""What a run leaves in its folder: what it notes of the code, and how an old run is cleared away."""

import os
import shutil

import pytest

from training.run_folder import RunFolder, check_dump_path, git_log
from utils import InputError


def test_git_log_of_a_folder_without_git_is_empty(tmp_path):
    assert set(git_log(tmp_path).values()) == {None}


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


def test_stopped_between_any_two_removals_an_old_run_can_still_be_overwritten(
    student, tokenizer, tmp_path, monkeypatch
):
    names, n_left = ("unlink", "rmdir"), 0
    plain = {name: getattr(os, name) for name in names}

    def counted(name):
        def remove(*given, **options):
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise Killed
            return plain[name](*given, **options)

        return remove

    for name in names:
        monkeypatch.setattr(os, name, counted(name))
    for n_removed in range(1000):
        n_left = 10**6
        run = tmp_path / f"run_{n_removed}"
        shutil.copytree(student, run)
        (run / "notes.txt").write_text("the user's own")
        folder = RunFolder(run, {}, tokenizer, keep_checkpoints=2)
        n_left = n_removed
        try:
            folder.start()
        except Killed:
            n_left = 10**6
            os.close(folder._lock)
            check_dump_path(run, force=True, resume=False, inputs=[])
            with pytest.raises(InputError, match="--force"):
                check_dump_path(run, force=False, resume=False, inputs=[])
            continue
        n_left = 10**6
        folder.close()
        break
    assert n_removed > 10
    assert (run / "notes.txt").read_text() == "the user's own"
    assert not (run / "checkpoints").exists() and not (run / "model.safetensors").exists()


def test_a_run_that_was_killed_at_once_leaves_a_folder_that_any_run_takes(tmp_path):
    (tmp_path / ".parameters.json.tmp").write_text("{")
    check_dump_path(tmp_path, force=False, resume=True, inputs=[])
    check_dump_path(tmp_path, force=False, resume=False, inputs=[])
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="not the output of a run"):
        check_dump_path(tmp_path, force=True, resume=False, inputs=[])


def test_a_disk_that_is_full_at_the_start_is_told_with_its_path(student, tokenizer, tmp_path, monkeypatch):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the library in Rust raises it

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/run'"):
        RunFolder(tmp_path / "run", {}, tokenizer, keep_checkpoints=1).start()
