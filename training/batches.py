"""Sequences -> ragged batches with their labels -> padded micro-batches, which go through the models.

Runs in the loader's worker processes, so that the training loop neither draws masks nor asks the device how many tokens
there are. Batch j of an epoch, its mask included, is a function of (seed, epoch, j) alone: neither the number of
workers nor of processes nor a restart changes it.

Dimensions: bs sequences of n_tokens tokens in all, padded to seq_length; n_labels of the tokens have a label; n_rows
reach the vocabulary head; voc_size. A position is an index into a flattened micro-batch.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from grouped_batch_sampler import GROUP_WIDTH, GroupedBatchSampler, create_lengths_groups
from lm_seqs_dataset import LmSeqsDataset
from models.packing import Packing
from training.distributed import World
from training.masking import NO_LABEL, Masking, mask_tokens
from training.recipe import Recipe
from utils import ignore_stop_signals


@dataclass(frozen=True)
class Batch:
    """Ragged: the sequences one after the other, without padding."""

    ids: np.ndarray  # (n_tokens,) int64, masked
    labels: np.ndarray  # (n_tokens,) int64, what to predict at each token, or NO_LABEL
    lengths: np.ndarray  # (bs,) int64

    @classmethod
    def join(cls, batches: list["Batch"]) -> "Batch":
        """All sequences of several batches."""
        parts = ([getattr(batch, field.name) for batch in batches] for field in fields(cls))
        return cls(*map(np.concatenate, parts))

    def take(self, sequences: np.ndarray) -> "Batch":
        """Some of its sequences, by number and in that order."""
        stops = np.cumsum(self.lengths)
        places = np.concatenate([np.arange(stops[i] - self.lengths[i], stops[i]) for i in sequences])
        return Batch(self.ids[places], self.labels[places], self.lengths[sequences])


class Group(NamedTuple):
    """Sequences of similar length among those of one row."""

    positions: torch.Tensor  # (bs, seq_length) int64; in place of padding, that of the sequence's last token
    attended: torch.Tensor  # (bs, seq_length) bool


@dataclass
class MicroBatch:
    """What goes through the models in one pass."""

    input_ids: torch.Tensor  # (bs, seq_length) int64
    attention_mask: torch.Tensor | None  # (bs, seq_length) bool; None: nothing is padded, so attention is faster
    token_positions: torch.Tensor  # (n_tokens,) int64
    row_positions: torch.Tensor  # (n_rows,) int64; the n_labels that have a label come first, in the order of `labels`
    labels: torch.Tensor  # (n_labels,) int64
    packing: Packing | None = None  # where it is one row that holds all sequences
    groups: list[Group] | None = None  # of these, if a loss looks at sequences (see `Padding.grouped`)

    @property
    def label_positions(self) -> torch.Tensor:
        """(n_labels,) int64."""
        return self.row_positions[: len(self.labels)]

    @property
    def lengths(self) -> torch.Tensor:
        """(number of sequences,) integers, tokens of each."""
        if self.packing is not None:
            return self.packing.ends.diff()
        if self.attention_mask is None:
            return torch.full((len(self.input_ids),), self.input_ids.shape[1])
        return self.attention_mask.sum(1)

    @property
    def n_sequences(self) -> int:
        return len(self.input_ids) if self.packing is None else len(self.packing.ends) - 1

    def by_sequence(self, *flat: torch.Tensor) -> Iterator[tuple[list[torch.Tensor], torch.Tensor | None]]:
        """Its sequences side by side: all of them, or of packed ones a group of similar length at a time.

        Args:
            flat: (bs * seq_length, width) each.

        Yields: (bs, seq_length, width) for each of these, and (bs, seq_length) bool, what is no padding; None: all is.
        """
        if self.packing is None:
            yield [tensor.unflatten(0, self.input_ids.shape) for tensor in flat], self.attention_mask
            return
        for positions, attended in self.groups:
            chosen = (tensor.index_select(0, positions.flatten()) for tensor in flat)
            yield [tensor.unflatten(0, positions.shape) for tensor in chosen], attended

    def to(self, device: torch.device) -> "MicroBatch":
        """On the CPU nothing is copied; to a GPU the copy runs beside the computation, if pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> "MicroBatch":
        def mapped(part):
            if isinstance(part, list):
                return [mapped(each) for each in part]
            if isinstance(part, Packing | Group):
                return type(part)(*map(mapped, part))
            return function(part) if isinstance(part, torch.Tensor) else part

        return MicroBatch(*(mapped(getattr(self, field.name)) for field in fields(self)))


