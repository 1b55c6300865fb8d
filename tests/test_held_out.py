"""What is held out."""

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM
from workspace import load_tokenizer

from corpus.files import open_corpus
from evaluation import held_out
from evaluation.held_out import held_out_sequences
from models.language_model import LanguageModel
from training.distributed import World
from training.masking import Masking
from training.metrics_files import TRAINING_MASKS

CPU = World(torch.device("cpu"))


def test_held_out_sequences_are_few_distinct_and_sorted():
    chosen = held_out_sequences(50_000_000, 0.01)
    assert len(np.unique(chosen)) == len(chosen) == 500
    assert np.array_equal(chosen, np.sort(chosen))


def test_another_masking_in_training_is_evaluated_beside_the_even_one(workspace):
    tokenizer = load_tokenizer(workspace / "bert-base-uncased")
    corpus = open_corpus([str(workspace / "text.bert-base-uncased.pickle")], tokenizer)
    even = held_out.held_out_batches(corpus, tokenizer, 64, True, np.arange(40))
    counts = np.full(len(tokenizer), 5)
    assert set(held_out.with_training_masks(even, None, tokenizer)) == {""}
    assert set(held_out.with_training_masks(even, Masking.of_tokenizer(tokenizer, counts), tokenizer)) == {""}
    cat = tokenizer("cat", add_special_tokens=False)["input_ids"][0]
    counts[cat] = 1
    rare = held_out.with_training_masks(even, Masking.of_tokenizer(tokenizer, counts, 3.0), tokenizer)[TRAINING_MASKS]
    share = lambda text: np.mean(np.concatenate([micro_batch.labels for micro_batch in text]) == cat)
    assert share(rare) > 2 * share(even) > 0


def test_an_evaluation_never_holds_more_than_a_chunk_of_logits(workspace, teacher, monkeypatch):
    tokenizer = load_tokenizer(workspace / "bert-base-uncased")
    corpus = open_corpus([str(workspace / "text.bert-base-uncased.pickle")], tokenizer)
    batches = held_out.held_out_batches(corpus, tokenizer, 64, True, np.arange(40))
    student = BertForMaskedLM(teacher.config)
    models = [LanguageModel(student.eval()), LanguageModel(teacher)]
    rows, logits = [], LanguageModel.logits

    def noted(model, hidden):
        rows.append(len(hidden))
        return logits(model, hidden)

    monkeypatch.setattr(LanguageModel, "logits", noted)
    whole = held_out.evaluate(*models, batches, CPU, torch.float32)
    largest = max(rows)
    monkeypatch.setattr(held_out, "usual_chunk", lambda *_: 7)
    rows.clear()
    chunked = held_out.evaluate(*models, batches, CPU, torch.float32)
    assert max(rows) == 7 < largest
    assert chunked == pytest.approx(whole, rel=1e-6)


def test_figures_under_both_maskings_are_told_apart_in_the_log():
    lines = held_out.describe({"mlm_loss": 3.0, "kl": 1.0, "training_masks_mlm_loss": 4.0})
    assert lines == ["held-out  mlm_loss 3  kl 1", "held-out, masked as in training  mlm_loss 4"]
    assert held_out.describe({"clm_loss": 3.0}) == ["held-out  clm_loss 3"]
