import dataclasses

import numpy as np
import pytest
import torch

from grouped_batch_sampler import GroupedBatchSampler
from training.batches import (
    MAX_PADDING,
    NO_LABEL,
    Batches,
    Masking,
    Padding,
    cut_micro_batches,
    mask_tokens,
    pad,
    prepare_batch_clm,
    prepare_batch_mlm,
)

PAD = Padding(0)


@pytest.fixture
def masking():
    """Ids 0 to 3 are special; the weight of id i is (i - 3) ** -0.7."""
    probs = np.concatenate([np.zeros(4), np.arange(1, 97) ** -0.7])
    return Masking(probs, np.arange(4, 100), mask_id=3)


def draw_mask(ids, masking, generator):
    """Masked ids, and the places of the chosen tokens."""
    masked, labels = mask_tokens(ids, masking, generator)
    return masked, np.flatnonzero(labels != NO_LABEL)


def test_only_chosen_tokens_change_and_the_labels_are_the_originals(masking):
    generator = np.random.default_rng(0)
    sequences = [np.concatenate([[1], generator.integers(4, 100, n), [2]]) for n in (5, 30, 17)]
    ids = np.concatenate(sequences)
    batch = prepare_batch_mlm(sequences, masking, generator)
    chosen = batch.labels != NO_LABEL
    assert chosen.sum() == np.ceil(0.15 * len(ids))
    assert (batch.labels[chosen] == ids[chosen]).all()
    assert (batch.ids[~chosen] == ids[~chosen]).all()
    assert batch.lengths.tolist() == [7, 32, 19]


@pytest.mark.parametrize("head_on_all_tokens", [True, False])
def test_a_padded_batch_holds_the_sequences_and_their_positions(masking, head_on_all_tokens):
    generator = np.random.default_rng(0)
    batch = prepare_batch_mlm([generator.integers(4, 100, n) for n in (7, 30, 19)], masking, generator)
    padded = pad(batch, PAD, head_on_all_tokens)
    assert padded.input_ids.shape == padded.attention_mask.shape == (3, 32)  # a multiple of 8
    assert padded.lengths.tolist() == padded.attention_mask.sum(1).tolist() == [7, 30, 19]
    flat = padded.input_ids.flatten().numpy()
    assert (flat[padded.token_positions] == batch.ids).all()
    assert not padded.input_ids[~padded.attention_mask].any()
    has_label = batch.labels != NO_LABEL
    assert (padded.label_positions.numpy() == padded.token_positions.numpy()[has_label]).all()
    assert (padded.labels.numpy() == batch.labels[has_label]).all()
    rows = padded.token_positions if head_on_all_tokens else padded.label_positions
    assert sorted(padded.row_positions.tolist()) == rows.tolist()
    assert pad(batch, Padding(0, max_length=30), False).input_ids.shape == (3, 30)


def test_sequences_of_one_length_need_no_attention_mask(masking):
    batch = pad(prepare_batch_mlm([np.arange(10, 21)] * 3, masking, np.random.default_rng(0)), PAD, True)
    assert batch.attention_mask is None
    assert batch.input_ids.shape == (3, 11)
    assert batch.lengths.tolist() == [11] * 3


def test_special_tokens_are_neither_chosen_nor_drawn(masking):
    generator = np.random.default_rng(0)
    ids = np.tile(np.concatenate([[1, 0, 3], np.arange(4, 40), [2]]), 8)
    for _ in range(200):
        masked, chosen = draw_mask(ids, masking, generator)
        assert ids[chosen].min() >= 4
        replaced = masked[chosen]
        assert set(replaced[replaced < 4]) <= {3}


def test_replacement_of_chosen_tokens_is_80_10_10(masking):
    generator = np.random.default_rng(0)
    ids = generator.integers(4, 100, 4000)
    n, masked_n, kept_n = 0, 0, 0
    for _ in range(100):
        masked, chosen = draw_mask(ids, masking, generator)
        after, before = masked[chosen], ids[chosen]
        n += len(chosen)
        masked_n += (after == 3).sum()
        kept_n += (after == before).sum()
    sigma = lambda p: 4 * np.sqrt(p * (1 - p) / n)
    assert abs(masked_n / n - 0.8) < sigma(0.8)
    kept = 0.1 + 0.1 / 96  # a random token is the old one in one of 96 cases
    assert abs(kept_n / n - kept) < sigma(kept)


