"""Sequences -> what goes through the models: padded, masked, cut into micro-batches, and with the positions of interest
already found.

Runs in the loader's worker processes, so that the training loop neither draws masks nor asks the device how many tokens
there are. Batch j of an epoch, its mask included, is a function of (seed, epoch, j) alone: neither the number of
workers nor of processes nor a restart changes it.

Dimensions: bs sequences, padded to seq_length; n_tokens attended positions of the flattened batch; n_rows positions
that reach the vocabulary head; n_labels positions with a label; voc_size.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from corpus.tokenization import word_beginnings
from grouped_batch_sampler import GROUP_WIDTH, GroupedBatchSampler, create_lengths_groups
from lm_seqs_dataset import LmSeqsDataset
from training.distributed import World
from training.recipe import Recipe
from utils import ignore_stop_signals


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen and replaced (BERT's 80/10/10, XLM's emphasis on rare tokens).

    Attributes:
        token_probs: (voc_size,) weight of each token to be chosen; 0 for special tokens.
        random_ids: ids that a random replacement may be: all but the special ones.
        mask_id: [MASK].
        proportion: share of the attended tokens that is chosen.
        word_mask, word_keep, word_rand: of those, the shares that become [MASK], stay, become a random token.
        begins_word: (voc_size,) bool, which tokens begin a word, for masks of whole words; None: tokens are chosen.
    """

    token_probs: np.ndarray
    random_ids: np.ndarray
    mask_id: int
    proportion: float = Recipe.mlm_mask_prop
    word_mask: float = Recipe.word_mask
    word_keep: float = Recipe.word_keep
    word_rand: float = Recipe.word_rand
    begins_word: np.ndarray | None = None

    @classmethod
    def of_tokenizer(cls, tokenizer, counts: np.ndarray, smoothing: float = 0.0, **more) -> "Masking":
        """Tokens are chosen with weight max(count, 1) ** -smoothing, special ones never (Lample and Conneau, 2019,
        section 3.3)."""
        probs = np.maximum(counts, 1).astype(np.float64) ** -smoothing
        probs[tokenizer.all_special_ids] = 0.0
        return cls(probs, np.flatnonzero(probs), tokenizer.mask_token_id, **more)

    @classmethod
    def of_recipe(cls, tokenizer, counts: np.ndarray, recipe: Recipe) -> "Masking":
        """As in training."""
        return cls.of_tokenizer(
            tokenizer,
            counts,
            recipe.mlm_smoothing,
            proportion=recipe.mlm_mask_prop,
            word_mask=recipe.word_mask,
            word_keep=recipe.word_keep,
            word_rand=recipe.word_rand,
            begins_word=word_beginnings(tokenizer) if recipe.whole_word_mask else None,
        )

    def is_like(self, other: "Masking") -> bool:
        """Whether both draw from the same distribution."""
        shares = ("proportion", "word_mask", "word_keep", "word_rand")
        return (
            np.array_equal(self.token_probs, other.token_probs)
            and all(getattr(self, name) == getattr(other, name) for name in shares)
            and (self.begins_word is None) == (other.begins_word is None)
        )


@dataclass
class Batch:
    """Sequences and what is to be learnt from them: a batch, or a micro-batch cut from the batches of a step.

    `attention_mask` is None where nothing is padded: attention is faster without.
    """

    input_ids: torch.Tensor  # (bs, seq_length) int64
    attention_mask: torch.Tensor | None  # (bs, seq_length) bool
    token_positions: torch.Tensor  # (n_tokens,) int64, attended positions of the flattened batch
    head_positions: torch.Tensor  # (n_rows,) int64, those that need logits, the ones with a label first
    labels: torch.Tensor  # (n_labels,) int64, of the first n_labels of them

    @property
    def pairs(self) -> int:
        """The sum of the squared lengths of the sequences: how many pairs of tokens attention compares."""
        if self.attention_mask is None:
            return self.input_ids.shape[0] * self.input_ids.shape[1] ** 2
        return int(self.attention_mask.sum(1).square().sum())

    def to(self, device: torch.device) -> "Batch":
        """On the CPU nothing is copied; to a GPU the copy runs beside the computation, if pinned."""
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> "Batch":
        pin = lambda tensor: None if tensor is None else tensor.pin_memory()  # noqa: E731
        return Batch(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})


# ------------------------------------------------------------------------------------------------ sequences to a batch


