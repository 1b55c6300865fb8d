import numpy as np
import pytest

import grouped_batch_sampler
from grouped_batch_sampler import GroupedBatchSampler, create_lengths_groups
from utils import InputError

LENGTHS = np.random.default_rng(0).integers(12, 129, 1003)


def batches(sampler, epoch):
    sampler.set_epoch(epoch)
    return [sampler.batch(j) for j in range(len(sampler))]


@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 5},
        {"batch_size": 5, "group_by_size": False},
        {"batch_size": 5, "shuffle": False},
        {"tokens_per_batch": 1024},
        {"batch_size": 2000},
    ],
)
def test_an_epoch_visits_every_sequence_once(flags):
    sampler = GroupedBatchSampler(LENGTHS, **flags)
    for epoch in (0, 1, 5):
        found = np.concatenate(batches(sampler, epoch))
        assert np.array_equal(np.sort(found), np.arange(len(LENGTHS)))


def test_order_is_a_function_of_seed_and_epoch():
    make = lambda seed: GroupedBatchSampler(LENGTHS, batch_size=5, seed=seed)
    flat = lambda sampler, epoch: np.concatenate(batches(sampler, epoch))
    assert np.array_equal(flat(make(3), 2), flat(make(3), 2))
    assert not np.array_equal(flat(make(3), 2), flat(make(3), 1))
    assert not np.array_equal(flat(make(3), 2), flat(make(4), 2))


def test_grouping_keeps_padding_low():
    padding = lambda group: sum(
        (LENGTHS[batch].max() - LENGTHS[batch]).sum()
        for batch in batches(GroupedBatchSampler(LENGTHS, batch_size=5, group_by_size=group), 0)
    )
    assert padding(True) < 0.06 * LENGTHS.sum() < 0.3 * LENGTHS.sum() < padding(False)


def test_batches_keep_to_their_token_budget_and_use_it():
    sampler = GroupedBatchSampler(LENGTHS, tokens_per_batch=1024)
    padded = [len(batch) * -(-LENGTHS[batch].max() // 8) * 8 for batch in batches(sampler, 0)]
    assert max(padded) <= 1024
    assert np.mean(padded) > 900


def test_a_budget_below_the_longest_sequence_is_an_error():
    with pytest.raises(InputError, match="--tokens_per_batch 64"):
        GroupedBatchSampler(LENGTHS, tokens_per_batch=64)


def test_processes_share_a_step_evenly_and_without_overlap():
    sampler = GroupedBatchSampler(LENGTHS, batch_size=5)
    evenness = []
    for step in range(7):  # of 32 batches each, but for the last
        shares = [sampler.share(step, 32, rank, 4) for rank in range(4)]
        assert sorted(j for share in shares for j in share) == list(range(32 * step, min(32 * step + 32, len(sampler))))
        tokens = [sum(LENGTHS[sampler.batch(j)].sum() for j in share) for share in shares]
        evenness.append(np.mean(tokens) / max(tokens))
        assert sampler.share(step, 32, 0, 1) == sorted(j for share in shares for j in share)
    assert len(sampler) == 201
    assert min(evenness[:6]) > 0.97
    assert [len(sampler.share(6, 32, rank, 16)) for rank in range(16)] == [1] * 9 + [0] * 7


def test_groups_are_eight_tokens_wide():
    assert create_lengths_groups(np.array([1, 8, 9, 16, 17])).tolist() == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "flags", [{"batch_size": 5}, {"tokens_per_batch": 1024}, {"batch_size": 5, "group_by_size": False}]
)
def test_weights_say_how_often_an_epoch_draws_a_source(flags):
    sources, weights = np.array([0, 300, 703, 1003]), np.array([2.0, 0.25, 1.5])
    sampler = GroupedBatchSampler(LENGTHS, sources=sources, weights=weights, seed=3, **flags)
    assert len(sampler) == len(batches(sampler, 7))
    times = np.zeros(len(LENGTHS), int)
    for epoch in range(4):
        drawn = np.bincount(np.concatenate(batches(sampler, epoch)), minlength=len(LENGTHS))
        assert sampler.n_sequences == drawn.sum()
        assert sampler.n_tokens == (drawn * LENGTHS).sum()
        for begin, end, weight in zip(sources, sources[1:], weights, strict=False):
            n = end - begin
            assert weight * n <= drawn[begin:end].sum() <= weight * n + 17  # rounded up in each group
            assert set(drawn[begin:end]) <= {int(weight), int(np.ceil(weight))}
        times += drawn
    assert (times[:300] == 8).all()
    assert (times[300:703] >= 1).all() and times[300:703].mean() < 1.2
    assert (times[703:] >= 5).all()
    again = GroupedBatchSampler(LENGTHS, sources=sources, weights=weights, seed=3, **flags)
    assert all(np.array_equal(a, b) for a, b in zip(batches(again, 3), batches(sampler, 3), strict=True))


def test_weights_of_one_change_nothing():
    plain = GroupedBatchSampler(LENGTHS, batch_size=5)
    weighted = GroupedBatchSampler(LENGTHS, batch_size=5, sources=np.array([0, 500, 1003]), weights=np.ones(2))
    assert all(np.array_equal(a, b) for a, b in zip(batches(plain, 2), batches(weighted, 2), strict=True))


def test_sorting_in_blocks_is_sorting(monkeypatch):
    expected = GroupedBatchSampler(LENGTHS, batch_size=5)._sorted
    assert np.array_equal(expected, np.argsort(create_lengths_groups(LENGTHS), kind="stable"))
    monkeypatch.setattr(grouped_batch_sampler, "BLOCK", 100)
    assert np.array_equal(GroupedBatchSampler(LENGTHS, batch_size=5)._sorted, expected)
