"""What a survey of a corpus finds."""

import numpy as np
import pytest
from corpora import SPECIAL, make_sequences, write

from corpus.files import open_corpus
from corpus.statistics import hash_sequences, survey


def test_the_survey_finds_what_was_put_in(tmp_path):
    body = lambda *ids: np.array([2, *ids, 3])
    sequences = [body(7, 8), body(7, 9), body(7, 8), body(1, 1, 5, 4), np.array([7, 8]), body(7, 8), body(9, 7)]
    found = survey(open_corpus([write(tmp_path / "x.pickle", sequences)]), SPECIAL)
    assert found.lengths.tolist() == [4, 4, 4, 6, 2, 4, 4]
    assert found.counts[[1, 2, 3, 7, 8]].tolist() == [2, 6, 6, 6, 4]
    assert found.distinct == 5
    assert found.most_repeated == (0, 3)
    assert found.unknown.tolist() == [0, 0, 0, pytest.approx(1 / 3), 0, 0, 0]
    assert found.misplaced.tolist() == [4]
    assert found.special_inside == {"mask": 1}


def test_hashes_tell_sequences_apart_by_content_place_and_length():
    others = ([2, 0, 3], [2, 3], [2, 0, 0, 3], [])
    sequences = [*make_sequences(3000), *(np.array(ids, int) for ids in others)]
    lengths = np.array([len(sequence) for sequence in sequences])
    hashes = hash_sequences(np.concatenate(sequences), np.concatenate([[0], np.cumsum(lengths)]))
    assert len(np.unique(hashes)) == len({tuple(sequence) for sequence in sequences})
    alone = [hash_sequences(s, np.array([0, len(s)]))[0] for s in sequences[:100]]
    assert alone == hashes[:100].tolist()
