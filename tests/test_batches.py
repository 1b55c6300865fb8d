import numpy as np
import pytest
import torch

from grouped_batch_sampler import GroupedBatchSampler
from training.batches import MAX_PADDING, Batches, Padding, cut_micro_batches, pad, prepare_batch_clm, prepare_batch_mlm
from training.masking import NO_LABEL, Masking

PAD = Padding(0)


@pytest.fixture
def masking():
    """Ids 0 to 3 are special; the weight of id i is (i - 3) ** -0.7."""
    probs = np.concatenate([np.zeros(4), np.arange(1, 97) ** -0.7])
    return Masking(probs, np.arange(4, 100), mask_id=3)


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


def test_padding_may_cost_as_much_as_the_micro_batch_that_it_saves(masking):
    generator = np.random.default_rng(0)
    batch = prepare_batch_mlm([generator.integers(4, 100, n) for n in range(5, 60)], masking, generator)
    micro_batches = [cut_micro_batches([batch], PAD._replace(price=price), 100_000) for price in (0, 400, 10_000)]
    assert [len(cut) for cut in micro_batches] == [7, 2, 1]
    wasted = [sum(int((~part.attention_mask).sum()) for part in cut) for cut in micro_batches]
    assert wasted[0] < wasted[1] < wasted[0] + 3 * 400
