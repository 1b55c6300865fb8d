import argparse
import os
import stat
import time

import numpy as np
import pytest
import torch
from processes import run_script
from workspace import ROOT

import utils
from files.atomic import atomic_write
from utils import InputError, RunError, command_line


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (InputError("the flag"), utils.EXIT_BAD_INPUT, "error: the flag"),
        (RunError("the run"), utils.EXIT_FAILED, "error: the run"),
        (
            PermissionError(13, "Permission denied", "some/file"),
            utils.EXIT_FAILED,
            "error: Permission denied (some/file)",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_expected_errors_are_one_line_and_a_status(capsys, error, status, message):
    @command_line(argparse.ArgumentParser)
    def main(args):
        raise error

    assert main([]) == status
    assert capsys.readouterr().err.strip() == message


def full_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("take", [full_gpu, lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)])
def test_a_full_memory_is_told_with_a_way_out(capsys, take):
    @command_line(argparse.ArgumentParser)
    def main(args):
        take()

    assert main([]) == utils.EXIT_FAILED
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory (") and "--tokens_per_micro_batch" in told and told.count("\n") == 1


@pytest.mark.parametrize("bug", [ZeroDivisionError, RuntimeError])
def test_bugs_keep_their_traceback(bug):
    @command_line(argparse.ArgumentParser)
    def main(args):
        raise bug

    with pytest.raises(bug):
        main([])


def test_seeds_that_differ_in_one_part_differ():
    import torch

    drawn = set()
    for seed in ((1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2)):
        utils.set_seed(*seed)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 4


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(utils, "HALF_A_MINUTE", 0.01)
    with utils.progress_bar(desc="reading", total=4) as bar:
        for _ in range(3):
            time.sleep(0.02)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["reading: 25 %", "reading: 50 %", "reading: 75 %"]
    monkeypatch.setattr(utils, "HALF_A_MINUTE", 30)
    with utils.progress_bar(desc="reading", total=4) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""


def test_messages_go_to_a_file_and_warnings_stay(tmp_path, workspace):
    counts = ["--data_file", workspace / "text.bert-base-uncased.pickle", "--token_counts_dump", tmp_path / "c.pickle"]
    script = ROOT / "scripts" / "token_counts.py"
    result = run_script(script, *counts, DISTIL_LOG=str(tmp_path / "log.txt"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert "entries occur" in (tmp_path / "log.txt").read_text()
    result = run_script(script, *counts, DISTIL_LOG=str(tmp_path / "none" / "log.txt"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: No such file or directory")
