"""The file of scores survives a kill, and the table says what stands in it."""

import pytest

from evaluation import scores
from files.atomic import append_json_lines
from utils import InputError


def row(model, task, seed, value, weights=1, **more):
    return {"model": model, "task": task, "seed": seed, "weights": weights, "metrics": {"score": value}, **more}


ROWS = [
    *(row("teacher", "CoLA", seed, value) for seed, value in ((1, 50.0), (2, 40.0), (3, 60.0))),
    *(row("student", "CoLA", seed, value) for seed, value in ((1, 30.0), (2, 40.0), (3, 41.0))),
    row("teacher", "RTE", 1, 70.0),
    row("student", "RTE", 1, 63.0),
    row("teacher", "MRPC", 1, 80.0),
    row("student", "MRPC", 1, 72.0),
    row("teacher", "SST-2", 1, 90.0),
]


def cells(table):
    return {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in table.splitlines()
        if "|" in line
    }


def test_the_table_shows_medians_and_what_is_kept():
    table = cells(scores.table(ROWS, ["teacher", "student"]))
    assert table["CoLA"] == ["50.0 [40.0, 60.0]", "40.0 [30.0, 41.0]"]
    assert table["RTE"] == ["70.0", "63.0"]
    assert table["SST-2"] == ["90.0", "-"]  # of one model only, so in no average
    assert table["macro over 3"] == ["66.7 (100.0 %)", "58.3 (87.5 %)"]
    assert table["macro without CoLA"] == ["75.0 (100.0 %)", "67.5 (90.0 %)"]


def test_one_task_is_no_average():
    rows = [row for row in ROWS if row["task"] != "MRPC"]
    assert [name for name in cells(scores.table(rows, ["teacher", "student"])) if "macro" in name] == ["macro over 2"]


def test_a_share_of_nothing_is_not_shown():
    rows = [row(model, task, 1, 0.0) for model in ("teacher", "student") for task in ("CoLA", "STS-B")]
    assert cells(scores.table(rows, ["teacher", "student"]))["macro over 2"] == ["0.0", "0.0"]
    assert scores.kept(rows, "teacher", "student") is None
    assert scores.kept(ROWS, "teacher", "student") == pytest.approx(100 * (40 + 72 + 63) / (50 + 80 + 70))
    assert scores.kept(ROWS[3:4], "teacher", "student") is None


def test_scores_of_older_weights_of_a_name_do_not_count():
    rows = [*ROWS, row("student", "CoLA", 1, 45.0, weights=2)]
    assert scores.by_task(rows, "student")["CoLA"] == [45.0]


def test_only_scores_under_the_same_conditions_are_known():
    rows = [row("a", "RTE", 1, 50.0, n_epoch=3)]
    wanted = {"model": "a", "task": "RTE", "seed": 1, "weights": 1, "n_epoch": 3}
    assert scores.find(rows, wanted) == rows[0]
    assert scores.find(rows, {**wanted, "n_epoch": 4}) is None
    assert scores.find(rows, {**wanted, "weights": 2}) is None


def test_a_line_that_a_kill_cut_short_is_written_over(tmp_path):
    path = str(tmp_path / "new" / "scores.jsonl")
    assert scores.read(path) == []
    append_json_lines(path, ROWS[0])
    with open(path, "a") as file:
        file.write('{"model": "stu')
    assert scores.read(path) == ROWS[:1]
    append_json_lines(path, ROWS[1])
    assert scores.read(path) == ROWS[:2]


def test_another_file_is_refused(tmp_path):
    for text in ("no\n", "[1]\n", '{"a": 1}\n'):
        (tmp_path / "x").write_text(text)
        with pytest.raises(InputError, match=r"name a file of scripts/run_glue\.py's scores"):
            scores.read(str(tmp_path / "x"))
