"""The training sequences: an index over the token file, with long sequences split and useless ones dropped.

No token is copied and no Python object is made per sequence: the index is two flat arrays, 12 bytes a sequence.
"""

from dataclasses import dataclass

import numpy as np

from dataset import TokenFile, boundary_ids
from utils import InputError, logger

MIN_LENGTH = 12  # shorter sequences teach nothing; tokens, with the two boundary tokens
MAX_UNKNOWN = 0.5  # share of [UNK] from which on a sequence is dropped
BLOCK = 1 << 24  # tokens looked at together when [UNK] are counted


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
        file: the binarized corpus.
        special_ids: the tokenizer's, as in `describe_tokenizer`.
        max_length: tokens a model can take, boundary tokens included.
        only: (n,) indices of the file's sequences to use; all of them if None.
        exclude: (n,) indices of the file's sequences to leave out.

    Attributes:
        lengths: (len(self),) int32, tokens with the boundary tokens.
        dropped: counts of what was split and left out.
    """

    def __init__(
        self,
        file: TokenFile,
        special_ids: dict,
        max_length: int,
        only: np.ndarray | None = None,
        exclude: np.ndarray | None = None,
    ) -> None:
        self.tokens = file.tokens
        self.begin, self.end = boundary_ids(special_ids)
        self.dropped = Dropped()
        self._check_boundaries(file)

        starts, stops = file.offsets[:-1], file.offsets[1:]
        unknown = _count_per_sequence(file, special_ids["unk"]) if _is_unknown_real(special_ids) else None
        keep = np.ones(len(file), bool)
        if only is not None:
            keep[:] = False
            keep[only] = True
        if exclude is not None:
            keep[exclude] = False

        lengths = stops - starts
        short = keep & (lengths < MIN_LENGTH)
        keep &= ~short
        self.dropped.short = int(short.sum())
        if unknown is not None:
            mostly_unknown = keep & (unknown >= MAX_UNKNOWN * lengths)
            keep &= ~mostly_unknown
            self.dropped.unknown = int(mostly_unknown.sum())
        self.dropped.split = int((lengths[keep] > max_length).sum())
        # From here on a sequence is its body, the tokens between the two boundary tokens.
        self._starts, bodies = _split_evenly(starts[keep] + 1, lengths[keep] - 2, max_length - 2)
        self.lengths = (bodies + 2).astype(np.int32)
        if len(self) == 0:
            raise InputError(
                f"{file.path}: no sequence is left to train on; {self.dropped.short} have fewer than {MIN_LENGTH} "
                f"tokens and {self.dropped.unknown} are mostly unknown tokens."
            )

    def _check_boundaries(self, file: TokenFile) -> None:
        """A look at some sequences is enough to tell another tokenizer's file, or one without special tokens."""
        for i in np.unique(np.linspace(0, len(file) - 1, 100).astype(int)):
            sequence = file[i]
            if len(sequence) < 2 or sequence[0] != self.begin or sequence[-1] != self.end:
                raise InputError(
                    f"{file.path}: sequence {i} does not begin with id {self.begin} and end with {self.end}, as this "
                    f"tokenizer's sequences do; binarize the text with the tokenizer of this run."
                )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """(lengths[i],) int64 ids."""
        start, length = self._starts[i], self.lengths[i]
        ids = np.empty(length, np.int64)
        ids[0], ids[-1] = self.begin, self.end
        ids[1:-1] = self.tokens[start : start + length - 2]
        return ids

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

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


def _is_unknown_real(special_ids: dict) -> bool:
    """GPT-2 has no unknown token, and names its end-of-text token in that place."""
    return special_ids["unk"] is not None and special_ids["unk"] not in (special_ids["eos"], special_ids["bos"])


def _count_per_sequence(file: TokenFile, token: int) -> np.ndarray:
    """(n_sequences,) int64 occurrences of `token`; reads the tokens once, block by block."""
    counts = np.zeros(len(file), np.int64)
    for start in range(0, len(file.tokens), BLOCK):
        found = start + np.flatnonzero(file.tokens[start : start + BLOCK] == token)
        if found.size:
            sequences, n = np.unique(np.searchsorted(file.offsets, found, side="right") - 1, return_counts=True)
            counts[sequences] += n
    return counts


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
