"""Measures how long a checkpoint stops a training, for a student of BERT-base's shape at half the depth.

    python scripts/benchmark_checkpoint.py --work_dir work

Weights and the optimizer's state are random, which the time does not depend on. Everything is written below --work_dir,
and removed; what counts is the disk that this folder lies on. The default interval between checkpoints is 15 minutes.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from distiller import CHECKPOINT_SECONDS
from files.paths import check_output_folder
from models.student import build_student, half_depth_config
from training.checkpoint import load_newest
from training.recipe import Recipe
from training.run_folder import CHECKPOINTS, RunFolder
from utils import integer, path


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--work_dir", type=path, default="work", help="where to write (%(default)s)")
    parser.add_argument("--turns", type=integer(1, 100), default=3, help="(%(default)s)")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_output_folder(args.work_dir, "--work_dir")
    utils.quiet_transformers()
    print(measure(args.work_dir, args.turns))


def measure(work_dir: str, turns: int) -> str:
    """The table of what was measured."""
    student = build_student(half_depth_config(BertConfig()), None)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"step": 0, "student": student.state_dict(), "optimization": {"optimizer": optimizer.state_dict()}}
    parameters = {**vars(Recipe()), "teacher_name": None, "data_file": ["text"], "command": "benchmark"}
    tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        folder = RunFolder(name, parameters, tokenizer, Recipe.keep_checkpoints)
        folder.start()
        seconds = [seconds_of(lambda: save(folder, student, state)) for _ in range(turns)]
        loading = seconds_of(lambda: load_newest(Path(name) / CHECKPOINTS))
        size = sum(file.stat().st_size for file in (Path(name) / CHECKPOINTS / f"step_{state['step']}").iterdir())
        folder.close()
    worst = max(seconds)
    rows = [
        ["parameters", f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} M"],
        ["a checkpoint", f"{size / 1e6:,.0f} MB"],
        ["a save: model, card, checkpoint", f"{min(seconds):.2f} to {worst:.2f} s"],
        ["share of the default interval", f"{100 * worst / CHECKPOINT_SECONDS:.2f} %"],
        ["loading it, verified", f"{loading:.2f} s"],
    ]
    return utils.markdown_table(["what", "measured"], rows)


def save(folder: RunFolder, student, state: dict) -> None:
    state["step"] += 1
    folder.save(student, state, None)


def seconds_of(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
