"""A small text, a small vocabulary trained on it, a small BERT, and calls of the scripts on them.

Needs nothing but what the scripts need, so that `kill_and_resume.py` runs without the tests' own packages.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

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


def make_workspace(folder: Path) -> None:
    import binarized_data
    import token_counts
    import train_vocabulary
    from transformers import BertConfig, BertForMaskedLM

    (folder / "dump.txt").write_text(make_text(170))
    teacher = str(folder / "bert-base-uncased")
    text = ("--file_path", folder / "dump.txt")
    run(train_vocabulary, *text, "--vocab_size", 160, "--output", teacher, "--max_length", 64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(load_tokenizer(teacher)),
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


def load_tokenizer(folder):
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


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pth", weights_only=True)


def rows_of(run: Path) -> list[dict]:
    """All metrics but those of speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in SPEED} for row in rows]


def flags_of(workspace: Path, **more) -> list[str]:
    """Flags of train.py on the workspace's files, on the CPU in float32; `more` are further ones, by name."""
    flags = {
        "data_file": workspace / "text.bert-base-uncased.pickle",
        "token_counts": workspace / "counts.pickle",
        "teacher_name": workspace / "bert-base-uncased",
        "n_gpu": 0,
        **more,
    }
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)] + ["--fp32"]