# ---------------------------------------------------------------------------------------------- sequences to batches


def prepare_batch_mlm(sequences: list[np.ndarray], masking: Masking, generator: np.random.Generator) -> Batch:
    """The labels are the original tokens at the masked ones."""
    ids, lengths = _flatten(sequences)
    return Batch(*mask_tokens(ids, masking, generator), lengths)


def prepare_batch_clm(sequences: list[np.ndarray]) -> Batch:
    """The label of a token is the token after it; the last one of a sequence has none."""
    ids, lengths = _flatten(sequences)
    labels = np.roll(ids, -1)
    labels[np.cumsum(lengths) - 1] = NO_LABEL
    return Batch(ids, labels, lengths)


def prepare_batch(sequences: list[np.ndarray], masking: Masking | None, generator: np.random.Generator) -> Batch:
    """With masked tokens, or with next tokens where there is no masking."""
    return prepare_batch_mlm(sequences, masking, generator) if masking else prepare_batch_clm(sequences)


def _flatten(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(sequences, dtype=np.int64), np.array([len(sequence) for sequence in sequences])


class Batches(Dataset):
    """Map from j to the j-th batch of an epoch.

    Args:
        dataset: the sequences.
        sampler: which of them form a batch, already set to the epoch.
        seed: of the masks, (seed of the run, epoch).
        masking: None for a causal model.
    """

    def __init__(
        self, dataset: LmSeqsDataset, sampler: GroupedBatchSampler, seed: tuple[int, int], masking: Masking | None
    ) -> None:
        self.dataset, self.sampler, self.seed, self.masking = dataset, sampler, seed, masking

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, j: int) -> Batch:
        sequences = [self.dataset[i] for i in self.sampler.batch(j)]
        return prepare_batch(sequences, self.masking, np.random.default_rng([*self.seed, j]))


# --------------------------------------------------------------------------------------------- batches to micro-batches


MAX_PADDING = 1 / 8  # of the positions of a micro-batch, beyond what a sequence alone is padded by
# What a micro-batch costs beside its positions, in positions. A GPU waits some 17 ms for the thousand launches of one,
# in which a BERT-base and its student could read 6,000 tokens. (An estimate for an H100 in bfloat16, from 2,700 tokens
# in 25 ms by the account of scripts/benchmark_launches.py, and 15,580 tokens in 61 ms as measured.) On a CPU the
# gradients of embeddings and projection take a fixed time, whatever the micro-batch; 64 and 256 were not faster.
MICRO_BATCH_PRICE = {"cuda": 6000, "cpu": 128}


class Padding(NamedTuple):
    """What sequences are padded with, and how far.

    Attributes:
        pad_id: of the tokenizer.
        max_length: pad no further, since the models have no more positions.
        price: so many positions of padding are worth one micro-batch less.
        free: nothing is padded, and the sequences of a micro-batch lie one after the other.
        grouped: then a loss still needs sequences side by side, so those of similar length form a `Group`.
    """

    pad_id: int
    max_length: int | None = None
    price: int = 0
    free: bool = False
    grouped: bool = False