def test_whole_words_are_chosen_as_often_as_tokens_would_be(masking):
    """Even ids begin a word, odd ones go on with it; a word of three tokens counts as three."""
    generator = np.random.default_rng(0)
    begins = np.arange(100) % 2 == 0
    whole = dataclasses.replace(masking, begins_word=begins)
    pieces = lambda n: [4 + 2 * generator.integers(48)] + [5 + 2 * generator.integers(47) for _ in range(n - 1)]
    shares = []
    for _ in range(300):
        words = [pieces(n) for n in generator.integers(1, 4, 60)]
        row = np.concatenate([[1], *words, [2], *words[:9], [2]])
        _, chosen = draw_mask(row, whole, generator)
        shares.append((len(chosen) - np.ceil(0.15 * len(row))) / len(row))
        word_of = np.cumsum(begins[row] | (row < 4) | np.concatenate([[True], row[:-1] < 4]))
        assert row[chosen].min() >= 4
        together = np.isin(word_of, word_of[chosen])
        assert (np.flatnonzero(together) == chosen).all()  # every token of each chosen word
    assert np.mean(shares) == pytest.approx(0, abs=0.003)


def test_whole_words_are_drawn_by_their_weight():
    """Of three words, one of two tokens: the first choice has the probabilities of the weights."""
    weights = np.array([0, 1.0, 2.0, 4.0, 1.0])
    masking = Masking(weights, np.arange(1, 5), 0, 1e-6, begins_word=np.array([True, True, True, True, False]))
    generator = np.random.default_rng(0)
    ids, n = np.array([1, 2, 3, 4]), 20_000  # the last goes on with the third: their mean is 2.5
    first = [draw_mask(ids, masking, generator)[1][0] for _ in range(n)]
    found = np.bincount(first, minlength=4) / n
    np.testing.assert_allclose(found, np.array([1, 2, 2.5, 0]) / 5.5, atol=0.015)


def test_tokens_are_chosen_by_the_exact_power_law(masking):
    """One of many tokens: the choice has exactly the stated probabilities. A chi-squared test at 1e-4."""
    from math import ceil

    single = Masking(masking.token_probs, masking.random_ids, 3, proportion=1e-6)
    ids = np.arange(100)
    assert ceil(1e-6 * 100) == 1
    n = 40_000
    generator = np.random.default_rng(0)
    found = np.bincount([draw_mask(ids, single, generator)[1][0] for _ in range(n)], minlength=100)
    expected = n * masking.token_probs / masking.token_probs.sum()
    assert found[:4].sum() == 0
    chi2 = ((found[4:] - expected[4:]) ** 2 / expected[4:]).sum()
    assert chi2 < 153  # 95 degrees of freedom


