"""Sequences -> the finished micro-batch: padded, masked, and with the rows of interest already found.

Runs in the loader's worker processes, so that the training loop neither draws masks nor asks the device how many tokens
there are. Micro-batch j of an epoch, its mask included, is a function of (seed, epoch, j) alone: neither the number of
workers nor of processes nor a restart changes it.

Dimensions: bs sequences, padded to seq_length; n_tokens attended positions; n_rows positions that reach the vocabulary
head; n_labels positions with a hard label.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from grouped_batch_sampler import GROUP_WIDTH, GroupedBatchSampler, create_lengths_groups
from lm_seqs_dataset import LmSeqsDataset


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen and replaced (BERT's 80/10/10, XLM's emphasis on rare tokens).

    Attributes:
        token_probs: (voc_size,) weight of each token to be chosen; 0 for special tokens.
        random_ids: ids that a random replacement may be: all but the special ones.
        mask_id: [MASK].
        proportion: share of the attended tokens that is chosen.
        word_mask, word_keep, word_rand: of those, the shares that become [MASK], stay, become a random token.
    """

    token_probs: np.ndarray
    random_ids: np.ndarray
    mask_id: int
    proportion: float = 0.15
    word_mask: float = 0.8
    word_keep: float = 0.1
    word_rand: float = 0.1

    @classmethod
    def of_tokenizer(cls, tokenizer, counts: np.ndarray, smoothing: float = 0.0, **shares: float) -> "Masking":
        """Tokens are chosen with weight max(count, 1) ** -smoothing, special ones never (Lample and Conneau, 2019,
        section 3.3)."""
        probs = np.maximum(counts, 1).astype(np.float64) ** -smoothing
        probs[tokenizer.all_special_ids] = 0.0
        return cls(probs, np.flatnonzero(probs), tokenizer.mask_token_id, **shares)


@dataclass
class MicroBatch:
    """What one forward pass needs. `attention_mask` is None where nothing is padded: attention is faster without."""

    input_ids: torch.Tensor  # (bs, seq_length) int64
    attention_mask: torch.Tensor | None  # (bs, seq_length) bool
    token_rows: torch.Tensor  # (n_tokens,) int64, attended positions of the flattened batch
    head_rows: torch.Tensor  # (n_rows,) int64, positions of it that need logits, those with a label first
    labels: torch.Tensor  # (n_labels,) int64, of the first n_labels of them

    @property
    def pairs(self) -> int:
        """The sum of the squared lengths of the sequences: how many pairs of tokens attention compares."""
        if self.attention_mask is None:
            return self.input_ids.shape[0] * self.input_ids.shape[1] ** 2
        return int(self.attention_mask.sum(1).square().sum())

    def to(self, device: torch.device) -> "MicroBatch":
        """On the CPU nothing is copied; to a GPU the copy runs beside the computation, if pinned."""
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
        return MicroBatch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> "MicroBatch":
        pin = lambda tensor: None if tensor is None else tensor.pin_memory()  # noqa: E731
        return MicroBatch(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})


