"""The files for schedulers and other launchers, on two machines that two processes on this one play, with exactly the
environment those give them; and what the files ask for is as it should be."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import LIMIT, _end_group
from workspace import ROOT, flags_of

from training.checkpoint import steps_of

FOLDER = ROOT / "scripts" / "cluster"
PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


TELLING = """
import json, os, sys

told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
print(json.dumps([told, sys.argv[1:]]))
"""  # in place of train.py


def skypilot(rank: int, port: int, flags: list[str], folder: Path) -> tuple[list, dict]:
    """What SkyPilot runs on a node, and with what environment."""
    environment = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_RANK": str(rank),
                   "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "PORT": str(port),
                   "FLAGS": shlex.join(flags)}  # fmt: skip
    return ["bash", "-c", load("skypilot.yaml")["run"]], environment


def trainjob(rank: int, port: int, flags: list[str], folder: Path) -> tuple[list, dict]:
    """What Kubeflow's runtime `torch-distributed` runs in a pod; torchrun reads its options from PET_..."""
    trainer = load("trainjob.yaml")["spec"]["trainer"]
    command = [word.replace("/workspace/distil", str(folder)) for word in trainer["command"]]
    kept = [word for word in trainer["args"] if "=/distil/" not in word]
    assert kept == ["--resume"]
    environment = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(rank),
                   "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}  # fmt: skip
    return [*command, *kept, *flags], environment


def accelerate(rank: int, port: int, flags: list[str]) -> tuple[list, dict]:
    launch = ["accelerate", "launch", "--config_file", FOLDER / "accelerate.yaml", "--machine_rank", rank,
              "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_processes", 2]  # fmt: skip
    return [*launch, "train.py", "--resume", *flags], {}


def outputs_of(launcher, cwd: Path, *given) -> list[str]:
    """What the two machines print, after both have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        machines = []
        for rank in (0, 1):
            command, environment = launcher(rank, port, *given)
            process = subprocess.Popen(
                list(map(str, command)), env={**os.environ, "PATH": PATH, **environment}, cwd=cwd, text=True,
                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(_end_group, process)
            machines.append(process)
        output = [machine.communicate(timeout=2 * LIMIT)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], output
    return output


@pytest.mark.parametrize("launcher", [skypilot, trainjob])
def test_each_machine_is_told_its_place(tmp_path, launcher):
    """`accelerate` below and test_launchers.py show what train.py does with it."""
    (tmp_path / "train.py").write_text(TELLING)
    output = outputs_of(launcher, tmp_path, ["--n_epoch", "1"], tmp_path)
    found = [json.loads(next(line for line in text.splitlines() if line.startswith("[{"))) for text in output]
    ranks = {(told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) for told, _ in found}
    assert ranks == {("0", "0", "2"), ("1", "0", "2")}
    assert len({(told["MASTER_ADDR"], told["MASTER_PORT"]) for told, _ in found}) == 1
    assert [flags for _, flags in found] == [["--resume", "--n_epoch", "1"]] * 2


def test_two_machines_train_together(workspace, tmp_path):
    flags = [str(flag) for flag in flags_of(workspace, dump_path=tmp_path / "run", n_epoch=1, batch_size=8)]
    output = outputs_of(accelerate, ROOT, flags)
    assert "100 batches each" in output[0], output[0]  # those of two processes
    assert len(steps_of(tmp_path / "run" / "checkpoints")) == 1
    assert "done in" in output[0] and "done in" not in output[1]


def test_every_flag_in_the_files_is_one_of_train():
    import train

    known = {option for action in train.make_parser()._actions for option in action.option_strings}
    given = [*load("trainjob.yaml")["spec"]["trainer"]["args"], *shlex.split(load("skypilot.yaml")["envs"]["FLAGS"])]
    assert {word.partition("=")[0] for word in given if word.startswith("--")} <= known
    comment = (FOLDER / "accelerate.yaml").read_text().partition("train.py ")[2].partition("\n")[0]
    assert {word for word in comment.split() if word.startswith("--")} <= known
