"""How often each token occurs in a corpus: counted, or read from what lies beside its files or from a pickled list."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from corpus.files import TokenCorpus
from dataset import TokenFile, open_token_file
from files.atomic import write_json
from files.json_reader import read_json
from files.plain_pickle import is_of_integers, load_plain_pickle
from utils import InputError

SAVED = {"sequences": int, "tokens": int, "crc32": int, "counts": [int]}
SPAN = 1 << 22  # tokens of one task
CACHED = 1 << 18  # tokens counted at once: bincount makes them 64 bits wide, and these then fit into a core's cache


def count_tokens(corpus: TokenCorpus, vocab_size: int, map_tasks: Callable = map) -> np.ndarray:
    """(vocab_size,) int64 occurrences of each token in a corpus.

    Args:
        corpus: what to count; of files with their counts beside them (`save_counts`) not a token is read.
        vocab_size: entries of the vocabulary.
        map_tasks: like `map`; with that of a pool of processes, all cores count.

    Raises: InputError if an id lies outside the vocabulary.
    """
    counts, uncounted = sum_saved_counts(corpus, vocab_size)
    tasks = [
        (file, start, min(start + SPAN, file.n_tokens), vocab_size)
        for file in uncounted.files
        for start in range(0, file.n_tokens, SPAN)
    ]
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


def save_counts(path: str | Path) -> None:
    """Counts a binarized file that was just written, and leaves the counts beside it, in `<path>.counts`."""
    corpus = TokenCorpus([open_token_file(path)])
    counts = count_tokens(corpus, corpus.made_by["vocab_size"])
    write_json(f"{path}.counts", {**corpus.identity, "counts": counts.tolist()})


def sum_saved_counts(corpus: TokenCorpus, vocab_size: int) -> tuple[np.ndarray, TokenCorpus]:
    """(vocab_size,) int64, the sum of the counts that lie beside a corpus's files; and the files that have none."""
    counts, uncounted = np.zeros(vocab_size, np.int64), []
    for file in corpus.files:
        saved = _saved_counts(file, vocab_size)
        if saved is None:
            uncounted.append(file)
        else:
            counts += saved
    return counts, TokenCorpus(uncounted)


def _saved_counts(file: TokenFile, vocab_size: int) -> np.ndarray | None:
    """(vocab_size,) int64, the counts beside a file; None if there are none, or they are of another file."""
    path = Path(f"{file.path}.counts")
    if not path.is_file():
        return None
    saved = read_json(path, SAVED, "remove it, so that the tokens are counted again")
    counts = np.array(saved.pop("counts"), np.int64)
    is_of_this_file = saved == TokenCorpus([file]).identity and counts.sum() == file.n_tokens
    return counts if is_of_this_file and len(counts) == vocab_size else None


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
