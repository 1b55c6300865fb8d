"""Data flows one way: a file imports only from the rows below its own in ORDER, and within a room only from the files
named after it; `utils.py` imports no other file. (Scripts and tests may import anything, scripts from one another.)"""

import ast
import sys
from pathlib import Path

import pytest
from processes import run_command
from workspace import ROOT

ORDER = (
    "train",
    "distiller",
    "evaluation: task_card own_task breakdown layer_choice text_vectors squad task_distillation "
    "augmentation fine_tuning scores glue held_out",
    "training: configurations dry_run meter optimization objective batches masking relation_loss losses "
    "vocabulary_kernel run_folder checkpoint flags model_card recipe metrics_files distributed stop_signal",
    "lm_seqs_dataset",
    "corpus: sources vocabulary_trimming overlap word_ngrams statistics token_counts files tokenization "
    "documents parallel text_reader",
    "dataset",
    "grouped_batch_sampler",
    "models: as_bert trimming narrowing student flops loading memory language_model packing sentence_encoder families",
    "files: json_reader plain_pickle paths atomic",
    "utils",
)
ROOMS = {room: files.split() for room, _, files in (row.partition(": ") for row in ORDER)}
MODULES = [f"{room}.{file}" if files else room for room, files in ROOMS.items() for file in files or [room]]


def imported_modules(source: str) -> set[str]:
    """The project's modules that a file imports, wherever in it. A room alone stands for its `__init__`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = set()
    for name in names:
        parts = name.split(".")
        known |= {".".join(parts[:n]) for n in (1, 2) if ".".join(parts[:n]) in MODULES}
    return known


def violations(module: str, source: str) -> set[str]:
    """What the file imports of the files above it, or of itself."""
    return {name for name in imported_modules(source) if MODULES.index(name) <= MODULES.index(module)}


def path_of(module: str) -> Path:
    return (ROOT / module.replace(".", "/")).with_suffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_stands_below_it(module):
    assert violations(module, path_of(module).read_text()) == set()


def test_every_file_has_its_place():
    rooms = [path for path in ROOT.iterdir() if (path / "__init__.py").is_file()]
    files = [*ROOT.glob("*.py"), *(file for room in rooms for file in room.glob("*.py"))]
    assert {path_of(module) for module in MODULES} == {file for file in files if file.name != "__init__.py"}


@pytest.mark.parametrize(
    "module, line",
    [
        ("training.dry_run", "from distiller import Distiller"),
        ("training.batches", "import train"),
        ("models.loading", "from models import student"),
        ("models.loading", "from models.student import build_student"),
        ("corpus.files", "def f():\n    from training.batches import pad"),
        ("utils", "from dataset import head"),
        ("dataset", "import lm_seqs_dataset as l"),
    ],
)
def test_a_planted_wrong_import_is_found(module, line):
    assert violations(module, path_of(module).read_text() + f"\n{line}\n")


def test_what_only_reads_files_starts_without_torch():
    """Tools that only read files must start fast."""
    light = [
        module
        for module in MODULES
        if module.startswith("corpus.") or module in ("training.recipe", "training.masking")
    ]
    light += ["dataset", "lm_seqs_dataset", "grouped_batch_sampler", "files.json_reader", "utils"]
    code = f"import sys, {', '.join(light)}; assert 'torch' not in sys.modules"
    assert run_command([sys.executable, "-c", code], cwd=ROOT).returncode == 0
