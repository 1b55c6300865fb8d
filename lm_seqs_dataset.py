"""The training sequences: an index over the corpus, with long sequences split, and short or mostly unknown ones
dropped.

No token is copied and no Python object is made per sequence: the index is two flat arrays, 12 bytes a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from corpus.files import TokenCorpus
from corpus.tokenization import boundary_ids, unknown_id
from dataset import count_per_sequence
from utils import InputError, logger

MIN_LENGTH = 12  # shorter sequences teach a language model nothing; tokens, with the two boundary tokens
SHORTEST = 3  # an encoder meets them as questions
MAX_UNKNOWN = 0.5  # share of [UNK] from which on a sequence is dropped


@dataclass
class Dropped:
    """How many sequences the index left out or cut, and why."""

    split: int = 0
    short: int = 0
    unknown: int = 0


class LmSeqsDataset:
    """Sequences of token ids ready for a model: `dataset[i]` begins with [CLS], ends with [SEP], and fits.

    A sequence longer than `max_length` is cut into parts of even length, so that no short tail is lost.

    Args:
        corpus: the binarized text.
        special_ids: the tokenizer's, as in `describe_tokenizer`.
        max_length: tokens a model can take, boundary tokens included.
        exclude: (n,) sorted indices of the corpus's sequences to leave out.
        min_length: of a sequence, in tokens; shorter ones are dropped.
        make_once: calls the function it is given, which makes named arrays; `World.make_once` lets only one process of
            a machine make them, for all to use.

    Attributes:
        lengths: (len(self),) int32, tokens with the boundary tokens.
        dropped: counts of what was split and left out.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        special_ids: dict,
        max_length: int,
        exclude: np.ndarray | None = None,
        min_length: int = MIN_LENGTH,
        make_once: Callable = lambda make: make(),
    ) -> None:
        self.corpus, self.max_length = corpus, max_length
        self.begin, self.end = boundary_ids(special_ids)
        self._check_boundaries()
        index = make_once(lambda: index_sequences(corpus, unknown_id(special_ids), max_length, exclude, min_length))
        self._starts, self.lengths = index["starts"], index["lengths"]
        self.dropped = Dropped(*index["dropped"].tolist())
        if len(self) == 0:
            raise InputError(
                f"{corpus}: no sequence is left to train on; {self.dropped.short} have fewer than {min_length} "
                f"tokens and {self.dropped.unknown} are mostly unknown tokens."
            )

    def _check_boundaries(self) -> None:
        """A few sequences are enough to recognize another tokenizer's file, or one without special tokens."""
        for i in np.unique(np.linspace(0, len(self.corpus) - 1, 100).astype(int)):
            sequence = self.corpus[i]
            if len(sequence) < 2 or sequence[0] != self.begin or sequence[-1] != self.end:
                raise InputError(
                    f"{self.corpus}: sequence {i} does not begin with id {self.begin} and end with {self.end}, as this "
                    f"tokenizer's sequences do; binarize the text with the tokenizer of this run."
                )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """(lengths[i],) int64 ids."""
        start, length = int(self._starts[i]), int(self.lengths[i])
        ids = np.empty(length, np.int64)
        ids[0], ids[-1] = self.begin, self.end
        ids[1:-1] = self.corpus.read(start, start + length - 2)
        return ids

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def first_of_file(self, files: np.ndarray) -> np.ndarray:
        """Numbers of the first sequences of these of the corpus's files; of one beyond the last, how many there are."""
        return np.searchsorted(self._starts, self.corpus.first_token[files])

    def log_summary(self, name: str) -> None:
        logger.info(
            "%s: %s sequences, %s tokens, %.0f on average; %s long ones split, %s short and %s mostly unknown dropped",
            name,
            f"{len(self):,}",
            f"{self.n_tokens:,}",
            self.n_tokens / len(self),
            f"{self.dropped.split:,}",
            f"{self.dropped.short:,}",
            f"{self.dropped.unknown:,}",
        )


def index_sequences(
    corpus: TokenCorpus,
    unknown: int | None,
    max_length: int,
    exclude: np.ndarray | None = None,
    min_length: int = MIN_LENGTH,
) -> dict[str, np.ndarray]:
    """Where the training sequences lie. Goes through the corpus block by block; reads tokens only to find `unknown`.

    Returns: `starts`, (n,) int64, place of the first token after [CLS]; `lengths`, (n,) int32, with both boundary
        tokens; `dropped`, (3,) int64, the fields of `Dropped`.
    """
    starts, lengths = np.empty(len(corpus), np.int64), np.empty(len(corpus), np.int32)
    n, dropped = 0, Dropped()
    for first, offsets, ids in corpus.blocks(tokens=unknown is not None):
        sizes = np.diff(offsets)
        keep = np.ones(len(sizes), bool)
        if exclude is not None:
            inside = exclude[slice(*np.searchsorted(exclude, (first, first + len(sizes))))]
            keep[inside - first] = False
        short = keep & (sizes < min_length)
        keep &= ~short
        dropped.short += int(short.sum())
        if unknown is not None:
            mostly_unknown = keep & (count_per_sequence(ids == unknown, offsets) >= MAX_UNKNOWN * sizes)
            keep &= ~mostly_unknown
            dropped.unknown += int(mostly_unknown.sum())
        dropped.split += int((sizes[keep] > max_length).sum())
        # From here on a sequence is its body, the tokens between the two boundary tokens.
        begins, bodies = _split_evenly(offsets[:-1][keep] + 1, sizes[keep] - 2, max_length - 2)
        stop = n + len(begins)
        if stop > len(starts):  # many were split
            _resize(starts, lengths, stop + len(starts) // 4)
        starts[n:stop], lengths[n:stop] = begins, bodies + 2
        n = stop
    _resize(starts, lengths, n)
    return {"starts": starts, "lengths": lengths, "dropped": np.array([dropped.split, dropped.short, dropped.unknown])}


def _resize(starts: np.ndarray, lengths: np.ndarray, n: int) -> None:
    """In place: a list of parts, joined at the end, would need twice the memory for a moment."""
    for array in (starts, lengths):
        array.resize(n, refcheck=False)


def _split_evenly(starts: np.ndarray, lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts spans longer than `max_length` into the fewest parts that fit, their lengths differing by one at most."""
    parts = -(-lengths // max_length)
    if (parts <= 1).all():
        return starts, lengths
    owner = np.repeat(np.arange(len(lengths)), parts)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)  # 0, 1, ... within each span
    cuts = lambda k: lengths[owner] * k // parts[owner]  # noqa: E731
    first, last = cuts(part), cuts(part + 1)
    return starts[owner] + first, last - first
