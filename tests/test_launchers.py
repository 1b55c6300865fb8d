"""A launcher that starts a run again; the job script, with Slurm's commands played by small scripts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import LIMIT, _end_group
from workspace import ROOT, flags_of

from training.checkpoint import steps_of

PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


@pytest.fixture
def flags(workspace):
    return flags_of(workspace, batch_size=8)


@contextlib.contextmanager
def started(command, **options):
    process = subprocess.Popen(
        list(map(str, command)), start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        _end_group(process)


FAILING_ONCE = """
import os, pathlib, distiller, train, utils
step = distiller.Distiller.step
marker = pathlib.Path({marker!r})

def step_and_fail(self, micro_batches, counts):
    finished = step(self, micro_batches, counts)
    if self.n_done == 5 and self.world.rank == 1 and not marker.exists():
        marker.touch()
        raise utils.RunError("once.")
    return finished

distiller.Distiller.step = step_and_fail
raise SystemExit(train.main())
"""


def test_a_launcher_that_restarts_continues_the_run(workspace, tmp_path, flags):
    script = tmp_path / "failing.py"
    script.write_text(FAILING_ONCE.format(marker=str(tmp_path / "failed")))
    flags = [*flags, "--n_epoch", 1, "--gradient_accumulation_steps", 2, "--checkpoint_interval", 2]
    run = tmp_path / "run"
    command = ["torchrun", "--standalone", "--nproc_per_node", 2, "--max-restarts", 1, script, "--resume", *flags]
    environment = {**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT)}
    with started([*command, "--dump_path", run], env=environment) as launcher:
        output = launcher.communicate(timeout=LIMIT)[0]
    assert launcher.returncode == 0, output
    assert output.count("error: once.") == 1
    assert "continuing after step 4" in output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps_of(run / "checkpoints")[-1] == steps[-1]


FAKES = {  # what the job script needs of Slurm
    "srun": 'shift; echo $$ > "$FAKE/step.pid"; exec "$@"',
    "scontrol": 'case $1 in show) echo 127.0.0.1;; requeue) echo "$@" >> "$FAKE/requeued";; esac',
    "scancel": 'kill -TERM "$(cat "$FAKE/step.pid")"',
}


@pytest.fixture
def fake(tmp_path):
    """The folder of these commands."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for command, body in FAKES.items():
        write_command(folder / command, body)
    return folder


@pytest.fixture
def environment(fake):
    return {
        **os.environ, "FAKE": str(fake), "PATH": f"{fake}:{PATH}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(ROOT), "GPUS_PER_NODE": "1", "PORT": "0",
    }  # fmt: skip


def write_command(path, body):
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_the_slurm_job_saves_and_requeues_itself_when_told_to_stop(tmp_path, flags, fake, environment):
    run = tmp_path / "run"
    command = ["bash", ROOT / "scripts" / "cluster" / "train.slurm", "--dump_path", run, *flags]
    with started([*command, "--n_epoch", 300, "--log_interval", 5], env=environment) as job:
        deadline = time.monotonic() + LIMIT
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count('"train"') < 2:
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline, "no steps were done"
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        output = job.communicate(timeout=LIMIT)[0]
    assert job.returncode == 0, output
    assert "putting the job back into the queue" in output
    assert (fake / "requeued").read_text() == "requeue 7\n"
    assert f"after step {steps_of(run / 'checkpoints')[-1]}; with --resume it continues there" in output


def test_a_job_whose_training_fails_stays_ended(fake, environment):
    write_command(fake / "torchrun", "exit 1")
    with started(["bash", ROOT / "scripts" / "cluster" / "train.slurm"], env=environment) as job:
        job.communicate(timeout=LIMIT)
    assert job.returncode == 1
    assert not (fake / "requeued").exists()