def test_several_tokens_are_drawn_as_one_after_the_other_without_replacement():
    """Inclusion probabilities of 2 out of 4, worked out by hand for successive draws."""
    weights = np.array([8.0, 4.0, 2.0, 1.0])
    p = weights / weights.sum()
    exact = p + [sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    masking = Masking(weights, np.arange(4), 0, proportion=0.5)
    generator = np.random.default_rng(0)
    n = 20_000
    found = sum(np.bincount(draw_mask(np.arange(4), masking, generator)[1], minlength=4) for _ in range(n)) / n
    assert np.abs(found - exact).max() < 4 * np.sqrt(0.25 / n)


def test_weights_follow_the_counts(tokenizer):
    counts = np.arange(len(tokenizer)) ** 2
    masking = Masking.of_tokenizer(tokenizer, counts, 0.7)
    assert masking.token_probs[100] == pytest.approx(10_000**-0.7)
    assert (masking.token_probs[tokenizer.all_special_ids] == 0).all()
    assert not set(tokenizer.all_special_ids) & set(masking.random_ids)
    assert len(masking.random_ids) == len(tokenizer) - len(tokenizer.all_special_ids)


def test_causal_labels_are_the_next_tokens():
    batch = prepare_batch_clm([np.array([5, 6, 7]), np.array([8, 9, 10, 11, 12])])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.labels.tolist() == [6, 7, NO_LABEL, 9, 10, 11, 12, NO_LABEL]
    padded = pad(batch, PAD, True)
    assert torch.equal(padded.input_ids.flatten()[padded.label_positions + 1], padded.labels)
    assert len(padded.token_positions) == 8


def test_a_batch_is_a_function_of_seed_epoch_and_number(masking):
    class Dataset:
        lengths = np.full(60, 20)

        def __getitem__(self, i):
            return np.arange(20) + 4 + i % 50

    sampler = GroupedBatchSampler(Dataset.lengths, batch_size=4, seed=7)
    make = lambda seed, epoch: Batches(Dataset(), sampler, (seed, epoch), masking)
    same = make(7, 1)[3], make(7, 1)[3]
    assert (same[0].ids == same[1].ids).all()
    for other in (make(8, 1)[3], make(7, 2)[3], make(7, 1)[4]):
        assert (same[0].labels != other.labels).any()


def per_sequence(batches):
    """[(ids, labels)] of all sequences, sorted: what micro-batches have to keep."""
    found = []
    for batch in batches:
        ends = np.cumsum(batch.lengths)[:-1]
        found += zip(
            *([part.tolist() for part in np.split(flat, ends)] for flat in (batch.ids, batch.labels)), strict=True
        )
    return sorted(found)


def per_padded_sequence(micro_batches, has_head):
    found = []
    for batch in micro_batches:
        labels, head = (
            torch.full((batch.input_ids.numel(),), NO_LABEL),
            torch.zeros(batch.input_ids.numel(), dtype=bool),
        )
        labels[batch.label_positions], head[batch.row_positions] = batch.labels, True
        rows = zip(batch.input_ids, labels.view_as(batch.input_ids), batch.lengths, strict=True)
        found += [(ids[:n].tolist(), labels[:n].tolist()) for ids, labels, n in rows]
        assert head.sum() == len(batch.row_positions)
        assert torch.equal(head.nonzero().ravel(), has_head(batch).sort().values)
    return sorted(found)


@pytest.mark.parametrize("kind", ["all tokens", "masked tokens", "causal"])
@pytest.mark.parametrize("tokens", [0, 1, 40, 512, 100_000])
def test_micro_batches_keep_every_sequence_with_its_labels(masking, kind, tokens):
    generator = np.random.default_rng(0)
    batches = []
    for lengths in ([11, 16, 9], [20, 20], [30], list(range(5, 60)), [7]):
        sequences = [generator.integers(4, 100, n) for n in lengths]
        causal = kind == "causal"
        batches.append(prepare_batch_clm(sequences) if causal else prepare_batch_mlm(sequences, masking, generator))
    micro_batches = cut_micro_batches(batches, PAD, tokens, kind != "masked tokens")
    has_head = lambda batch: batch.label_positions if kind == "masked tokens" else batch.token_positions
    assert per_padded_sequence(micro_batches, has_head) == per_sequence(batches)
    assert cut_micro_batches([], PAD, tokens) == []
    if tokens == 1:
        assert [len(batch.input_ids) for batch in micro_batches] == [1] * 62
    if tokens == 0:
        assert [len(batch.input_ids) for batch in micro_batches] == [3, 2, 1, 55, 1]


def test_micro_batches_stay_within_the_budget_and_waste_little(masking):
    generator = np.random.default_rng(0)
    sequences = [generator.integers(4, 100, n) for n in [*generator.integers(5, 60, 150), 700]]
    batches = [prepare_batch_mlm(sequences[i::10], masking, generator) for i in range(10)]
    micro_batches = cut_micro_batches(batches, PAD, tokens=512)
    assert micro_batches[-1].input_ids.shape == (1, 700)  # over the budget: alone
    for batch in micro_batches[:-1]:
        alone = (-(-batch.lengths // 8) * 8).sum()
        assert batch.input_ids.numel() <= 512
        assert batch.input_ids.numel() - alone <= MAX_PADDING * batch.input_ids.numel()
    assert len(micro_batches) <= 1.5 * sum(map(len, sequences)) / 512
