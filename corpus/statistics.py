"""Statistics of a corpus from a single pass: lengths, tokens, unknown and misplaced ones, duplicates."""

from dataclasses import dataclass

import numpy as np

from corpus.files import TokenCorpus
from corpus.tokenization import boundary_ids, has_boundaries, unknown_id
from dataset import count_per_sequence
from utils import progress_bar

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, and its bits look random
PLACE_WEIGHTS = np.random.default_rng(0).integers(1 << 63, size=1 << 16, dtype=np.uint64) << np.uint64(1) | np.uint64(1)


@dataclass
class CorpusStatistics:
    """All that `survey` finds.

    Attributes:
        lengths: (n_sequences,) int32, tokens with the boundary tokens.
        counts: (n_ids,) int64, occurrences of each id up to the largest.
        distinct: sequences that differ from all before them.
        most_repeated: number of the sequence that occurs most often, and how often.
        unknown: (n_sequences,) float32, share of [UNK] in each sequence.
        misplaced: (n,) sequences that do not begin and end with the boundary tokens.
        special_inside: name of a special token -> how often it occurs anywhere but at the ends, if it does.
    """

    lengths: np.ndarray
    counts: np.ndarray
    distinct: int
    most_repeated: tuple[int, int]
    unknown: np.ndarray
    misplaced: np.ndarray
    special_inside: dict[str, int]


def survey(corpus: TokenCorpus, special_ids: dict) -> CorpusStatistics:
    """Reads the whole corpus once; some tens of bytes of memory a sequence.

    Args:
        special_ids: the tokenizer's, as in `describe_tokenizer`.
    """
    n = len(corpus)
    lengths, hashes, unknown = np.empty(n, np.int32), np.empty(n, np.uint64), np.zeros(n, np.float32)
    counts = np.zeros(0, np.int64)
    misplaced = []
    unk = unknown_id(special_ids)
    with progress_bar(total=corpus.n_tokens, unit=" tokens", unit_scale=True) as progress:
        for first, offsets, ids in corpus.blocks():
            offsets = offsets - offsets[0]
            block = slice(first, first + len(offsets) - 1)
            lengths[block] = np.diff(offsets)
            hashes[block] = hash_sequences(ids, offsets)
            shorter, counts = sorted((counts, np.bincount(ids)), key=len)  # each is as long as its largest id asks for
            counts[: len(shorter)] += shorter
            misplaced.append(first + np.flatnonzero(~has_boundaries(ids, offsets, special_ids)))
            if unk is not None:
                unknown[block] = count_per_sequence(ids == unk, offsets) / np.maximum(lengths[block], 1)
            progress.update(len(ids))
    misplaced = np.concatenate(misplaced)
    inside = _special_inside(counts, special_ids, n - len(misplaced))
    return CorpusStatistics(lengths, counts, *_count_distinct(hashes), unknown, misplaced, inside)


def _special_inside(counts: np.ndarray, special_ids: dict, n_at_ends: int) -> dict[str, int]:
    begin, end = boundary_ids(special_ids)
    inside = {}
    for name, id_ in special_ids.items():
        if id_ is not None and id_ < len(counts) and id_ != unknown_id(special_ids):
            inside[name] = int(counts[id_]) - n_at_ends * ((id_ == begin) + (id_ == end))
    return {name: n for name, n in inside.items() if n}


def hash_sequences(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n_sequences,) uint64, equal for equal sequences, and for others once in 2^64 pairs or so.

    A multilinear hash: the sum over the sequence of (mixed id x random odd factor of its position), modulo 2^64.
    """
    lengths = np.diff(offsets)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * GOLDEN
    mixed ^= mixed >> np.uint64(29)
    mixed *= PLACE_WEIGHTS[place & (len(PLACE_WEIGHTS) - 1)]
    hashes = np.zeros(len(lengths), np.uint64)
    filled = lengths > 0
    if filled.any():
        hashes[filled] = np.add.reduceat(mixed, offsets[:-1][filled])
    return hashes


def _count_distinct(hashes: np.ndarray) -> tuple[int, tuple[int, int]]:
    in_order = np.sort(hashes)
    begins = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
    times = np.diff(np.append(begins, len(hashes)))
    k = int(times.argmax())
    return len(begins), (int(np.argmax(hashes == in_order[begins[k]])), int(times[k]))
