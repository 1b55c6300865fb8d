from pathlib import Path

import numpy as np
import pytest

from corpus.files import TokenCorpus
from dataset import TokensInMemory
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError

SPECIAL = {"unk": 1, "cls": 2, "sep": 3, "pad": 0, "mask": 4, "bos": None, "eos": None}


def corpus(bodies):
    sequences = [np.concatenate([[2], body, [3]]) for body in bodies]
    offsets = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])])
    return TokenCorpus([TokensInMemory(Path("text.pickle"), np.concatenate(sequences).astype(np.uint16), offsets)])


def test_sequences_come_back_as_they_are():
    bodies = [np.arange(10, 10 + n) for n in (10, 20, 30)]
    dataset = LmSeqsDataset(corpus(bodies), SPECIAL, 64)
    assert dataset.lengths.tolist() == [12, 22, 32]
    for i, body in enumerate(bodies):
        assert dataset[i].tolist() == [2, *body, 3]
    assert dataset.n_tokens == 66


def test_long_sequences_are_split_evenly_and_wholly():
    generator = np.random.default_rng(0)
    bodies = [generator.integers(10, 999, n) for n in (62, 63, 124, 125, 1000, 20)]
    dataset = LmSeqsDataset(corpus(bodies), SPECIAL, 64)
    assert dataset.dropped.split == 4
    assert dataset.lengths.max() <= 64
    parts = [dataset[i] for i in range(len(dataset))]
    assert all(part[0] == 2 and part[-1] == 3 for part in parts)
    assert np.array_equal(np.concatenate([part[1:-1] for part in parts]), np.concatenate(bodies))
    assert sorted(dataset.lengths[1:3].tolist()) == [33, 34]  # 63 tokens in two parts
    assert dataset.lengths.min() >= 20


def test_short_and_mostly_unknown_sequences_are_dropped():
    unknown = lambda n, total: np.array([1] * n + [50] * (total - n))
    bodies = [np.full(9, 50), np.full(10, 50), unknown(9, 18), unknown(11, 18), unknown(10, 18)]
    dataset = LmSeqsDataset(corpus(bodies), SPECIAL, 64)  # lengths with boundaries: 11, 12, 20, 20, 20
    assert dataset.dropped.short == 1
    assert dataset.dropped.unknown == 2  # exactly half, and more
    assert dataset.lengths.tolist() == [12, 20]


def test_held_out_and_training_sequences_part_the_file():
    bodies = [np.full(10 + i, 100 + i) for i in range(30)]
    held_out = np.array([3, 7, 29])
    train = LmSeqsDataset(corpus(bodies), SPECIAL, 64, exclude=held_out)
    valid = LmSeqsDataset(corpus(bodies).take(held_out), SPECIAL, 64)
    ids = lambda dataset: {dataset[i][1] for i in range(len(dataset))}
    assert ids(valid) == {103, 107, 129}
    assert ids(train) == set(range(100, 130)) - ids(valid)


def test_another_tokenizers_file_is_refused():
    with pytest.raises(InputError, match="does not begin with id 7"):
        LmSeqsDataset(corpus([np.arange(20)]), {**SPECIAL, "cls": 7}, 64)


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="no sequence is left"):
        LmSeqsDataset(corpus([np.arange(5)] * 3), SPECIAL, 64)
