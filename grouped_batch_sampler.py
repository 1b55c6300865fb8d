"""Which sequences form which batch, and in which order: a function of (seed, epoch, position).

A batch holds sequences of similar length, so that it needs little padding. Sorted by group, the lengths are the same in
every epoch. So batches are cut once, and an epoch only shuffles sequences within their group, and the batches. The
number of batches is the same in every epoch, and each sequence is in exactly one.

With weights, an epoch draws the sequences of each source so many times: of a weight of 2.5, all of them twice, and
another half of them each epoch. How many that are is fixed for each source and group, so that the lengths, and with
them the batches, stay the same here too.
"""

import itertools
from collections.abc import Callable

import numpy as np

from utils import InputError

BLOCK = 1 << 22  # sequences
GROUP_WIDTH = 8  # tokens; also what tensor cores want lengths to be a multiple of


def create_lengths_groups(lengths: np.ndarray, width: int = GROUP_WIDTH) -> np.ndarray:
    """(n,) group of each sequence: group g holds the lengths from (g - 1) * width + 1 to g * width."""
    return -(-lengths // width)


class GroupedBatchSampler:
    """The batches of each epoch.

    Args:
        lengths: (n,) tokens of each sequence.
        batch_size: sequences a batch; either it or `tokens_per_batch`.
        tokens_per_batch: as many sequences a batch as fit into this number of tokens, padding included.
        group_by_size: put sequences of similar length together.
        shuffle: draw a new order each epoch.
        seed: of the order.
        make_once: see `LmSeqsDataset`.
        sources: None, or (n_sources + 1,) where each source begins among the sequences, and the end of the last.
        weights: (n_sources,) how often an epoch draws each source.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        group_by_size: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        make_once: Callable = lambda make: make(),
        sources: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        assert (batch_size is None) != (tokens_per_batch is None)
        assert group_by_size or tokens_per_batch is None, "a token budget needs sequences grouped by length"
        self.lengths, self.shuffle, self.seed = lengths, shuffle, seed
        if sources is None:
            sources, weights = np.array([0, len(lengths)]), np.ones(1)
        plan = make_once(
            lambda: cut_batches(lengths, batch_size, tokens_per_batch, group_by_size, np.asarray(sources), weights)
        )
        self._sorted, self._group_bounds, self._bounds = plan["sorted"], plan["group_bounds"], plan["bounds"]
        self._sizes, self._draws = plan["sizes"], plan["draws"]
        self._all_once = np.array_equal(self._sizes, self._draws)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches an epoch, over all processes."""
        return len(self._bounds) - 1

    @property
    def n_tokens(self) -> int:
        """Of the current epoch."""
        drawn = self.lengths if self._all_once else self.lengths[self._sequences]
        return int(drawn.sum(dtype=np.int64))

    @property
    def n_sequences(self) -> int:
        """Of each epoch."""
        return len(self._sequences)

    def set_epoch(self, epoch: int) -> None:
        """Makes the order of `epoch` the current one; always from scratch, so a restart changes nothing."""
        self._sequences = self._batches = None  # frees those of the epoch before
        self._sequences = self._draw(epoch)
        self._batches = np.arange(len(self), dtype=_index_dtype(len(self)))
        if self.shuffle:
            generator = np.random.default_rng([self.seed, epoch])
            for start, stop in zip(self._group_bounds[:-1], self._group_bounds[1:], strict=True):
                generator.shuffle(self._sequences[start:stop])
            generator.shuffle(self._batches)

    def _draw(self, epoch: int) -> np.ndarray:
        """The epoch's sequences, group by group."""
        if self._all_once:
            return self._sorted.copy()
        parts, start = [], 0
        for size, draws in zip(self._sizes.ravel().tolist(), self._draws.ravel().tolist(), strict=True):
            block = self._sorted[start : start + size]
            times, rest = divmod(draws, max(size, 1))
            parts += [block] * times
            if rest:  # the next ones of an order that stays the same, so that none is left out for long
                order = np.random.default_rng([self.seed, start]).permutation(block)
                parts.append(np.take(order, np.arange(epoch * rest, (epoch + 1) * rest), mode="wrap"))
            start += size
        return np.concatenate(parts)

    def batch(self, j: int) -> np.ndarray:
        """The indices of the sequences in the j-th batch of the current epoch."""
        k = self._batches[j]
        return self._sequences[self._bounds[k] : self._bounds[k + 1]]

    def share(self, step: int, n: int, rank: int, world_size: int) -> list[int]:
        """Which of a step's `n` batches process `rank` of `world_size` takes; a short last step has fewer than `n`.

        All wait for the process with the most tokens. So the batches go, longest first, each to the process that has
        the fewest tokens so far.
        """
        numbers = range(step * n, min((step + 1) * n, len(self)))
        if world_size == 1:
            return list(numbers)
        batches = [self.batch(j) for j in numbers]
        starts = np.cumsum([0, *map(len, batches[:-1])])
        tokens = np.add.reduceat(self.lengths[np.concatenate(batches)], starts)  # (number of batches,)
        loads, mine = [0] * world_size, []
        for i in np.argsort(-tokens, kind="stable").tolist():
            least = loads.index(min(loads))
            loads[least] += int(tokens[i])
            if least == rank:
                mine.append(numbers[i])
        return mine


def cut_batches(
    lengths: np.ndarray,
    batch_size: int | None,
    tokens_per_batch: int | None,
    group_by_size: bool,
    sources: np.ndarray,
    weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """Sorts sequences by their groups, and cuts batches from what an epoch draws of the sorted order.

    Returns: `sorted`, (n,) the sequences, in each group source by source; `sizes` and `draws`, (n_groups, n_sources)
        how many there are and how many an epoch draws; `group_bounds`, where each group begins among the drawn, and the
        end of the last; `bounds`, the same for batches.
    """
    n = len(lengths)
    if group_by_size:
        sizes = np.stack([_group_sizes(lengths[a:b], lengths.max()) for a, b in itertools.pairwise(sources)], axis=1)
        in_order = _sort_by_group(lengths, sizes.sum(axis=1))
    else:
        in_order, sizes = np.arange(n, dtype=_index_dtype(n)), np.diff(sources)[None]
    draws = np.ceil(np.round(sizes * weights, 6)).astype(np.int64)
    draws = np.maximum(draws, sizes > 0)  # so that no group is left out for good
    drawn = draws.sum(axis=1)
    if tokens_per_batch is None:
        bounds = np.append(np.arange(0, drawn.sum(), batch_size), drawn.sum())
    else:
        bounds = _cut_by_tokens(drawn, tokens_per_batch)
    group_bounds = np.concatenate([[0], np.cumsum(drawn)])
    return {"sorted": in_order, "sizes": sizes, "draws": draws, "group_bounds": group_bounds, "bounds": bounds}


def _group_sizes(lengths: np.ndarray, longest: int) -> np.ndarray:
    """(n_groups,) sequences in each group, up to that of the longest length."""
    counts = np.zeros(int(create_lengths_groups(longest)) + 1, np.int64)
    for first in range(0, len(lengths), BLOCK):
        counts += np.bincount(create_lengths_groups(lengths[first : first + BLOCK]), minlength=len(counts))
    return counts


def _sort_by_group(lengths: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n,) the sequences group by group, in each in their order: what a stable argsort of the groups gives, block by
    block, since for half a billion sequences that alone would take 5 GB.

    Args:
        sizes: (n_groups,) sequences in each group.
    """
    in_order = np.empty(len(lengths), _index_dtype(len(lengths)))
    free = np.cumsum(sizes) - sizes  # where the next of each group belongs
    for first in range(0, len(lengths), BLOCK):
        groups = create_lengths_groups(lengths[first : first + BLOCK]).astype(np.uint16)  # 16 bits: sorted by counting
        counts = np.bincount(groups, minlength=len(sizes))
        places = np.arange(len(groups)) + np.repeat(free - (np.cumsum(counts) - counts), counts)
        in_order[places] = first + np.argsort(groups, kind="stable")
        free += counts
    return in_order


def _index_dtype(n: int) -> np.dtype:
    return np.dtype(np.int32 if n < 1 << 31 else np.int64)


def _cut_by_tokens(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Cuts so that (sequences in a batch) x (its longest, padded to its group's width) stays within the budget.

    The sequences stand in groups of growing width. Within a group every batch but the first holds as many as fit; the
    first one may have been opened by shorter sequences of earlier groups, each of which now counts with the width of
    this group, so it may be full at once. A group costs one `arange`, however many sequences it has.

    Args:
        sizes: sequences in each group; those of group g are padded to g * GROUP_WIDTH tokens.
    """
    longest = int(np.flatnonzero(sizes)[-1]) * GROUP_WIDTH
    if longest > budget:
        raise InputError(
            f"--tokens_per_batch {budget}: the longest sequence alone takes {longest} tokens; raise it to that."
        )
    cuts = [np.zeros(1, np.int64)]
    start = position = 0  # of the batch that is not full yet, and of the group
    for group in np.flatnonzero(sizes):
        fit = budget // (int(group) * GROUP_WIDTH)
        stop = position + int(sizes[group])
        first = max(start + fit, position)  # where the open batch is full
        if first < stop:
            full = np.arange(first, stop, fit)
            cuts.append(full)
            start = int(full[-1])
        position = stop
    return np.append(np.concatenate(cuts), position)
