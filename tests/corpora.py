"""Small binarized files of random ids, for the tests of what reads them."""

import numpy as np

from dataset import write_token_file

SPECIAL = {"unk": 1, "cls": 2, "sep": 3, "pad": 0, "mask": 4, "bos": None, "eos": None}
MADE_BY = {"tokenizer": "some", "vocab_size": 1000, "vocab_hash": "0", "special_ids": SPECIAL}


def make_sequences(n, seed=0):
    generator = np.random.default_rng(seed)
    return [np.concatenate([[2], generator.integers(5, 1000, k), [3]]) for k in generator.integers(0, 90, n)]


def write(path, sequences, made_by=MADE_BY):
    """Writes the file in parts of some sequences. Returns its path."""
    with write_token_file(path, made_by) as writer:
        for i in range(0, len(sequences), 30):
            part = sequences[i : i + 30]
            writer.append(np.concatenate(part), np.array([len(sequence) for sequence in part]))
    return path
