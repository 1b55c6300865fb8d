import dataclasses

import numpy as np
import pytest
import torch

from grouped_batch_sampler import GroupedBatchSampler
from training.batches import (
    MAX_PADDING,
    Batches,
    Masking,
    cut_micro_batches,
    draw_mask,
    pad,
    prepare_batch_clm,
    prepare_batch_mlm,
)


@pytest.fixture
def masking():
    """Ids 0 to 3 are special; the weight of id i is (i - 3) ** -0.7."""
    probs = np.concatenate([np.zeros(4), np.arange(1, 97) ** -0.7])
    return Masking(probs, np.arange(4, 100), mask_id=3)


def test_only_chosen_tokens_change_and_the_labels_are_the_originals(masking):
    generator = np.random.default_rng(0)
    sequences = [np.concatenate([[1], generator.integers(4, 100, n), [2]]) for n in (5, 30, 17)]
    batch = prepare_batch_mlm(sequences, 0, masking, generator, head_on_all_tokens=True)
    ids, attended = pad(sequences, 0)
    n_tokens = sum(map(len, sequences))
    chosen = batch.head_positions[: len(batch.labels)]
    assert len(chosen) == np.ceil(0.15 * n_tokens)
    assert (batch.labels.numpy() == ids.ravel()[chosen]).all()
    untouched = np.setdiff1d(np.arange(ids.size), chosen)
    assert (batch.input_ids.flatten().numpy()[untouched] == ids.ravel()[untouched]).all()
    assert (batch.token_positions.numpy() == np.flatnonzero(attended)).all()
    assert batch.input_ids.shape[1] % 8 == 0
    assert (batch.attention_mask.numpy() == attended).all()

    only_masked = prepare_batch_mlm(sequences, 0, masking, np.random.default_rng(1), head_on_all_tokens=False)
    assert len(only_masked.head_positions) == len(only_masked.labels)


def test_sequences_of_one_length_need_no_attention_mask(masking):
    batch = prepare_batch_mlm([np.arange(10, 21)] * 3, 0, masking, np.random.default_rng(0), True)
    assert batch.attention_mask is None
    assert batch.input_ids.shape == (3, 11)


def test_special_tokens_are_neither_chosen_nor_drawn(masking):
    generator = np.random.default_rng(0)
    ids = np.tile(np.concatenate([[1, 0, 3], np.arange(4, 40), [2]]), (8, 1))
    everything = np.ones(ids.shape, bool)
    for _ in range(200):
        masked, chosen = draw_mask(ids, everything, masking, generator)
        assert ids.ravel()[chosen].min() >= 4
        replaced = masked.ravel()[chosen]
        assert set(replaced[replaced < 4]) <= {3}


def test_replacement_of_chosen_tokens_is_80_10_10(masking):
    generator = np.random.default_rng(0)
    ids = generator.integers(4, 100, (40, 100))
    n, masked_n, kept_n = 0, 0, 0
    for _ in range(100):
        masked, chosen = draw_mask(ids, np.ones(ids.shape, bool), masking, generator)
        after, before = masked.ravel()[chosen], ids.ravel()[chosen]
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
        _, chosen = draw_mask(row[None], np.ones((1, len(row)), bool), whole, generator)
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
    ids, n = np.array([[1, 2, 3, 4]]), 20_000  # the last goes on with the third: their mean is 2.5
    first = [draw_mask(ids, np.ones((1, 4), bool), masking, generator)[1][0] for _ in range(n)]
    found = np.bincount(first, minlength=4) / n
    np.testing.assert_allclose(found, np.array([1, 2, 2.5, 0]) / 5.5, atol=0.015)


def test_tokens_are_chosen_by_the_exact_power_law(masking):
    """One of many tokens: the choice has exactly the stated probabilities. A chi-squared test at 1e-4."""
    from math import ceil

    single = Masking(masking.token_probs, masking.random_ids, 3, proportion=1e-6)
    ids = np.arange(100)[None]
    assert ceil(1e-6 * 100) == 1
    n = 40_000
    generator = np.random.default_rng(0)
    everything = np.ones(ids.shape, bool)
    found = np.bincount([draw_mask(ids, everything, single, generator)[1][0] for _ in range(n)], minlength=100)
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
    ids, everything = np.arange(4)[None], np.ones((1, 4), bool)
    found = sum(np.bincount(draw_mask(ids, everything, masking, generator)[1], minlength=4) for _ in range(n)) / n
    assert np.abs(found - exact).max() < 4 * np.sqrt(0.25 / n)


