"""Which sequences stand in which micro-batch, and in which order: a function of (seed, epoch, position).

Sequences of similar length share a micro-batch, so that little is padded. Sorted by group, the lengths stand in the
same order in every epoch; so the cuts between micro-batches are made once, and an epoch only shuffles the sequences
within their group and the micro-batches among themselves. The number of micro-batches is the same in every epoch, and
each sequence is in exactly one.
"""

import numpy as np

from utils import InputError

GROUP_WIDTH = 8  # tokens; also what tensor cores want lengths to be a multiple of


def create_lengths_groups(lengths: np.ndarray, width: int = GROUP_WIDTH) -> np.ndarray:
    """(n,) group of each sequence: group g holds the lengths from (g - 1) * width + 1 to g * width."""
    return -(-lengths // width)


class GroupedBatchSampler:
    """The micro-batches of each epoch.

    Args:
        lengths: (n,) tokens of each sequence.
        batch_size: sequences a micro-batch; either it or `tokens_per_batch`.
        tokens_per_batch: as many sequences a micro-batch as fit into this number of tokens, padding included.
        group_by_size: put sequences of similar length together.
        shuffle: draw a new order each epoch.
        seed: of the order.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        group_by_size: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        assert (batch_size is None) != (tokens_per_batch is None)
        n = len(lengths)
        self.shuffle, self.seed = shuffle, seed
        if group_by_size:
            groups = create_lengths_groups(lengths)
            self._sorted = np.argsort(groups, kind="stable").astype(_index_dtype(n))
            in_order = groups[self._sorted]
            self._group_bounds = [0, *(np.flatnonzero(np.diff(in_order)) + 1), n]
            padded = in_order * GROUP_WIDTH
        else:
            self._sorted = np.arange(n, dtype=_index_dtype(n))
            self._group_bounds = [0, n]
            padded = None
        if tokens_per_batch is None:
            self._bounds = np.append(np.arange(0, n, batch_size), n)
        else:
            assert padded is not None, "a token budget needs sequences grouped by length"
            self._bounds = _cut_by_tokens(padded, tokens_per_batch)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Micro-batches an epoch, over all processes."""
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        """Makes the order of `epoch` the current one; always from scratch, so a restart changes nothing."""
        self._sequences = self._sorted.copy()
        self._micro_batches = np.arange(len(self), dtype=_index_dtype(len(self)))
        if self.shuffle:
            generator = np.random.default_rng([self.seed, epoch])
            for start, stop in zip(self._group_bounds[:-1], self._group_bounds[1:], strict=True):
                generator.shuffle(self._sequences[start:stop])
            generator.shuffle(self._micro_batches)

    def micro_batch(self, j: int) -> np.ndarray:
        """The indices of the sequences in the j-th micro-batch of the current epoch."""
        k = self._micro_batches[j]
        return self._sequences[self._bounds[k] : self._bounds[k + 1]]

    def share_of_rank(self, rank: int, world_size: int, start: int = 0) -> range:
        """The micro-batches j >= start that process `rank` of `world_size` takes: every world_size-th.

        `start` is a multiple of `world_size`.
        """
        assert start % world_size == 0
        return range(start + rank, len(self), world_size)


def _index_dtype(n: int) -> np.dtype:
    return np.dtype(np.int32 if n < 1 << 31 else np.int64)


def _cut_by_tokens(padded: np.ndarray, budget: int) -> np.ndarray:
    """Cuts ascending lengths so that (sequences in a part) x (its longest) stays within the budget."""
    if padded[-1] > budget:
        raise InputError(
            f"--tokens_per_batch {budget}: the longest sequence alone takes {padded[-1]} tokens; raise it to that."
        )
    bounds = [0]
    while bounds[-1] < len(padded):
        start = bounds[-1]
        stop = start + budget // int(padded[start])  # at most so many, since the lengths only grow
        window = padded[start:stop]
        fits = window * np.arange(1, len(window) + 1) <= budget
        bounds.append(start + int(fits.sum()))
    return np.array(bounds)
