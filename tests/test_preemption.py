"""Signals as schedulers, launchers and terminals really send them: the state is saved, and the status says so."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import LIMIT, _end_group, running
from workspace import ROOT, flags_of, rows_of

from evaluation import held_out
from training import stop_signal
from training.checkpoint import steps_of

SLOW = """
import time, train
from training.objective import Objective
loss = Objective.__call__

def slowly(self, *arguments):
    time.sleep({seconds})
    return loss(self, *arguments)

Objective.__call__ = slowly
raise SystemExit(train.main())
"""


@pytest.fixture
def flags(workspace, tmp_path):
    return flags_of(
        workspace, dump_path=tmp_path / "run", batch_size=2, gradient_accumulation_steps=1, n_epoch=1000, log_interval=1
    )


def wait_for_steps(folder, n=3):
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_text().count('"train"') < n:
        assert time.monotonic() < deadline, "no steps were done"
        time.sleep(0.02)


@pytest.mark.parametrize("name, workers", [("SIGTERM", 2), ("SIGUSR1", 0), ("SIGHUP", 0), ("SIGINT", 2)])
def test_a_signal_to_the_whole_group_saves(tmp_path, flags, name, workers):
    with running(ROOT / "train.py", *flags, "--num_workers", workers) as training:
        wait_for_steps(tmp_path)
        os.killpg(training.process.pid, signal.Signals[name])
        result = training.result()
    assert result.returncode == 75, result.stderr
    assert f"stopped by {name} after step" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert len(steps_of(tmp_path / "run" / "checkpoints")) == 1


def test_more_signals_do_not_lose_the_save(tmp_path, flags):
    with running(ROOT / "train.py", *flags) as training:
        wait_for_steps(tmp_path)
        while training.is_running and not (tmp_path / "run" / "checkpoint.pth").exists():
            os.killpg(training.process.pid, signal.SIGTERM)
            time.sleep(0.001)
        result = training.result()
    assert result.returncode == 75, result.stderr
    assert len(steps_of(tmp_path / "run" / "checkpoints")) == 1


def test_a_step_that_takes_too_long_is_dropped(tmp_path, flags):
    """Its first half is lost, the boundary before it is saved."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(seconds=0.7))
    flags = [*flags, "--gradient_accumulation_steps", 40, "--tokens_per_micro_batch", 0]  # 28 s a step
    with running(script, *flags, PYTHONPATH=str(ROOT)) as training:
        deadline = time.monotonic() + LIMIT
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2)
        start = time.monotonic()
        os.killpg(training.process.pid, signal.SIGTERM)
        result = training.result()
    assert result.returncode == 75, result.stderr
    assert time.monotonic() - start < 20
    assert "stopped by SIGTERM after step 0" in result.stderr
    assert steps_of(tmp_path / "run" / "checkpoints") == [0]


def test_an_evaluation_that_takes_too_long_is_made_up_for_later(tmp_path, workspace, flags, monkeypatch):
    """Dropped in the middle of the run and at its end; the metrics are those of a run that was not stopped."""
    flags = [*flags, "--n_epoch", 1, "--eval_interval", 10, "--batch_size", 8]
    train_script = importlib.import_module("train")
    whole = [str(flag) for flag in [*flags, "--dump_path", tmp_path / "whole"]]
    assert train_script.main(whole) == 0
    evaluate = held_out.evaluate_all
    hurries = []

    def hurry(*arguments):
        """A signal comes in each evaluation but the first, and its time is up at once."""
        hurries.append(1)
        if len(hurries) in (2, 4, 6):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(stop_signal, "STEP_SECONDS", -1)
    monkeypatch.setattr(held_out, "evaluate_all", hurry)
    again = [str(flag) for flag in [*flags, "--resume"]]
    assert [train_script.main(again) for _ in range(4)] == [75, 75, 75, 0]
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    last = rows_of(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "README.md").read_text().count(f"| step {last} |") == 1


def test_a_log_that_nobody_reads_does_not_end_training(tmp_path, flags):
    """As in `train.py ... 2>&1 | head -3`."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    reader = subprocess.Popen(["head", "-3"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    training = subprocess.Popen(command, stdout=reader.stdin, stderr=reader.stdin, start_new_session=True)
    reader.stdin.close()
    try:
        reader.wait(40)
        wait_for_steps(tmp_path, 30)  # all of them after the reader was gone
        training.send_signal(signal.SIGTERM)
        assert training.wait(20) == 75
    finally:
        _end_group(training)
        _end_group(reader)
    assert len(steps_of(tmp_path / "run" / "checkpoints")) == 1


def test_a_terminal_that_goes_away_saves(tmp_path, flags):
    """The kernel sends SIGHUP, and whatever is written then fails."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *map(str, flags)])
    try:
        import threading

        def read():
            try:
                while os.read(terminal, 4096):
                    pass
            except OSError:
                pass

        threading.Thread(target=read, daemon=True).start()
        wait_for_steps(tmp_path)
        os.close(terminal)
        deadline, ended = time.monotonic() + LIMIT, (0, 0)
        while not ended[0] and time.monotonic() < deadline:
            ended = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)
    finally:
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 75
    assert len(steps_of(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_under_a_launcher_a_signal_saves_and_leaves_no_orphan(tmp_path, flags, name):
    """The launcher passes SIGTERM on; of SIGUSR1, unless told to pass it on, it dies, and its processes notice."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", ROOT / "train.py", *flags]
    launcher = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "PATH": path}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes = []
    try:
        import psutil

        wait_for_steps(tmp_path)
        processes = psutil.Process(launcher.pid).children(recursive=True)
        start = time.monotonic()
        launcher.send_signal(signal.Signals[name])
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive
        assert time.monotonic() - start < 20
    finally:
        _end_group(launcher)
        for process in processes:
            if process.is_running():
                process.kill()
    assert len(steps_of(tmp_path / "run" / "checkpoints")) == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == steps_of(tmp_path / "run" / "checkpoints")[0]
