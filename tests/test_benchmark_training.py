"""The benchmark of training compares ways to the same loss."""

import benchmark_training
import numpy as np
import pytest
import torch
from workspace import run

from models.student import build_student, half_depth_config
from training.batches import Padding, pad, prepare_batch_mlm
from training.distributed import World
from training.masking import Masking
from training.recipe import Recipe


def test_the_training_benchmark_prints_both_ways_side_by_side(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_training, "VOC_SIZE", 1100)
    tiny = benchmark_training.Case("tiny", layers=2, dim=64, batch_size=3, batches=2, grouped=True)
    monkeypatch.setitem(benchmark_training.CASES, "small", tiny)
    run(benchmark_training, "--cases", "small", "--rounds", 1, "--n_gpu", 0, "--fp32", "--techniques")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if "---" not in row[0]]
    names = [row[0].strip() for row in rows[1:]]
    assert names[:2] == ["straightforward", "ours"]
    assert len(names) == 6
    for row in rows[1:]:
        assert all(float(cell.split()[0].strip("x").replace(",", "")) > 0 for cell in row[1:5])


def test_the_benchmark_compares_ways_to_the_same_loss(tokenizer, teacher, monkeypatch):
    """Otherwise the slower one might be slow since it does something else."""
    config = half_depth_config(teacher.config)
    config.dropout = config.attention_dropout = 0.0
    student = build_student(config, None)
    masking = Masking.of_tokenizer(tokenizer, np.ones(len(tokenizer)))
    sequences = [np.arange(5, n) for n in (20, 40, 33)]
    batch = pad(prepare_batch_mlm(sequences, masking, np.random.default_rng(0)), Padding(0), True)
    device = torch.device("cpu")
    plain = benchmark_training.Straightforward(student, teacher, Recipe(), device, torch.float32)
    monkeypatch.setattr(benchmark_training, "VOC_SIZE", len(tokenizer))
    loss = plain.losses(batch).item()
    ours = benchmark_training.Ours(student, teacher, Recipe(), World(device), torch.float32)
    ours.step([batch])
    metrics, _ = ours.distiller.meter.read(1, 0.0)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
