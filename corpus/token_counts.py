"""How often each token occurs in a corpus: counted from its files, or read from a pickled list of counts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from corpus.files import TokenCorpus
from dataset import TokenFile
from files.plain_pickle import is_of_integers, load_plain_pickle
from utils import InputError

SPAN = 1 << 22  # tokens of one task
CACHED = 1 << 18  # tokens counted at once: bincount makes them 64 bits wide, and these then fit into a core's cache


def count_tokens(corpus: TokenCorpus, vocab_size: int, map_tasks: Callable = map) -> np.ndarray:
    """(vocab_size,) int64 occurrences of each token in a corpus.

    Args:
        corpus: what to count.
        vocab_size: entries of the vocabulary.
        map_tasks: like `map`; with that of a pool of processes, all cores count.

    Raises: InputError if an id lies outside the vocabulary.
    """
    tasks = [
        (file, start, min(start + SPAN, file.n_tokens), vocab_size)
        for file in corpus.files
        for start in range(0, file.n_tokens, SPAN)
    ]
    counts = np.zeros(vocab_size, np.int64)
    for counts_of_span in map_tasks(_count_span, tasks):
        counts += counts_of_span
    return counts


def _count_span(task: tuple[TokenFile, int, int, int]) -> np.ndarray:
    """(vocab_size,) occurrences in a span of a file."""
    file, start, stop, vocab_size = task
    ids = file.read(start, stop)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise InputError(
            f"{file.path}: it holds token id {ids.max()}, but the vocabulary has only {vocab_size} entries; "
            f"was it binarized with another tokenizer?"
        )
    counts = np.zeros(vocab_size, np.int64)
    for i in range(0, len(ids), CACHED):
        counts += np.bincount(ids[i : i + CACHED], minlength=vocab_size)
    return counts


def load_token_counts(path: str | Path, vocab_size: int) -> np.ndarray:
    """(vocab_size,) int64 occurrences of each token. Raises: InputError if they are of another vocabulary."""
    loaded = load_plain_pickle(path)
    counts = np.asarray(loaded if is_of_integers(loaded) else "no counts")
    if counts.dtype.kind not in "iu" or (counts.size and counts.min() < 0):
        raise InputError(f"{path} holds no list of counts, one per token; scripts/token_counts.py makes one.")
    if not counts.any():
        raise InputError(f"{path} counts every token 0 times; make it again with scripts/token_counts.py.")
    if len(counts) != vocab_size:
        raise InputError(
            f"{path} counts a vocabulary of {len(counts)} tokens, but the tokenizer has {vocab_size}; "
            f"make it again with scripts/token_counts.py from this run's data file."
        )
    return counts.astype(np.int64)