def pad(sequences: list[np.ndarray], pad_id: int, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(bs, seq_length) ids and the bool mask of the real ones.

    The length is rounded up to a multiple of GROUP_WIDTH, but not beyond `max_length`, for which alone the models have
    positions. Where all sequences are of equal length, nothing is padded.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    longest = lengths.max()
    seq_length = longest
    if (lengths != longest).any():
        seq_length = -(-longest // GROUP_WIDTH) * GROUP_WIDTH
        seq_length = max(longest, min(seq_length, max_length or seq_length))
    attended = np.arange(seq_length) < lengths[:, None]  # (bs, seq_length)
    ids = np.full(attended.shape, pad_id, np.int64)
    ids[attended] = np.concatenate(sequences)
    return ids, attended


def draw_mask(ids: np.ndarray, attended: np.ndarray, masking: Masking, generator: np.random.Generator):
    """Chooses tokens, weighted, without replacement, and replaces them.

    To draw them one after the other, each time with the weights of those that are left, would be slow. The same
    distribution has a closed form (Efraimidis and Spirakis, 2006): let each token wait for a time that is exponential
    with its weight as the rate, Exp(1) / weight, and take the first ones. The minimum of such times falls on a token
    with the probability of its weight's share, and since the exponential has no memory, so does the next among the
    others. Unlike torch.multinomial, this has no limit on the number of tokens.

    Returns:
        masked ids: (bs, seq_length), and chosen: (n_labels,) sorted positions in the flattened batch.
    """
    flat = ids.ravel()
    weights = masking.token_probs[flat] * attended.ravel()
    candidates = np.flatnonzero(weights)
    n_chosen = min(int(np.ceil(masking.proportion * attended.sum())), candidates.size)
    if masking.begins_word is None:
        times = generator.exponential(size=candidates.size) / weights[candidates]
        chosen = np.sort(candidates[np.argpartition(times, n_chosen - 1)[:n_chosen]] if n_chosen else candidates[:0])
    else:
        chosen = _choose_words(flat, candidates, weights[candidates], n_chosen, masking.begins_word, generator)
        n_chosen = len(chosen)

    kind = generator.random(n_chosen) * (masking.word_mask + masking.word_keep + masking.word_rand)
    random_ids = masking.random_ids[generator.integers(len(masking.random_ids), size=n_chosen)]
    masked = flat.copy()
    is_masked = kind < masking.word_mask
    is_random = kind >= masking.word_mask + masking.word_keep
    masked[chosen[is_masked]] = masking.mask_id
    masked[chosen[is_random]] = random_ids[is_random]
    return masked.reshape(ids.shape), chosen


def _choose_words(flat, candidates, weights, n_tokens: int, begins_word, generator) -> np.ndarray:
    """Sorted positions of whole words that have about `n_tokens` tokens together, drawn as `draw_mask` draws tokens; a
    word's weight is the mean of its tokens' (Devlin et al., 2019, as their code was revised).

    Args:
        candidates: (n,) positions in `flat` that may be chosen, with (n,) `weights`.
    """
    if not n_tokens:
        return candidates[:0]
    begins = begins_word[flat[candidates]] | (np.diff(candidates, prepend=-2) > 1)  # or stands after a special token
    word = np.cumsum(begins) - 1  # (n,)
    lengths = np.bincount(word)
    order = np.argsort(generator.exponential(size=len(lengths)) * lengths / np.bincount(word, weights))
    middles = np.cumsum(lengths[order]) - lengths[order] / 2  # so that the mean number of tokens is right
    taken = np.zeros(len(lengths), bool)
    taken[order[: max(1, int((middles <= n_tokens).sum()))]] = True
    return candidates[taken[word]]


def prepare_batch_mlm(
    sequences: list[np.ndarray],
    pad_id: int,
    masking: Masking,
    generator: np.random.Generator,
    head_on_all_tokens: bool,
    max_length: int | None = None,
) -> Batch:
    """Masked-language-model batch: labels are the original ids at the chosen positions.

    Args:
        head_on_all_tokens: logits are needed for every attended token, not only for the masked ones.
        max_length: see `pad`.
    """
    ids, attended = pad(sequences, pad_id, max_length)
    masked, chosen = draw_mask(ids, attended, masking, generator)
    others = attended.ravel().copy() if head_on_all_tokens else np.zeros(ids.size, bool)
    others[chosen] = False
    return _to_tensors(masked, attended, chosen, others, ids.ravel()[chosen])


def prepare_batch_clm(sequences: list[np.ndarray], pad_id: int, max_length: int | None = None) -> Batch:
    """Causal batch: the label of a position is the token after it; the last position of a sequence has none."""
    ids, attended = pad(sequences, pad_id, max_length)
    has_next = np.zeros_like(attended)
    has_next[:, :-1] = attended[:, 1:]
    positions = np.flatnonzero(has_next)
    return _to_tensors(ids, attended, positions, (attended & ~has_next).ravel(), ids.ravel()[positions + 1])


def _to_tensors(ids, attended, labelled, others, labels) -> Batch:
    """`labelled` are positions, (n_labels,); `others`, (bs * seq_length,) bool, need logits too."""
    head_positions = np.concatenate([labelled, np.flatnonzero(others)])
    attention_mask = None if attended.all() else torch.from_numpy(attended)
    return Batch(
        torch.from_numpy(ids),
        attention_mask,
        torch.from_numpy(np.flatnonzero(attended)),
        torch.from_numpy(head_positions),
        torch.from_numpy(labels),
    )


class Batches(Dataset):
    """Map from j to the j-th batch of an epoch.

    Args:
        dataset: the sequences.
        sampler: which of them stand together, already set to the epoch.
        seed: of the masks, (seed of the run, epoch).
        masking: None for a causal model.
        pad_id: what padded positions hold.
        head_on_all_tokens: see `prepare_batch_mlm`.
    """

    def __init__(
        self,
        dataset: LmSeqsDataset,
        sampler: GroupedBatchSampler,
        seed: tuple[int, int],
        masking: Masking | None,
        pad_id: int,
        head_on_all_tokens: bool = False,
    ) -> None:
        self.dataset, self.sampler, self.seed = dataset, sampler, seed
        self.masking, self.pad_id, self.head_on_all_tokens = masking, pad_id, head_on_all_tokens
        self.max_length = getattr(dataset, "max_length", None)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, j: int) -> Batch:
        sequences = [self.dataset[i] for i in self.sampler.batch(j)]
        if self.masking is None:
            return prepare_batch_clm(sequences, self.pad_id, self.max_length)
        generator = np.random.default_rng([*self.seed, j])
        return prepare_batch_mlm(
            sequences, self.pad_id, self.masking, generator, self.head_on_all_tokens, self.max_length
        )


# --------------------------------------------------------------------------------------------- batches to micro-batches


MAX_PADDING = 1 / 8  # of the positions of a micro-batch, beyond what a sequence alone is padded by
NO_LOGITS, NO_LABEL = -2, -1  # in place of a label: what is not computed for a token


def cut_micro_batches(batches: list[Batch], tokens: int, pad_id: int, max_length: int | None = None) -> list[Batch]:
    """What goes through the models at once: the sequences of some batches, sorted by length, in parts of similar length
    and within a number of tokens, padding included (a longer sequence goes alone).

    The masks were drawn with the batches and stay with their sequences. The loss is a mean over all tokens of a step,
    whatever stands beside what, so this changes no more than the rounding: but it saves padding, since the batches of a
    step are of many lengths, and it bounds the memory, since only a micro-batch is ever in the models.
    """
    if not batches:  # a process may have none in a short last step
        return []
    ids, labels, lengths = (np.concatenate(parts) for parts in zip(*map(_without_padding, batches), strict=True))
    ids, labels = (np.split(flat, np.cumsum(lengths)[:-1]) for flat in (ids, labels))
    micro_batches = []
    for part in _parts_of_similar_length(lengths, tokens):
        padded, attended = pad([ids[i] for i in part], pad_id, max_length)
        wanted = np.full(attended.shape, NO_LOGITS)
        wanted[attended] = np.concatenate([labels[i] for i in part])
        wanted = wanted.ravel()
        labelled = np.flatnonzero(wanted >= 0)
        micro_batches.append(_to_tensors(padded, attended, labelled, wanted == NO_LABEL, wanted[labelled]))
    return micro_batches


def _without_padding(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n_tokens,) ids and labels of all sequences one after the other, and (bs,) their lengths."""
    bs, seq_length = batch.input_ids.shape
    labels = np.full(bs * seq_length, NO_LOGITS)
    labels[batch.head_positions] = NO_LABEL
    labels[batch.head_positions[: len(batch.labels)]] = batch.labels
    lengths = np.full(bs, seq_length) if batch.attention_mask is None else batch.attention_mask.sum(1).numpy()
    return batch.input_ids.numpy().ravel()[batch.token_positions], labels[batch.token_positions], lengths


def _parts_of_similar_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """The sequences, shortest first, cut where the next would make a part too large or waste too much.

    Sorted, the next sequence is the longest of the open part, so all of the part would be padded to its width. The part
    is closed if it would then have too many positions, or if more than MAX_PADDING of these were padding that the
    sequences, each padded to its own multiple of GROUP_WIDTH, would not have.
    """
    in_order = np.argsort(lengths, kind="stable")
    widths = create_lengths_groups(lengths[in_order]) * GROUP_WIDTH  # what a sequence alone is padded to
    cuts = []
    first, alone = 0, 0  # of the open part: its first sequence, and its positions, were each padded to its own width
    for i, width in enumerate(widths):
        positions = (i + 1 - first) * width
        alone += width
        if i and (positions > tokens or positions - alone > MAX_PADDING * positions):
            cuts.append(i)
            first, alone = i, width
    return np.split(in_order, cuts)


class Steps(Dataset):
    """Map from the numbers of the batches of a step to its micro-batches.

    Args:
        batches: of the epoch.
        tokens_per_micro_batch: see `cut_micro_batches`; 0: each batch is a micro-batch.
    """

    def __init__(self, batches: Batches, tokens_per_micro_batch: int) -> None:
        self.batches, self.tokens_per_micro_batch = batches, tokens_per_micro_batch

    def __getitem__(self, numbers: range) -> list[Batch]:
        batches = [self.batches[j] for j in numbers]
        if not self.tokens_per_micro_batch:
            return batches
        return cut_micro_batches(batches, self.tokens_per_micro_batch, self.batches.pad_id, self.batches.max_length)


# ------------------------------------------------------------------------------------------------------ the run's data


class StepCounts(NamedTuple):
    """What is in a step, on all processes together."""

    tokens: float = 0
    rows: float = 0  # that reach the vocabulary head
    labels: float = 0
    pairs: float = 0  # of tokens that attend to one another: the sum of squared lengths
    stops: float = 0  # processes that were told to stop

    @classmethod
    def of(cls, micro_batches: list[Batch], stop: bool = False) -> "StepCounts":
        """Of this process alone."""
        return cls(
            sum(len(batch.token_positions) for batch in micro_batches),
            sum(len(batch.head_positions) for batch in micro_batches),
            sum(len(batch.labels) for batch in micro_batches),
            sum(batch.pairs for batch in micro_batches),
            stop,
        )

    def over_all(self, world: World) -> "StepCounts":
        """Summed over the processes, in main memory, so that no device is waited for."""
        counts = torch.tensor(self, dtype=torch.float64)
        world.all_reduce(counts)
        return StepCounts(*counts.tolist())


@dataclass(frozen=True)
class RunData:
    """The text of a run: what to train on, how it is masked (None: a causal model), what to evaluate on (see
    `evaluation.held_out`; empty: nothing), and which sequences `--leave_out` lists."""

    train_set: LmSeqsDataset
    train_sampler: GroupedBatchSampler
    masking: Masking | None
    pad_id: int
    held_out: dict[str, Batches]
    left_out: np.ndarray | None = None

    def steps(self, recipe: Recipe, world: World, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step of an epoch, from `first_step` on.

        The sampler numbers the batches of the epoch for all processes; of these, this one takes every size-th, and
        `gradient_accumulation_steps` of them make its part of a step. In a short last step it may have fewer, or none.
        """
        self.train_sampler.set_epoch(epoch)
        batches = Batches(
            self.train_set,
            self.train_sampler,
            (recipe.seed, epoch),
            self.masking,
            self.pad_id,
            recipe.head_on_all_tokens,
        )
        per_step = recipe.gradient_accumulation_steps
        mine = self.train_sampler.batches_of_rank(world.rank, world.size)
        n_steps = -(-len(self.train_sampler) // (per_step * world.size))
        workers = recipe.num_workers
        return iter(
            DataLoader(
                Steps(batches, recipe.tokens_per_micro_batch),
                batch_size=None,
                sampler=[mine[k * per_step : (k + 1) * per_step] for k in range(first_step, n_steps)],
                num_workers=workers,
                pin_memory=world.device.type == "cuda",
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares the index
                generator=torch.Generator(),  # else it would draw from the one that dropout uses
                worker_init_fn=ignore_stop_signals,
            )
        )
