"""Which tokens are chosen, how often, and what replaces them."""

import dataclasses

import numpy as np
import pytest

from training.masking import NO_LABEL, Masking, mask_tokens


@pytest.fixture
def masking():
    """Ids 0 to 3 are special; the weight of id i is (i - 3) ** -0.7."""
    probs = np.concatenate([np.zeros(4), np.arange(1, 97) ** -0.7])
    return Masking(probs, np.arange(4, 100), mask_id=3)


def draw_mask(ids, masking, generator):
    """Masked ids, and the places of the chosen tokens."""
    masked, labels = mask_tokens(ids, masking, generator)
    return masked, np.flatnonzero(labels != NO_LABEL)


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


def test_whole_words_are_drawn_by_their_probability():
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


def test_probabilities_follow_the_counts(tokenizer):
    counts = np.arange(len(tokenizer)) ** 2
    masking = Masking.of_tokenizer(tokenizer, counts, 0.7)
    assert masking.token_probs[100] == pytest.approx(10_000**-0.7)
    assert (masking.token_probs[tokenizer.all_special_ids] == 0).all()
    assert not set(tokenizer.all_special_ids) & set(masking.random_ids)
    assert len(masking.random_ids) == len(tokenizer) - len(tokenizer.all_special_ids)
