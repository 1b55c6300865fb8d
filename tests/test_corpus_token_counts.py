"""Counts of another vocabulary, or files that are none, are refused."""

import os
import pickle

import pytest

from corpus.files import open_corpus
from corpus.token_counts import count_tokens, load_token_counts
from utils import InputError


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_wrong_counts_are_refused(tmp_path, path):
    with pytest.raises(InputError, match="only 100 entries"):
        count_tokens(open_corpus([path]), 100)
    counts = tmp_path / "counts.pickle"
    for value, message in (
        ([1] * 28996, "28996"),
        ({"a": 1}, "lists and arrays of numbers"),
        ([0] * 30522, "0 times"),
        ([1 << 64] * 30522, "no list"),
        ([0.5] * 10, "no list"),
        ([[1], [2, 3]], "no list"),
        (Hostile(), "system"),
    ):
        counts.write_bytes(pickle.dumps(value))
        with pytest.raises(InputError, match=message):
            load_token_counts(counts, 30522)
