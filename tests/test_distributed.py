"""What the processes of a run share, and that a failure of one ends all: once told, last, and with its status."""

import os
import socket
import time

import numpy as np
import pytest
import torch
from processes import run_command, run_script, run_together
from workspace import ROOT, flags_of

from training.distributed import World, init_world

PATCHED = """
import os, signal, time, distiller, train
step = distiller.Distiller.step

def step_and_fail(self, micro_batches, counts):
    finished = step(self, micro_batches, counts)
    if self.n_done == 3 and self.world.rank == {rank}:
        {failure}
    return finished

distiller.Distiller.step = step_and_fail
raise SystemExit(train.main())
"""


@pytest.fixture
def flags(workspace, tmp_path):
    return flags_of(workspace, dump_path=tmp_path / "run", gradient_accumulation_steps=2)


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "tmp").mkdir()
    return {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}


def errors_of(results):
    return [line for result in results for line in result.stderr.splitlines() if "error: " in line.lower()]


def assert_nothing_left(tmp_path):
    assert not list((tmp_path / "tmp").glob("distil-*"))


def test_a_gpu_is_made_ready_for_batches_of_all_sizes(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is restored
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert init_world(None).device.type == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # which needs a plan for each
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
        init_world(None)
        assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_without_other_processes_nothing_is_written():
    made = {"a": np.arange(3)}
    assert World(device=None).make_once(lambda: made) is made


def test_processes_of_a_machine_share_what_is_made_once(tmp_path, environment):
    """Only the first process of a machine makes the index; its files are gone afterwards."""
    code = f"""
import numpy as np
from training.distributed import init_world
with init_world(0) as world:
    calls = []
    def make():
        calls.append(1)
        return {{"a": np.arange(1000), "empty": np.zeros(0, np.int32)}}
    arrays = world.make_once(make)
    assert arrays["a"].sum() == 499500 and len(arrays["empty"]) == 0
    open({str(tmp_path)!r} + f"/made-{{world.rank}}", "w").write(str(len(calls)))"""
    (tmp_path / "share.py").write_text(code)
    results = run_together(2, tmp_path / "share.py", **environment)
    assert [result.returncode for result in results] == [0, 0], results
    assert [(tmp_path / f"made-{rank}").read_text() for rank in (0, 1)] == ["1", "0"]
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("flag, value, message", [
    ("--data_file", "nothing.pickle", "nothing.pickle does not exist"),
    ("--temperature", "0", "--temperature: '0' is not a number"),
])  # fmt: skip
def test_what_all_got_wrong_is_told_once(tmp_path, flags, environment, flag, value, message):
    results = run_together(2, ROOT / "train.py", *flags, flag, value, **environment)
    errors = errors_of(results)
    if flag == "--temperature":  # found before the processes know of one another; a launcher ends all with the first
        errors = errors_of(results[:1])
    assert len(errors) == 1
    assert message in errors[0]
    assert [result.returncode for result in results] == [2, 2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "failure, status, message",
    [
        ("raise train.InputError('the input is wrong.')", 2, "error: the input is wrong."),
        ("raise distiller.RunError('the run is over.')", 1, "error: the run is over."),
        ("raise OSError(28, 'No space left on device', 'file')", 1, "error: No space left on device (file)"),
        ("{}['a bug']", 1, "KeyError: 'a bug'"),
    ],
)
def test_a_failure_of_one_process_ends_all(tmp_path, flags, environment, rank, failure, status, message):
    script = tmp_path / "failing.py"
    script.write_text(PATCHED.format(rank=rank, failure=failure))
    start = time.monotonic()
    results = run_together(2, script, *flags, **environment)
    assert time.monotonic() - start < 60
    assert [result.returncode for result in results] == [status, status]
    assert len(errors_of(results)) == 1, results
    assert results[rank].stderr.splitlines()[-1] == message, results
    assert "Traceback" not in results[1 - rank].stderr
    assert ("Traceback" in results[rank].stderr) == ("bug" in failure)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all(tmp_path, flags, environment, rank):
    script = tmp_path / "killed.py"
    script.write_text(PATCHED.format(rank=rank, failure="os.kill(os.getpid(), signal.SIGKILL)"))
    results = run_together(2, script, *flags, **environment)
    assert results[rank].returncode == -9
    assert results[1 - rank].returncode == 1
    assert errors_of(results)[0].startswith("error: another process of this run has ended without a message")
    assert "Traceback" not in results[1 - rank].stderr


def test_an_error_where_only_the_first_process_works_ends_all(tmp_path, flags, environment):
    """The others wait for the index meanwhile; the folder for temporary files is left empty."""
    script = tmp_path / "failing.py"
    script.write_text(
        "import lm_seqs_dataset, utils\n"
        "def fail(*_): raise utils.InputError('no index.')\n"
        "lm_seqs_dataset.index_sequences = fail\n"
        "import train; raise SystemExit(train.main())"
    )
    results = run_together(2, script, *flags, **environment)
    assert [result.returncode for result in results] == [2, 2]
    assert errors_of(results) == ["error: no index."]
    assert_nothing_left(tmp_path)


def test_under_a_launcher_the_message_comes_once(tmp_path, flags, environment):
    """The launcher adds its own report, and its own status is always 1."""
    script = tmp_path / "failing.py"
    script.write_text(PATCHED.format(rank=1, failure="raise train.InputError('the input is wrong.')"))
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", script, *flags]
    path = f"{os.path.dirname(os.sys.executable)}:{os.environ['PATH']}"
    start = time.monotonic()
    result = run_command(command, env={**os.environ, **environment, "PATH": path})
    assert time.monotonic() - start < 60
    assert result.returncode == 1
    ours = result.stderr.partition("torch/distributed/elastic")[0]
    assert ours.count("error: the input is wrong.") == result.stderr.count("the input is wrong.") == 1
    assert "Traceback" not in ours
    assert "exitcode  : 2" in result.stderr
    assert_nothing_left(tmp_path)


def test_a_port_that_is_taken_is_told(tmp_path, flags):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        result = run_script(ROOT / "train.py", *flags, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", **places)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"error: the processes could not find each other at 127.0.0.1:{places['MASTER_PORT']} (" in result.stderr


def test_deterministic_kernels_are_asked_for(tmp_path, flags):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, train\nassert train.main() == 0\nassert torch.are_deterministic_algorithms_enabled()"
    )
    result = run_script(script, *flags, "--deterministic", "--gradient_accumulation_steps", 60, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
