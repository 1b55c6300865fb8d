"""The table and the picture of a run."""

import json
import re
import shutil

import compare_models
import numpy as np
import plot_losses
import pytest
from workspace import run, train


def test_table_and_plot_of_a_run(tmp_path, workspace, capsys):
    train(workspace, tmp_path / "student")
    models = (tmp_path / "student", workspace / "bert-base-uncased")
    run(compare_models, "--teacher", workspace / "bert-base-uncased", "--models", *models, "--fp32", "--n_gpu", 0,
        "--data_file", workspace / "text.bert-base-uncased.pickle", "--output", tmp_path / "table.md")  # fmt: skip
    report = (tmp_path / "table.md").read_text()
    assert report in capsys.readouterr().out
    table = report.split("\n\n")[0]
    teacher, student, itself = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert (teacher[0], teacher[1], student[1]) == ("bert-base-uncased", "4", "2")
    assert (teacher[5], teacher[7]) == ("100.0 %", "1.00x")
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "valid"][-1]
    assert float(student[4]) == pytest.approx(last["mlm_loss"], abs=2e-3)  # the very same held-out text and masks
    assert student[5] == f"{100 * last['agreement']:.1f} %"
    assert itself[4:6] == teacher[4:6]
    found = re.search(r"words: loss (\S+) ± \S+, as teacher (\S+) ± \S+ points", " ".join(report.split()))
    loss, points = found.groups()
    assert float(loss) == pytest.approx(float(student[4]) - float(teacher[4]), abs=2e-3)
    assert float(points) == pytest.approx(100 * last["agreement"] - 100, abs=0.1)

    run(compare_models, "--teacher", workspace / "bert-base-uncased", "--models", tmp_path / "student", "--fp32",
        "--data_file", workspace / "text.bert-base-uncased.pickle", "--token_counts", workspace / "counts.pickle",
        "--n_gpu", 0, "--turns", 1)  # fmt: skip
    line = capsys.readouterr().out.splitlines()[3]
    assert float(line.split("|")[5]) == pytest.approx(last["training_masks_mlm_loss"], abs=2e-3)

    odd = tmp_path / r"_$\frac{$"
    shutil.copytree(tmp_path / "student", odd)
    run(plot_losses, "--runs", tmp_path / "student", odd, "--output", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    run(plot_losses, "--runs", workspace, "--output", tmp_path / "none.png", expect=2)
    assert "give the dump_path of a run" in capsys.readouterr().err


def test_a_launcher_is_refused(workspace, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(compare_models, "--teacher", workspace / "bert-base-uncased", "--models", workspace / "bert-base-uncased",
        "--data_file", workspace / "text.bert-base-uncased.pickle", expect=2)  # fmt: skip
    assert "start it with python, without a launcher" in capsys.readouterr().err


def test_the_error_is_that_of_the_paired_difference():
    rng = np.random.default_rng(0)
    hard = rng.normal(5, 3, 10_000)
    a, b = ({"name": name, "labels": {"loss": hard + rng.normal(shift, 0.1, 10_000), "agreement": 1.0 * (hard > 5)}}
            for name, shift in (("a", 0), ("b", 0.02)))  # fmt: skip
    text = compare_models.difference(a, b)
    loss, error = map(float, re.search(r"loss ([+-][\d.]+) ± ([\d.]+)", text).groups())
    assert loss == pytest.approx(-0.02, abs=3 * error)
    assert error == pytest.approx(0.1 * 2**0.5 / 100, rel=0.1)
    assert "10,000 masked words" in text
    assert "as teacher +0 ± 0 points" in text
