"""The commands of README and docs, run as they are printed and in their order, in a folder with a small
`bert-base-uncased`; and the files and flags that they name."""

import ast
import os
import re
import shlex
import shutil
import sys

import pytest
import torch
from glue_files import write_task
from processes import run_command, run_script, run_together
from squad_files import write_squad
from workspace import ROOT

README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README} | {f"docs/{file.name}": file.read_text() for file in sorted(ROOT.glob("docs/*.md"))}
ALL = "\n".join(TEXTS.values())
# A command, with the line before it if that sets its environment.
COMMANDS = re.findall(r"^    ((?:export .*\n    )?(?:python|torchrun|bash|pip) .*)$", ALL, re.MULTILINE)
INSTALLING = [command for command in COMMANDS if command.startswith(("bash scripts/", "pip install -r"))]
ELSEWHERE = "python scripts/cluster/prepare.py"  # needs datatrove: tests/clients runs it
RUNNABLE = [command for command in COMMANDS if command not in INSTALLING and not command.startswith(ELSEWHERE)]
SMALLER = {  # sizes that would take minutes
    "--max_megabytes 6": "--max_megabytes 0.3 --num_workers 0",
    "--choose_layers": "--choose_layers --n_sequences 5",
    "--dim 384": "--dim 16 --n_sequences 5",
    "--tasks CoLA STS-B RTE": "--tasks CoLA --seeds 1",
    "squad_w_distillation.py": "squad_w_distillation.py --max_seq_length 40 --doc_stride 8 --max_query_length 16",
    "demo.py --models bert-base-uncased": "demo.py --cdn --models",
    "benchmark_inference.py": "benchmark_inference.py --forms float32 --max_examples 4 --turns 1",
    "ablation.py": "ablation.py --rows all no_ce",
    "--kills 20": "--kills 1",
    "--dump_path serialization_dir/my_first_distillation": "--n_epoch 1 --dump_path "
    "serialization_dir/my_first_distillation",
    "--dump_path serialization_dir/two_texts": "--n_epoch 1 --dump_path serialization_dir/two_texts",
    "benchmark_training.py": "benchmark_training.py --cases tiny",
    "benchmark_scaling.py --processes 1 2": "benchmark_scaling.py --processes 1 --tiny",
    "benchmark_gpu.py": "benchmark_gpu.py --tiny --parts ceilings --output gpu.md",
    "--growth_megabytes 100 1000 --set_up_sequences 50000000": "--growth_megabytes 1 --open_sequences 3000 "
    "--set_up_sequences 10000",
}
if (os.cpu_count() or 1) < 4:
    SMALLER |= {"--nproc_per_node 4": "--nproc_per_node 2", "N_GPU_NODE=4 WORLD_SIZE=4": "N_GPU_NODE=2 WORLD_SIZE=2"}
if torch.cuda.device_count() < 4:
    SMALLER |= {"--n_gpu $WORLD_SIZE": "--n_gpu 0", "my_second_training --data": "my_second_training --n_gpu 0 --data"}


@pytest.fixture(scope="module")
def clone(workspace, tmp_path_factory):
    """The repository's files, and what a user would have beside them: the model and a text."""
    folder = tmp_path_factory.mktemp("clone") / "distil"
    left_out = shutil.ignore_patterns(".*", "work", "data", "serialization_dir", "__pycache__", "bert-base-*")
    shutil.copytree(ROOT, folder, ignore=left_out)
    shutil.copytree(workspace / "bert-base-uncased", folder / "bert-base-uncased")
    make_evaluation_sets(folder)
    return folder


def make_evaluation_sets(folder):
    """Small files in the formats of GLUE and SQuAD."""
    for task in ("CoLA", "STS-B", "RTE"):
        write_task(folder / "glue", task)
    (folder / "my_task").mkdir()
    for name in ("train", "dev"):
        rows = ["text\tlabel", *("the cat sees the garden\tgood", "a dog follows the road\tbad") * 8]
        (folder / "my_task" / f"{name}.tsv").write_text("\n".join(rows))
    (folder / "squad").mkdir()
    for name in ("train", "dev"):
        write_squad(folder / "squad" / f"{name}-v1.1.json", 12)


