"""Groups of words, and figures by layer, against what is worked out by hand."""

import copy

import numpy as np
import pytest
import torch

from corpus.files import open_corpus
from evaluation import held_out
from evaluation.breakdown import by_layer, groups_by_frequency, groups_by_length, tables
from models.language_model import LanguageModel
from training.distributed import World

CPU = World(torch.device("cpu"))


def test_groups_by_frequency():
    counts = np.zeros(200, np.int64)
    counts[50:170] = np.arange(1000, 1120)  # the most frequent is 169
    groups = groups_by_frequency(np.array([169, 160, 159, 70, 69, 3]), counts)
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "the 10 most frequent tokens": [True, True, False, False, False, False],
        "11 to 100": [False, False, True, True, False, False],
        "101 to 1,000": [False, False, False, False, True, True],
    }


def test_groups_by_length():
    groups = groups_by_length(np.array([8, 32, 33, 257]))
    assert {name: mask.nonzero()[0].tolist() for name, mask in groups.items()} == {
        "up to 32 tokens": [0, 1], "33 to 64": [2], "longer": [3],
    }  # fmt: skip


@pytest.fixture
def batches(workspace, tokenizer):
    text = open_corpus([workspace / "text.bert-base-uncased.pickle"])
    return held_out.held_out_batches(text, tokenizer, 64, True, np.arange(30))


def test_labels_and_lengths_of_the_words(teacher, batches):
    model = LanguageModel(copy.deepcopy(teacher))
    found = held_out.evaluate_labels(model, model, batches, CPU.device, torch.float32)
    expected = []
    for batch in batches:
        seq_length = batch.input_ids.shape[1]
        for position, label in zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True):
            sequence = batch.input_ids[position // seq_length]
            expected.append((label, int((sequence != batches.padding.pad_id).sum())))
    assert list(zip(found["label"].tolist(), found["length"].tolist(), strict=True)) == expected
    assert len(expected) == len(found["loss"]) > 50 and len({length for _, length in expected}) > 2


def test_the_teacher_reads_each_batch_once(teacher, batches):
    student, frozen = LanguageModel(copy.deepcopy(teacher)), held_out.Remembered(copy.deepcopy(teacher))
    read = []
    frozen.encoder.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].tolist()), with_kwargs=True
    )
    found = by_layer(student, frozen, batches, CPU, torch.float32)
    assert read == [batch.input_ids.tolist() for batch in batches]
    assert found[-1] == held_out.evaluate(student, LanguageModel(teacher), batches, CPU, torch.float32)


def test_the_last_layer_is_the_whole_model(teacher, batches):
    model = LanguageModel(copy.deepcopy(teacher))
    found = by_layer(model, model, batches, CPU, torch.float32)
    assert len(found) == 4
    assert found[-1] == pytest.approx(held_out.evaluate(model, model, batches, CPU, torch.float32))
    assert found[-1]["agreement"] == 1 > found[0]["agreement"]


def test_tables(teacher, batches):
    model = LanguageModel(copy.deepcopy(teacher))
    labels = held_out.evaluate_labels(model, model, batches, CPU.device, torch.float32)
    cut = [{"mlm_loss": 5.0, "agreement": 0.25}]
    rows = [{"name": "t", "labels": labels}, {"name": "a", "labels": labels, "by_layer": 2 * cut},
            {"name": "b", "labels": labels, "by_layer": cut}]  # fmt: skip
    text = tables(rows, np.ones(200, np.int64))
    assert " 100.0 % |" in text and "the 10 most frequent tokens" in text
    *_, first, second = text.splitlines()
    assert [cell.strip() for cell in first.split("|")[1:-1]] == ["1", "5.000", "25.0 %", "5.000", "25.0 %"]
    assert [cell.strip() for cell in second.split("|")[1:-1]] == ["2", "5.000", "25.0 %", "", ""]
