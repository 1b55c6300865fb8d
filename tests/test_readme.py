"""The README's commands, run as they are printed, in a folder with a small `bert-base-uncased`."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    ((?:python|torchrun|bash|pip) .*)$", README, re.MULTILINE)
INSTALLING = [command for command in COMMANDS if command.startswith(("bash scripts/", "pip install -r"))]
RUNNABLE = [command for command in COMMANDS if command not in INSTALLING]


@pytest.fixture(scope="module")
def clone(workspace, tmp_path_factory):
    """The repository's files, and what a user would have beside them: the model and a text."""
    folder = tmp_path_factory.mktemp("clone") / "distil"
    tracked = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.suffix in (".py", "")]
    folder.mkdir()
    for path in tracked:
        if path.name in ("scripts", "training_configs"):
            shutil.copytree(path, folder / path.name)
        elif path.suffix == ".py":
            shutil.copy(path, folder)
    shutil.copytree(workspace / "bert-base-uncased", folder / "bert-base-uncased")
    return folder


def test_the_set_up_commands_are_printed_and_exist():
    assert [re.sub(" +#.*", "", command) for command in INSTALLING] == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
        "pip install -r requirements.txt",
    ]


def test_every_command_runs_as_printed(clone, workspace):
    assert len(RUNNABLE) >= 8
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for command in RUNNABLE:
        if "torchrun --nproc_per_node 4" in command and (os.cpu_count() or 1) < 4:
            command = command.replace("--nproc_per_node 4", "--nproc_per_node 2")
        command = command.replace("200 2000", "1").replace("50000000", "10000")  # sizes of the benchmark
        command = command.replace("benchmark_training.py", "benchmark_training.py --cases tiny")
        result = subprocess.run(command, shell=True, cwd=clone, env=env, capture_output=True, text=True, timeout=300)
        if "corpus_doctor.py" in command:  # this teacher has learnt nothing, and that is to be found out
            assert result.returncode == 1
            assert result.stdout.count("problem: ") == result.stdout.count("worse than a guess by frequency") == 1
            continue
        assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
        if "make_dump.py" in command:  # a smaller text from here on
            shutil.copy(workspace / "dump.txt", clone / "data" / "dump.txt")
    for run in ("my_first_training", "my_second_training", "my_third_training"):
        assert (clone / "serialization_dir" / run / "model.safetensors").is_file()
    whole = (clone / "data" / "binarized_text.bert-base-uncased.pickle").read_bytes()
    assert (clone / "data" / "merged_text.pickle").read_bytes() == whole


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"\b(?:scripts|training_configs|tests)/[\w./-]+\.\w+", README):
        assert (ROOT / name).exists(), name


def test_every_flag_that_the_readme_names_is_known():
    import train

    known = {option for action in train.make_parser("")._actions for option in action.option_strings}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', script.read_text()))
    for command in RUNNABLE:  # flags of the launchers: the test above has run them
        if "torchrun" in command:
            known |= set(re.findall(r" (--[\w-]+)", command.partition("train.py")[0]))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", README)) <= known | {"--no"}
