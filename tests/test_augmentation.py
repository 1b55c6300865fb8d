"""Copies of examples: words give way to guesses in their place, and being stopped changes nothing."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation import augmentation
from evaluation.augmentation import N_GUESSES, Guesser, rewritten
from utils import InputError

CPU = torch.device("cpu")
EXAMPLES = [
    ("The cat sees the garden, before it rains!",),
    ("an old sailor",),
    ("...",),
    ("my neighbour unquestionably carries a letter",),
] * 3


def rewrite(workspace, file, examples=EXAMPLES, n_copies=5, seed=0):
    return rewritten(examples, n_copies, str(workspace / "bert-base-uncased"), seed, file, CPU, "")


def test_a_word_is_guessed_from_the_words_around_it(workspace, tokenizer, teacher):
    text = "my neighbour, unquestionably, won't sees THE half-blue garden"
    (found,) = Guesser(str(workspace / "bert-base-uncased"), CPU).words([text])
    words = [text[word.start : word.end] for word in found]
    assert words == ["my", "neighbour", "unquestionably", "won't", "sees", "THE", "half-blue", "garden"]
    whole = {token: i for token, i in tokenizer.get_vocab().items() if token.isalnum()}
    for word, spelled in zip(found, words, strict=True):
        masked = f"{text[: word.start]}[MASK]{text[word.end :]}"
        ids = tokenizer(masked, return_tensors="pt").input_ids  # however many pieces the word has, one mask
        with torch.no_grad():
            (logits,) = teacher(ids).logits[ids == tokenizer.mask_token_id]
        best = sorted(whole, key=lambda token: -logits[whole[token]])[: N_GUESSES + 1]
        assert word.guesses == [token for token in best if token != spelled.lower()][:N_GUESSES]


def test_copies_differ_in_words_alone(workspace, tmp_path):
    copies = rewrite(workspace, tmp_path / "copies.jsonl")
    assert 30 < len(copies) < 5 * len(EXAMPLES)  # none of "..."
    assert len(rewrite(workspace, tmp_path / "one.jsonl", [("a dog",)], 1000)) < (N_GUESSES + 1) ** 2  # no two alike
    shapes = {re.sub(r"\w+", "w", text) for (text,) in copies}
    assert shapes == {re.sub(r"\w+", "w", text) for (text,) in EXAMPLES} - {"..."}
    assert not set(copies) & set(EXAMPLES)
    share = [(a != b) for (copy,) in copies[:5] for a, b in zip(copy.split(), EXAMPLES[0][0].split(), strict=True)]
    assert 0.2 < sum(share) / len(share) < 0.6


def test_of_two_texts_one_is_rewritten(workspace, tmp_path):
    pair = ("the cat sees a garden", "an old sailor paints")
    copies = rewrite(workspace, tmp_path / "copies.jsonl", [pair], 6)
    changed = [[a != b for a, b in zip(copy, pair, strict=True)] for copy in copies]
    assert [True, False] in changed and [False, True] in changed and [True, True] not in changed


def test_an_interruption_changes_nothing(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(augmentation, "CHUNK", 5)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    copies = rewrite(workspace, whole)
    for n_bytes in (0, 10, 300, len(whole.read_bytes()) // 2):
        part.write_bytes(whole.read_bytes()[:n_bytes])
        assert rewrite(workspace, part) == copies
        assert part.read_bytes() == whole.read_bytes()
    assert rewrite(workspace, part) == copies  # nothing is left to do
    assert rewrite(workspace, tmp_path / "other.jsonl", seed=1) != copies


def test_a_file_of_something_else_is_refused(workspace, tmp_path):
    rewrite(workspace, tmp_path / "copies.jsonl")
    for changed in ({"n_copies": 4}, {"seed": 1}, {"examples": EXAMPLES[1:]}):
        with pytest.raises(InputError, match=r"copies\.jsonl was made of other .* remove it"):
            rewrite(workspace, tmp_path / "copies.jsonl", **changed)
    (tmp_path / "copies.jsonl").write_text("texts\n")
    with pytest.raises(InputError, match=r"copies\.jsonl, line 1: it is not JSON .* remove it"):
        rewrite(workspace, tmp_path / "copies.jsonl")


def test_a_model_that_guesses_what_comes_next_is_refused(tokenizer, tmp_path):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="guesses what comes next"):
        Guesser(str(tmp_path), CPU)
