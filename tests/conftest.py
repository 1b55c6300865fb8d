"""What the tests share: a small text, a small vocabulary trained on it, a small BERT, all made on the spot."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder must fail at once, not after retries
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)

SUBJECTS = "the cat|a dog|my neighbour|an old sailor|the teacher|every child|the quiet river|a young queen".split("|")
VERBS = "sees|likes|follows|forgets|remembers|paints|carries|hears".split("|")
OBJECTS = "the garden|a blue boat|the long road|seven apples|an empty house|the north wind|a letter".split("|")
SPEED = ("tokens_per_second", "tflops", "mfu", "peak_memory_gib")  # what differs from run to run
ENDINGS = "in the morning|without a word|near the harbour|as in the old days|before it rains".split("|")


def make_text(n_lines: int, seed: int = 0) -> str:
    generator = np.random.default_rng(seed)
    sentence = lambda: " ".join(generator.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, ENDINGS)) + "."
    return "".join(" ".join(sentence() for _ in range(generator.integers(2, 9))) + "\n" for _ in range(n_lines))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder with dump.txt, a BERT with tokenizer in bert-base-uncased, the binarized text and its counts.

    Made once: by the process that needs it first, while the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # below it, each process has a folder of its own
    folder, done = root / "workspace", root / "workspace.done"
    with FileLock(root / "workspace.lock", timeout=50):
        if not done.exists():
            folder.mkdir()
            _make_workspace(folder)
            done.touch()
    return folder


def _make_workspace(folder: Path) -> None:
    import binarized_data
    import token_counts
    import train_vocabulary
    from transformers import BertConfig, BertForMaskedLM

    (folder / "dump.txt").write_text(make_text(300))
    teacher = str(folder / "bert-base-uncased")
    text = ("--file_path", folder / "dump.txt")
    run(train_vocabulary, *text, "--vocab_size", 160, "--output", teacher, "--max_length", 64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(_tokenizer(teacher)),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that its predictions differ from token to token
    )
    BertForMaskedLM(config).save_pretrained(teacher)
    run(binarized_data, *text, "--bert_tokenizer", teacher, "--dump_file", folder / "text")
    data = folder / "text.bert-base-uncased.pickle"
    run(token_counts, "--data_file", data, "--token_counts_dump", folder / "counts.pickle")


@pytest.fixture
def sequences():
    """Random ids, which `path` holds in one binarized file, and `two` in two."""
    from corpora import make_sequences

    return make_sequences(100)


@pytest.fixture
def path(tmp_path, sequences):
    from corpora import write

    return write(tmp_path / "text.pickle", sequences)


@pytest.fixture
def two(tmp_path, sequences):
    """The same corpus in two files, of which one is another tool's."""
    from corpora import write

    from corpus.files import open_corpus

    write(tmp_path / "part-1.pickle", sequences[:37])
    (tmp_path / "part-2.pickle").write_bytes(pickle.dumps([s.astype(np.uint16) for s in sequences[37:]]))
    return open_corpus([tmp_path / "part-*.pickle"])


@pytest.fixture
def tokenizer(workspace):
    return _tokenizer(workspace / "bert-base-uncased")


@pytest.fixture
def teacher(workspace):
    from models.loading import load_language_model

    return load_language_model(str(workspace / "bert-base-uncased"), "teacher", head_required=True).eval()


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def run(script, *arguments, expect: int = 0) -> None:
    """Calls a script's main as the shell would."""
    assert script.main([str(argument) for argument in arguments]) == expect


def train(workspace: Path, dump_path: Path, *arguments, expect: int = 0) -> None:
    """train.py on the workspace's files, small and in float32 unless the arguments say otherwise."""
    import train as train_script

    defaults = {
        "--teacher_name": workspace / "bert-base-uncased",
        "--data_file": workspace / "text.bert-base-uncased.pickle",
        "--token_counts": workspace / "counts.pickle",
        "--n_epoch": 1,
        "--gradient_accumulation_steps": 4,
        "--batch_size": 8,
        "--n_gpu": 0,
    }
    given = [str(argument) for argument in arguments]
    base = [str(part) for flag, value in defaults.items() if flag not in given for part in (flag, value)]
    precision = [] if {"--bf16", "--fp16", "--fp32"} & set(given) else ["--fp32"]
    run(train_script, "--dump_path", dump_path, *base, *precision, *given, expect=expect)