def test_the_set_up_commands_are_printed_and_exist():
    assert [re.sub(" +#.*", "", command) for command in INSTALLING] == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
        "pip install -r requirements.txt -c constraints.txt",
    ]


def run_in_place(command, clone):
    """Starts scripts from the server that has imported torch, and torchrun's processes too: `test_launchers.py` starts
    torchrun itself."""
    if command.startswith("torchrun --nproc_per_node "):
        _, _, n, script, *arguments = shlex.split(command)
        return max(run_together(int(n), clone / script, *arguments, cwd=clone), key=lambda result: result.returncode)
    if not command.startswith(("python scripts/", "python train.py")):
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        return run_command(command, cwd=clone, env={**os.environ, "PATH": path})
    script, *arguments = shlex.split(command)[1:]
    return run_script(clone / script, *arguments, cwd=clone)


@pytest.mark.parametrize("command", RUNNABLE, ids=range(len(RUNNABLE)))
def test_every_command_runs_as_printed(clone, workspace, command):
    for printed, smaller in SMALLER.items():
        command = command.replace(printed, smaller)
    result = run_in_place(command, clone)
    if "corpus_doctor.py" in command and "--teacher_name" in command:  # it has learned nothing; that is to be found
        assert result.returncode == 1, result.stderr
        assert result.stdout.count("problem: ") == result.stdout.count("worse than a guess by frequency") == 1
        return
    assert result.returncode == 0, result.stderr
    if "make_dump.py" in command:  # a smaller text from here on
        shutil.copy(workspace / "dump.txt", clone / "data" / "dump.txt")


def test_what_the_commands_have_left(clone):
    for run in ("my_first_training", "my_second_training", "my_first_distillation"):
        assert (clone / "serialization_dir" / run / "model.safetensors").is_file()
    whole = (clone / "data" / "binarized_text.bert-base-uncased.pickle").read_bytes()
    assert (clone / "data" / "merged_text.pickle").read_bytes() == whole


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_that_is_named_exists(text):
    for name in re.findall(r"\b(?:scripts|training_configs|tests|docs|models)/[\w./-]+\.\w+", TEXTS[text]):
        assert (ROOT / name).exists(), name
    for name, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXTS[text]):
        file = (ROOT / text).parent.joinpath(name) if name else ROOT / text
        assert file.exists(), name
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings], heading


def test_the_tree_has_every_room_and_each_file_says_what_it_is_for():
    tree = re.search(r"## The repository\n(.*?)\n## ", README, re.DOTALL)[1]
    rooms = [folder for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()]
    for name in [f"{room.name}/" for room in rooms] + [file.name for file in ROOT.glob("*.py")]:
        assert name in tree
    for file in [*ROOT.glob("*.py"), *(file for room in [*rooms, ROOT / "scripts"] for file in room.glob("*.py"))]:
        assert ast.get_docstring(ast.parse(file.read_text())), file
    for file in [*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/cluster/*[!y]")]:
        assert any(line.startswith("# ") for line in file.read_text().splitlines()[:2]), file


def test_every_flag_that_is_named_is_known():
    import train

    known = {option for action in train.make_parser()._actions for option in action.option_strings}
    files = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("evaluation/*.py"), ROOT / "tests" / "kill_and_resume.py"]
    for script in files:
        known |= set(re.findall(r'add(?:_argument)?\(\s*"(--\w+)"', script.read_text()))
    for command in RUNNABLE:  # flags of the launchers: the test above has run them
        if "torchrun" in command or "torch.distributed" in command:
            known |= set(re.findall(r" (--[\w-]+)", command.partition("train.py")[0]))
    of_others = {"--no", "--help", "--clients", "--exclude", "--directory", "--env", "--filename"}  # test.sh, hf, ...
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", ALL)) <= known | of_others