def pad(sequences: list[np.ndarray], pad_id: int, multiple: int = GROUP_WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """(bs, seq_length) ids and the bool mask of the real ones; seq_length is a multiple of `multiple`, unless all
    sequences are of equal length: then nothing is padded."""
    lengths = np.array([len(sequence) for sequence in sequences])
    longest = lengths.max()
    seq_length = longest if (lengths == longest).all() else -(-longest // multiple) * multiple
    attended = np.arange(seq_length) < lengths[:, None]  # (bs, seq_length)
    ids = np.full(attended.shape, pad_id, np.int64)
    ids[attended] = np.concatenate(sequences)
    return ids, attended


def draw_mask(ids: np.ndarray, attended: np.ndarray, masking: Masking, generator: np.random.Generator):
    """Chooses tokens, weighted, without replacement.

    The key Exp(1) / weight orders tokens as drawing them one after the other without replacement would
    (Efraimidis and Spirakis, 2006); it has no limit on the number of tokens, unlike torch.multinomial.

    Returns:
        masked ids: (bs, seq_length), and chosen: (n_labels,) sorted positions in the flattened batch.
    """
    flat = ids.ravel()
    weights = masking.token_probs[flat] * attended.ravel()
    candidates = np.flatnonzero(weights)
    n_chosen = min(int(np.ceil(masking.proportion * attended.sum())), candidates.size)
    keys = generator.exponential(size=candidates.size) / weights[candidates]
    chosen = np.sort(candidates[np.argpartition(keys, n_chosen - 1)[:n_chosen]] if n_chosen else candidates[:0])

    fate = generator.random(n_chosen) * (masking.word_mask + masking.word_keep + masking.word_rand)
    random_ids = masking.random_ids[generator.integers(len(masking.random_ids), size=n_chosen)]
    masked = flat.copy()
    is_masked = fate < masking.word_mask
    is_random = fate >= masking.word_mask + masking.word_keep
    masked[chosen[is_masked]] = masking.mask_id
    masked[chosen[is_random]] = random_ids[is_random]
    return masked.reshape(ids.shape), chosen


def prepare_batch_mlm(
    sequences: list[np.ndarray],
    pad_id: int,
    masking: Masking,
    generator: np.random.Generator,
    head_on_all_tokens: bool,
) -> MicroBatch:
    """Masked-language-model batch: labels are the original ids at the chosen positions.

    Args:
        head_on_all_tokens: logits are needed for every attended token, not only for the masked ones.
    """
    ids, attended = pad(sequences, pad_id)
    masked, chosen = draw_mask(ids, attended, masking, generator)
    others = attended.ravel().copy() if head_on_all_tokens else np.zeros(ids.size, bool)
    others[chosen] = False
    return _micro_batch(masked, attended, chosen, others, ids.ravel()[chosen])


def prepare_batch_clm(sequences: list[np.ndarray], pad_id: int) -> MicroBatch:
    """Causal batch: the label of a position is the token after it; the last position of a sequence has none."""
    ids, attended = pad(sequences, pad_id)
    has_next = np.zeros_like(attended)
    has_next[:, :-1] = attended[:, 1:]
    positions = np.flatnonzero(has_next)
    return _micro_batch(ids, attended, positions, (attended & ~has_next).ravel(), ids.ravel()[positions + 1])


def _micro_batch(ids, attended, labelled, others, labels) -> MicroBatch:
    head_rows = np.concatenate([labelled, np.flatnonzero(others)])
    attention_mask = None if attended.all() else torch.from_numpy(attended)
    return MicroBatch(
        torch.from_numpy(ids),
        attention_mask,
        torch.from_numpy(np.flatnonzero(attended)),
        torch.from_numpy(head_rows),
        torch.from_numpy(labels),
    )


class MicroBatches(torch.utils.data.Dataset):
    """Map from j to the j-th micro-batch of an epoch, for a DataLoader whose "samples" are whole micro-batches.

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

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, j: int) -> MicroBatch:
        sequences = [self.dataset[i] for i in self.sampler.micro_batch(j)]
        if self.masking is None:
            return prepare_batch_clm(sequences, self.pad_id)
        generator = np.random.default_rng([*self.seed, j])
        return prepare_batch_mlm(sequences, self.pad_id, self.masking, generator, self.head_on_all_tokens)


# ------------------------------------------------------------------------------------------- what is computed at once


MAX_PADDING = 1 / 8  # of the positions of a pass, beyond what a sequence alone is padded by
NO_LOGITS, NO_LABEL = -2, -1  # in place of a label: what is not computed for a token


def passes_within(batches: list[MicroBatch], tokens: int, pad_id: int) -> list[MicroBatch]:
    """What goes through the models at once: the sequences of some micro-batches, sorted by length, in parts of similar
    length and within a number of tokens, padding included (a longer sequence goes alone).

    The loss is a mean over all tokens of an update, so this changes no more than the rounding.
    """
    if not batches:  # a process may have none of a short last window
        return []
    ids, labels, lengths = (np.concatenate(parts) for parts in zip(*map(_without_padding, batches), strict=True))
    ids, labels = (np.split(flat, np.cumsum(lengths)[:-1]) for flat in (ids, labels))
    passes = []
    for part in _parts_of_similar_length(lengths, tokens):
        padded, attended = pad([ids[i] for i in part], pad_id)
        wanted = np.full(attended.shape, NO_LOGITS)
        wanted[attended] = np.concatenate([labels[i] for i in part])
        wanted = wanted.ravel()
        labelled = np.flatnonzero(wanted >= 0)
        passes.append(_micro_batch(padded, attended, labelled, wanted == NO_LABEL, wanted[labelled]))
    return passes


def _without_padding(batch: MicroBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n_tokens,) ids and labels of all sequences one after the other, and (bs,) their lengths."""
    bs, seq_length = batch.input_ids.shape
    labels = np.full(bs * seq_length, NO_LOGITS)
    labels[batch.head_rows] = NO_LABEL
    labels[batch.head_rows[: len(batch.labels)]] = batch.labels
    lengths = np.full(bs, seq_length) if batch.attention_mask is None else batch.attention_mask.sum(1).numpy()
    return batch.input_ids.numpy().ravel()[batch.token_rows], labels[batch.token_rows], lengths


def _parts_of_similar_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """The sequences, shortest first, cut where the next would make a part too large or waste too much."""
    in_order = np.argsort(lengths, kind="stable")
    widths = create_lengths_groups(lengths[in_order]) * GROUP_WIDTH  # what a sequence alone is padded to
    cuts = []
    first, used = 0, 0  # of the open part: its first sequence, and its positions, were each padded to its own width
    for i, width in enumerate(widths):
        positions = (i + 1 - first) * width
        used += width
        if i and (positions > tokens or positions - used > MAX_PADDING * positions):
            cuts.append(i)
            first, used = i, width
    return np.split(in_order, cuts)


class Windows(torch.utils.data.Dataset):
    """Map from the numbers of micro-batches to the passes that an update is computed in.

    Args:
        micro_batches: of the epoch.
        tokens_per_pass: see `passes_within`; 0: the micro-batches as they are.
    """

    def __init__(self, micro_batches: MicroBatches, tokens_per_pass: int) -> None:
        self.micro_batches, self.tokens_per_pass = micro_batches, tokens_per_pass

    def __getitem__(self, numbers: range) -> list[MicroBatch]:
        batches = [self.micro_batches[j] for j in numbers]
        if not self.tokens_per_pass:
            return batches
        return passes_within(batches, self.tokens_per_pass, self.micro_batches.pad_id)