def pad(batch: Batch, padding: Padding, head_on_all_tokens: bool) -> MicroBatch:
    """A batch as one micro-batch.

    The length is rounded up to a multiple of GROUP_WIDTH. Where all sequences are of equal length, nothing is padded.

    Args:
        head_on_all_tokens: the logits of all tokens are needed, not only of those with a label.
    """
    longest = seq_length = int(batch.lengths.max())
    if (batch.lengths != longest).any():
        seq_length = -(-longest // GROUP_WIDTH) * GROUP_WIDTH
        seq_length = max(longest, min(seq_length, padding.max_length or seq_length))
    attended = np.arange(seq_length) < batch.lengths[:, None]  # (bs, seq_length)
    input_ids = np.full(attended.shape, padding.pad_id)
    input_ids[attended] = batch.ids
    mask = None if attended.all() else torch.from_numpy(attended)
    return MicroBatch(
        torch.from_numpy(input_ids), mask, *_positions(batch, np.flatnonzero(attended), head_on_all_tokens)
    )


def pack(batch: Batch, padding: Padding, head_on_all_tokens: bool) -> MicroBatch:
    """A batch as one micro-batch without padding."""
    places = np.arange(len(batch.ids))
    ends = np.append(0, np.cumsum(batch.lengths))
    position_ids = places - np.repeat(ends[:-1], batch.lengths)
    packing = Packing(
        torch.from_numpy(position_ids)[None], torch.from_numpy(ends).int(), int(batch.lengths.max(initial=0))
    )
    groups = _groups(batch.lengths, padding.price) if padding.grouped else None
    positions = _positions(batch, places, head_on_all_tokens)
    return MicroBatch(torch.from_numpy(batch.ids)[None], None, *positions, packing, groups)


def _groups(lengths: np.ndarray, price: int) -> list[Group]:
    """The sequences of one row, cut by length as if each group were a micro-batch."""
    ends, groups = np.cumsum(lengths)[:, None], []
    for part in _parts_of_similar_length(lengths, sys.maxsize, price):
        of_part = lengths[part, None]
        places = np.arange(of_part.max())  # in a sequence
        positions = ends[part] - of_part + np.minimum(places, of_part - 1)
        groups.append(Group(torch.from_numpy(positions), torch.from_numpy(places < of_part)))
    return groups


def _positions(batch: Batch, positions: np.ndarray, head_on_all_tokens: bool) -> tuple[torch.Tensor, ...]:
    """`token_positions`, `row_positions` and `labels` of a micro-batch, from the positions of the batch's tokens."""
    has_label = batch.labels != NO_LABEL  # (n_tokens,)
    rows = [positions[has_label], *([positions[~has_label]] if head_on_all_tokens else [])]
    return tuple(map(torch.from_numpy, (positions, np.concatenate(rows), batch.labels[has_label])))


def cut_micro_batches(
    batches: list[Batch], padding: Padding, tokens: int = 0, head_on_all_tokens: bool = False
) -> list[MicroBatch]:
    """The sequences of some batches in parts within a number of tokens; if they are padded, sorted by length, so that
    those of a part are of similar length.

    The masks were drawn with the batches and stay with their sequences. The loss is a mean over all tokens of a step,
    however they are grouped, so this changes only the rounding. It saves padding, because the batches of a step are of
    many lengths, and it bounds the memory, because only one micro-batch is in the models at any time.

    Args:
        batches: of a step; a process may have none in a short last step.
        tokens: of a micro-batch, padding included; a longer sequence goes alone. 0: each batch is a micro-batch.
        head_on_all_tokens: see `pad`.
    """
    if tokens and batches:
        together = Batch.join(batches)
        if padding.free:
            parts = _parts_of_equal_size(together.lengths, tokens)
        else:
            parts = _parts_of_similar_length(together.lengths, tokens, padding.price)
        batches = [together.take(part) for part in parts]
    if padding.free:
        return [pack(batch, padding, head_on_all_tokens) for batch in batches]
    return [pad(batch, padding, head_on_all_tokens) for batch in batches]


def _parts_of_similar_length(lengths: np.ndarray, tokens: int, price: int) -> list[np.ndarray]:
    """The sequences, shortest first, cut where the next would make a part too large or waste too much.

    Sorted, the next sequence is the longest of the open part, so all of the part would be padded to its width. The part
    is closed if it would then have too many positions, or if more than MAX_PADDING of these, and more than the price of
    a micro-batch, were padding that the sequences, each padded to its own multiple of GROUP_WIDTH, would not have.
    """
    in_order = np.argsort(lengths, kind="stable")
    widths = create_lengths_groups(lengths[in_order]) * GROUP_WIDTH  # what a sequence alone is padded to
    cuts = []
    first, alone = 0, 0  # of the open part: its first sequence, and its positions, were each padded to its own width
    for i, width in enumerate(widths):
        positions = (i + 1 - first) * width
        alone += width
        if i and (positions > tokens or positions - alone > max(MAX_PADDING * positions, price)):
            cuts.append(i)
            first, alone = i, width
    return np.split(in_order, cuts)


def _parts_of_equal_size(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """The sequences as they come, in parts of about as many tokens each.

    Of the tokens in all, a part gets the sequences that begin in its share, so it exceeds that by less than a sequence.
    """
    total = lengths.sum()
    n = 1 if total <= tokens else -(-total // max(1, tokens - lengths.max()))
    begins = np.cumsum(lengths) - lengths
    cuts = np.flatnonzero(np.diff(begins * n // total)) + 1
    return np.split(np.arange(len(lengths)), cuts)


class MicroBatches(Dataset):
    """Map from the numbers of some batches, such as those of a step, to the micro-batches they are cut into; arguments
    as of `cut_micro_batches`."""

    def __init__(self, batches: Batches, padding: Padding, tokens: int = 0, head_on_all_tokens: bool = False) -> None:
        self.batches, self.padding, self.tokens, self.head_on_all_tokens = batches, padding, tokens, head_on_all_tokens

    def __getitem__(self, numbers: Iterable[int]) -> list[MicroBatch]:
        batches = [self.batches[j] for j in numbers]
        return cut_micro_batches(batches, self.padding, self.tokens, self.head_on_all_tokens)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Those of all batches, batch by batch."""
        for j in range(len(self.batches)):
            yield from self[[j]]


# ------------------------------------------------------------------------------------------------------ the run's data


class StepCounts(NamedTuple):
    """How much a step holds, on all processes together."""

    tokens: float = 0
    rows: float = 0  # that reach the vocabulary head
    labels: float = 0
    pairs: float = 0  # of tokens that attend to each other: the sum of squared lengths
    sequences: float = 0

    @classmethod
    def of(cls, micro_batches: list[MicroBatch]) -> "StepCounts":
        """The counts of this process alone."""
        return cls(
            sum(len(micro_batch.token_positions) for micro_batch in micro_batches),
            sum(len(micro_batch.row_positions) for micro_batch in micro_batches),
            sum(len(micro_batch.labels) for micro_batch in micro_batches),
            sum(int(micro_batch.lengths.square().sum()) for micro_batch in micro_batches),
            sum(micro_batch.n_sequences for micro_batch in micro_batches),
        )

    def over_all(self, world: World) -> Callable[[], "StepCounts"]:
        """Begins to sum them over the processes, in main memory, so that no device is waited for. Returns: what waits
        for the sums."""
        counts = torch.tensor(self, dtype=torch.float64)
        wait = world.begin_all_reduce(counts)

        def finish() -> StepCounts:
            wait()
            return StepCounts(*counts.tolist())

        return finish


@dataclass(frozen=True)
class RunData:
    """The text of a run.

    Attributes:
        train_set, train_sampler: what to train on, and in which order.
        masking: None for a causal model.
        padding: how it is padded.
        held_out: what to evaluate on (see `evaluation.held_out`); empty: nothing.
        left_out: (n,) the sequences that `--leave_out` lists.
    """

    train_set: LmSeqsDataset
    train_sampler: GroupedBatchSampler
    masking: Masking | None
    padding: Padding
    held_out: dict[str, MicroBatches]
    left_out: np.ndarray | None = None

    def head_on_all_tokens(self, recipe: Recipe) -> bool:
        """Whether the logits of all tokens are needed: of a causal model they always are."""
        return recipe.head_on_all_tokens or self.masking is None

    def some(self, n: int, recipe: Recipe) -> list[MicroBatch]:
        """`n` sequences from all over the training text, without masks."""
        places = np.linspace(0, len(self.train_set) - 1, n).astype(int)
        batch = prepare_batch_clm([self.train_set[i] for i in np.unique(places)])
        return cut_micro_batches([batch], self.padding, recipe.tokens_per_micro_batch)

    def steps(self, recipe: Recipe, world: World, epoch: int, first_step: int) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of each step of an epoch, from `first_step` on.

        The sampler numbers the batches of the epoch for all processes, and a step takes the next of them:
        `gradient_accumulation_steps` times the number of processes. In a short last step, a process may have none.
        """
        self.train_sampler.set_epoch(epoch)
        batches = Batches(self.train_set, self.train_sampler, (recipe.seed, epoch), self.masking)
        per_step = recipe.gradient_accumulation_steps * world.size
        n_steps = -(-len(self.train_sampler) // per_step)
        share = functools.partial(self.train_sampler.share, n=per_step, rank=world.rank, world_size=world.size)
        workers = recipe.num_workers
        return iter(
            DataLoader(
                MicroBatches(batches, self.padding, recipe.tokens_per_micro_batch, self.head_on_all_tokens(recipe)),
                batch_size=None,
                sampler=map(share, range(first_step, n_steps)),
                num_workers=workers,
                pin_memory=world.device.type == "cuda",
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares the index
                generator=torch.Generator(),  # otherwise it would draw from the one that dropout uses
                worker_init_fn=ignore_stop_signals,
            )
        )
