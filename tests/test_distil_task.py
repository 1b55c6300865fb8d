"""distil_task.py makes a small model of a task of one's own, says how good it is, and continues where it was."""

import csv

import distil_task
import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import pipeline
from workspace import make_text, run

from evaluation.fine_tuning import FineTuner
from utils import InputError

ANIMALS = ("cat", "dog", "queen")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Which animal a text begins with; scores are how long it is."""
    folder = tmp_path_factory.mktemp("tables")
    generator, words = np.random.default_rng(0), make_text(40).split()
    for name, n in (("train", 90), ("dev", 30), ("more", 20)):
        rows = []
        for i in range(n):
            animal = ANIMALS[i % 3]
            text = " ".join([f"the {animal}", *generator.choice(words, generator.integers(2, 12))])
            rows.append([text, "a letter", animal.upper(), f"{len(text) / 20:.2f}"])
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["text", "ignored", "label", "length"], *rows])
        with open(folder / f"{name}_scores.tsv", "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerows([["text", "text_pair", "label"], *([text, pair, score] for text, pair, _, score in rows)])
    return folder


@pytest.fixture
def flags(workspace, student, tables, tmp_path):
    return ["--train_file", tables / "train.csv", "--dev_file", tables / "dev.csv", "--n_gpu", 0, "--fp32",
            "--teacher", workspace / "bert-base-uncased", "--student", student, "--output_dir", tmp_path / "mine",
            "--batch_size", 8, "--learning_rate", 3e-3, "--layer_rate", 1e-3, "--dropout", 0]  # fmt: skip


@pytest.fixture
def without_onnx(monkeypatch):
    """As where the optional packages are missing. (Exports take most of the time, and the first test has one.)"""

    def missing(*_):
        raise InputError("onnx is missing")

    monkeypatch.setattr(distil_task, "require_packages", missing)


def cells(table):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows}


def test_a_student_learns_the_task_and_says_how_well(flags, tables, tmp_path, capsys):
    run(distil_task, *flags, "--unlabelled_file", tables / "more.csv", "--n_epoch", 8)
    table, out = (tmp_path / "mine" / "results.md").read_text(), capsys.readouterr().out
    assert out.endswith(table)
    found = cells(table)
    assert {"teacher", "student", "student, int8"} < set(found)
    for role in ("teacher", "student", "student, int8"):
        assert float(found[role]["accuracy"]) > 90 and float(found[role]["matthews"]) > 80
        assert float(found[role]["ms a text"]) > 0
    card = ModelCard.load(tmp_path / "mine" / "student" / "README.md")
    assert [f"{result.metric_value:.1f}" for result in card.data.eval_results] == list(found["student"].values())[:3]
    assert table in card.text
    classify = pipeline("text-classification", str(tmp_path / "mine" / "student"))
    assert classify("the dog sees the garden")[0]["label"] == "DOG"
    with open(tmp_path / "mine" / "differences.tsv", newline="") as file:
        header, *different = csv.reader(file, delimiter="\t")
    assert header == ["label", "teacher", "student", "text"]
    assert all(teacher != answer for _, teacher, answer, _ in different)


def test_what_was_finished_is_not_done_again(flags, tmp_path, monkeypatch, capsys, without_onnx):
    trained, train = [], FineTuner.train

    def interrupted(self, features, title, *more, **options):
        trained.append(title)
        if title == "student" and trained.count(title) == 1:
            raise KeyboardInterrupt
        train(self, features, title, *more, **options)

    monkeypatch.setattr(FineTuner, "train", interrupted)
    flags += ["--n_epoch", 1, "--layer_epochs", 1, "--augment", 2]
    run(distil_task, *flags, expect=130)
    copies = (tmp_path / "mine" / "copies.jsonl").read_bytes()
    assert len(copies.splitlines()) == 1 + 90
    run(distil_task, *flags)
    assert trained == ["teacher", "student, layers", "student", "student, layers", "student"]
    assert (tmp_path / "mine" / "copies.jsonl").read_bytes() == copies
    run(distil_task, *flags)
    assert len(trained) == 5
    run(distil_task, *flags, "--seed", 2, expect=2)
    assert "was made with other --seed; give another folder" in capsys.readouterr().err


def test_a_fine_tuned_teacher_is_taken_as_it_is(flags, tmp_path, without_onnx):
    short = [*flags, "--n_epoch", 1, "--layer_epochs", 0]
    run(distil_task, *short)
    again = [*short, "--teacher", tmp_path / "mine" / "teacher", "--output_dir", tmp_path / "again"]
    run(distil_task, *again)
    assert not (tmp_path / "again" / "teacher").exists()
    rows = [cells((tmp_path / name / "results.md").read_text())["teacher"] for name in ("mine", "again")]
    assert rows[0]["accuracy"] == rows[1]["accuracy"]


def test_scores_of_two_texts(flags, tables, tmp_path, without_onnx):
    files = ["--train_file", tables / "train_scores.tsv", "--dev_file", tables / "dev_scores.tsv"]
    run(distil_task, *flags, *files, "--n_epoch", 8)
    found = cells((tmp_path / "mine" / "results.md").read_text())
    assert float(found["teacher"]["pearson"]) > 60 and float(found["student"]["spearman"]) > 60
    assert "student, int8" not in found
    assert len((tmp_path / "mine" / "differences.tsv").read_text().splitlines()) == 1 + 3  # a tenth of 30


@pytest.mark.parametrize("wrong, message", [
    (["--dev_file", "{tables}/dev_scores.tsv"], "dev_scores.tsv, line 2: the label"),
    (["--unlabelled_file", "{tables}/dev_scores.tsv"], "a column 'text_pair' and some do not"),
    (["--output_dir", "{tables}"], "is not empty, and not of this script"),
    (["--teacher", "{tables}"], "tables"),
    (["--augment_with", "{tables}"], "--augment_with has no effect without --augment"),
])  # fmt: skip
def test_what_can_not_be_is_told_before_anything_is_done(flags, tables, tmp_path, capsys, wrong, message):
    run(distil_task, *flags, *(word.format(tables=tables) for word in wrong), expect=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
