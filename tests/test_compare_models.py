"""The table and the picture of a run."""

import json

import compare_models
import plot_losses
import pytest
from workspace import run, train


def test_table_and_plot_of_a_run(tmp_path, workspace, capsys):
    train(workspace, tmp_path / "student")
    run(compare_models, "--teacher", workspace / "bert-base-uncased", "--models", tmp_path / "student", "--fp32",
        "--data_file", workspace / "text.bert-base-uncased.pickle", "--output", tmp_path / "table.md")  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    teacher, student = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert (teacher[0], teacher[1], student[1]) == ("bert-base-uncased", "4", "2")
    assert (teacher[5], teacher[7]) == ("100.0 %", "1.00x")
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "valid"][-1]
    assert float(student[4]) == pytest.approx(last["mlm_loss"], abs=2e-3)  # the very same held-out text and masks
    assert student[5] == f"{100 * last['agreement']:.1f} %"

    run(plot_losses, "--runs", tmp_path / "student", "--output", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    run(plot_losses, "--runs", workspace, "--output", tmp_path / "none.png", expect=2)
    assert "is it the dump_path of a run?" in capsys.readouterr().err