def test_weights_follow_the_counts(tokenizer):
    counts = np.arange(len(tokenizer)) ** 2
    masking = Masking.of_tokenizer(tokenizer, counts, 0.7)
    assert masking.token_probs[100] == pytest.approx(10_000**-0.7)
    assert (masking.token_probs[tokenizer.all_special_ids] == 0).all()
    assert not set(tokenizer.all_special_ids) & set(masking.random_ids)
    assert len(masking.random_ids) == len(tokenizer) - len(tokenizer.all_special_ids)


def test_causal_labels_are_the_next_tokens():
    batch = prepare_batch_clm([np.array([5, 6, 7]), np.array([8, 9, 10, 11, 12])], pad_id=0)
    positions = batch.head_positions[: len(batch.labels)]
    assert batch.labels.tolist() == [6, 7, 9, 10, 11, 12]
    assert torch.equal(batch.input_ids.flatten()[positions + 1], batch.labels)
    assert len(batch.token_positions) == 8


def test_a_batch_is_a_function_of_seed_epoch_and_number(masking):
    class Dataset:
        lengths = np.full(60, 20)

        def __getitem__(self, i):
            return np.arange(20) + 4 + i % 50

    sampler = GroupedBatchSampler(Dataset.lengths, batch_size=4, seed=7)
    make = lambda seed, epoch: Batches(Dataset(), sampler, (seed, epoch), masking, 0, True)
    same = make(7, 1)[3], make(7, 1)[3]
    assert torch.equal(same[0].input_ids, same[1].input_ids)
    for other in (make(8, 1)[3], make(7, 2)[3], make(7, 1)[4]):
        assert not torch.equal(same[0].head_positions[: len(same[0].labels)], other.head_positions[: len(other.labels)])


def per_sequence(batches):
    """[(ids, label of each token, whether it has logits)] of all sequences, sorted: what micro-batches have to keep."""
    found = []
    for batch in batches:
        bs, seq_length = batch.input_ids.shape
        attended = torch.ones(bs, seq_length, dtype=bool) if batch.attention_mask is None else batch.attention_mask
        labels, head = torch.full((bs * seq_length,), -1), torch.zeros(bs * seq_length, dtype=bool)
        labels[batch.head_positions[: len(batch.labels)]] = batch.labels
        head[batch.head_positions] = True
        assert head.sum() == len(batch.head_positions)
        assert attended.ravel()[batch.head_positions].all()
        assert torch.equal(batch.token_positions, attended.ravel().nonzero().ravel())
        rows = zip(batch.input_ids, labels.view(bs, -1), head.view(bs, -1), attended, strict=True)
        found += [(ids[real].tolist(), label[real].tolist(), at[real].tolist()) for ids, label, at, real in rows]
    return sorted(found)


@pytest.mark.parametrize("kind", ["all tokens", "masked tokens", "causal"])
@pytest.mark.parametrize("tokens", [1, 40, 512, 100_000])
def test_micro_batches_keep_every_sequence_with_its_labels(masking, kind, tokens):
    generator = np.random.default_rng(0)
    batches = []
    for lengths in ([11, 16, 9], [20, 20], [30], list(range(5, 60)), [7]):
        sequences = [generator.integers(4, 100, n) for n in lengths]
        if kind == "causal":
            batches.append(prepare_batch_clm(sequences, 0))
        else:
            batches.append(prepare_batch_mlm(sequences, 0, masking, generator, kind == "all tokens"))
    micro_batches = cut_micro_batches(batches, tokens, pad_id=0)
    assert per_sequence(micro_batches) == per_sequence(batches)
    assert sum(batch.pairs for batch in micro_batches) == sum(batch.pairs for batch in batches)
    assert cut_micro_batches([], tokens, pad_id=0) == []
    if tokens == 1:
        assert [len(batch.input_ids) for batch in micro_batches] == [1] * 62


def test_micro_batches_stay_within_the_budget_and_waste_little(masking):
    generator = np.random.default_rng(0)
    sequences = [generator.integers(4, 100, n) for n in [*generator.integers(5, 60, 150), 700]]
    batches = [prepare_batch_mlm(sequences[i::10], 0, masking, generator, True) for i in range(10)]
    micro_batches = cut_micro_batches(batches, tokens=512, pad_id=0)
    assert micro_batches[-1].input_ids.shape == (1, 700)  # over the budget: alone
    for batch in micro_batches[:-1]:
        lengths = batch.attention_mask.sum(1) if batch.attention_mask is not None else batch.input_ids.shape[1]
        alone = (-(-lengths // 8) * 8 * torch.ones(len(batch.input_ids))).sum()
        assert batch.input_ids.numel() <= 512
        assert batch.input_ids.numel() - alone <= MAX_PADDING * batch.input_ids.numel()
    assert len(micro_batches) <= 1.5 * sum(map(len, sequences)) / 512
