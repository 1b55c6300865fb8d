"""What is held out."""

import numpy as np

from evaluation.held_out import held_out_sequences


def test_held_out_sequences_are_few_distinct_and_sorted():
    chosen = held_out_sequences(50_000_000, 0.01)
    assert len(np.unique(chosen)) == len(chosen) == 500
    assert np.array_equal(chosen, np.sort(chosen))
