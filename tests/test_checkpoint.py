"""Checkpoints are whole or not there, few, and damage to one leads to the one before."""

import os

import pytest
import torch

from training import checkpoint
from training.checkpoint import load_newest, save_checkpoint, steps_of
from utils import InputError


def state(step):
    return {"step": step, "student": {"weight": torch.full((100,), float(step))}}


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(tmp_path / "checkpoints", state(step), keep=2)
    return tmp_path / "checkpoints"


def test_the_newest_few_are_kept(folder):
    assert sorted(os.listdir(folder)) == ["step_10", "step_100"]
    assert load_newest(folder)["step"] == 100
    assert load_newest(folder.parent / "none") is None


def test_a_step_that_is_saved_again_replaces_itself(folder):
    save_checkpoint(folder, {**state(100), "more": 1}, keep=2)
    assert steps_of(folder) == [10, 100]
    assert load_newest(folder)["more"] == 1


DAMAGES = {
    "a flipped bit": lambda content: content[:700] + bytes([content[700] ^ 1]) + content[701:],
    "cut short": lambda content: content[:-1],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(folder, caplog, monkeypatch, damage):
    messages = []
    monkeypatch.setattr(checkpoint.logger, "warning", lambda text, *values: messages.append(text % values))
    file = folder / "step_100" / "state.pth"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert load_newest(folder)["step"] == 10
    assert len(messages) == 1
    assert f"{file} is damaged" in messages[0]
    (folder / "step_10" / "checksum.json").write_text("{")
    with pytest.raises(InputError, match="no intact checkpoint"):
        load_newest(folder)


def test_what_would_run_code_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Hostile:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    save_checkpoint(folder, {"step": 200, "student": Hostile()}, keep=3)  # its checksum is right
    assert load_newest(folder)["step"] == 100
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["rename", "fsync"])
def test_an_end_at_any_moment_leaves_an_intact_one(folder, monkeypatch, name):
    """os.rename and os.fsync are the moments at which what is on the disk changes for good."""

    class Killed(BaseException):
        pass

    real = getattr(os, name)
    for allowed in range(10):
        calls = 0

        def kill(*arguments, allowed=allowed):
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, kill)
            patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # the dead tidy nothing up
            try:
                save_checkpoint(folder, state(200), keep=2)
                died = False
            except Killed:
                died = True
        assert load_newest(folder)["step"] in (100, 200)
        if not died:
            break
        save_checkpoint(folder, state(100), keep=2)
    assert allowed > 0
    assert load_newest(folder)["step"] == 200
