"""GLUE's files and metrics are what its authors define."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from glue_files import told, write_imdb, write_task

from evaluation.glue import TASKS, Example, read_task, score
from utils import InputError

GENERATOR = np.random.default_rng(0)


def metrics_of(task, logits, labels):
    return score(TASKS[task], [np.asarray(logits)], [[Example(("",), label) for label in labels]])


@pytest.mark.parametrize("n_values", [3, 1000], ids=["many ties", "few ties"])
def test_correlations_are_scipys(n_values):
    labels = GENERATOR.integers(0, n_values, 300) / n_values * 5
    guesses = np.round(labels + GENERATOR.normal(size=300) * 2, 1)
    metrics = metrics_of("STS-B", guesses[:, None], labels)
    assert metrics["pearson"] == pytest.approx(100 * scipy.stats.pearsonr(guesses, labels)[0], abs=1e-6)
    assert metrics["spearman"] == pytest.approx(100 * scipy.stats.spearmanr(guesses, labels)[0], abs=1e-4)
    assert metrics["score"] == pytest.approx((metrics["pearson"] + metrics["spearman"]) / 2)


@pytest.mark.parametrize("share", [0.5, 0.05, 0.0])
def test_classification_is_scikit_learns(share):
    labels = (GENERATOR.random(400) < 0.3).astype(int)
    guesses = np.where(GENERATOR.random(400) < 0.8, labels, GENERATOR.random(400) < share).astype(int)
    if share == 0.0:
        guesses[:] = 0  # a model that always says the same
    logits = np.eye(2)[guesses]
    paraphrase, acceptability = metrics_of("MRPC", logits, labels), metrics_of("CoLA", logits, labels)
    assert paraphrase["accuracy"] == pytest.approx(100 * sklearn.metrics.accuracy_score(labels, guesses))
    assert paraphrase["f1"] == pytest.approx(100 * sklearn.metrics.f1_score(labels, guesses, zero_division=0), abs=1e-4)
    expected = 100 * sklearn.metrics.matthews_corrcoef(labels, guesses)
    assert acceptability["matthews"] == acceptability["score"] == pytest.approx(expected, abs=1e-4)


def test_a_model_that_always_says_the_same_has_no_correlation():
    assert metrics_of("STS-B", np.ones((5, 1)), [1, 2, 3, 4, 5])["score"] == 0


def test_two_development_sets_count_alike():
    examples = [[Example(("",), 0)] * 4, [Example(("",), 1)] * 2]
    predictions = [np.eye(3)[[0, 0, 0, 1]], np.eye(3)[[1, 2]]]
    assert score(TASKS["MNLI"], predictions, examples)["score"] == pytest.approx((75 + 50) / 2)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "IMDb"])
def test_the_layout_of_every_task_is_read(tmp_path, name):
    write_task(tmp_path, name)
    train, dev = read_task(TASKS[name], str(tmp_path))
    assert (len(train), [len(examples) for examples in dev]) == (64, [24] * len(TASKS[name].dev_files))
    for example in train:
        second = told(example.texts[0])
        assert len(example.texts) == len(TASKS[name].texts)
        assert example.label == ((4.25 if second else 0.5) if TASKS[name].is_regression else second)


def test_imdb_is_read_as_it_comes(tmp_path):
    write_imdb(tmp_path)
    train, (dev,) = read_task(TASKS["IMDb"], str(tmp_path))
    assert len(train) == len(dev) == 12
    assert all(example.texts[0].endswith(("neg", "pos")[int(example.label)]) for example in train)


def test_quotes_are_text_and_not_syntax(tmp_path):
    (tmp_path / "SST-2").mkdir()
    lines = 'sentence\tlabel\n"quoted\t1\nno " end\t0\n'
    for split in ("train", "dev"):
        (tmp_path / "SST-2" / f"{split}.tsv").write_text(lines)
    train, _ = read_task(TASKS["SST-2"], str(tmp_path))
    assert [example.texts[0] for example in train] == ['"quoted', 'no " end']


@pytest.mark.parametrize("content, message", [
    (None, "SST-2/train.tsv does not exist"),
    ("text\tlabel\na\t1\n", "names no column 'sentence'"),
    ("sentence\tlabel\na\tpositive\n", "line 2: the label is 'positive', but SST-2's are 0 or 1"),
    ("sentence\tlabel\na\t1\nb\n", "line 3: fewer fields than SST-2 has; is the file cut short"),
    ("sentence\tlabel\na\t1\nb\na\t1\n", "line 3: fewer fields"),
    ("sentence\tlabel\n", "holds no examples"),
])  # fmt: skip
def test_foreign_and_damaged_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "SST-2").mkdir()
    if content is not None:
        (tmp_path / "SST-2" / "train.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_task(TASKS["SST-2"], str(tmp_path))


@pytest.mark.parametrize("label", ["nan", "inf", "-1", "5.1", "", "1e400", "x" * 5000])
def test_scores_that_no_one_gave_are_refused(tmp_path, label):
    (tmp_path / "STS-B").mkdir()
    (tmp_path / "STS-B" / "train.tsv").write_text(f"sentence1\tsentence2\tscore\na\tb\t5.0\na\tb\t{label}\n")
    with pytest.raises(InputError, match=r"line 3: the label is '.{0,60}', but STS-B's are numbers from 0 to 5"):
        read_task(TASKS["STS-B"], str(tmp_path))


def test_a_few_broken_lines_are_left_out_and_told(tmp_path, caplog):
    (tmp_path / "SST-2").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "a\t1\n" * 99 + "b\n" + "c\t0\n" * 9)
    train, _ = read_task(TASKS["SST-2"], str(tmp_path))
    assert [example.texts[0] for example in train] == ["a"] * 99 + ["c"] * 9
    assert "SST-2/train.tsv: 1 broken lines are left out, the first is line 101" in caplog.text


def test_tasks_come_from_the_hub_where_no_folder_is_given(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train, dev = read_task(TASKS["MNLI"], None)
    assert train == [Example(("a", "b"), 2)]
    assert len(dev) == 2
    assert asked == [("nyu-mll/glue", "mnli", s) for s in ("train", "validation_matched", "validation_mismatched")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_task(TASKS["MNLI"], None)
