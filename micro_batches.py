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

from grouped_batch_sampler import GroupedBatchSampler
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
    attention_mask: torch.Tensor | None  # (bs, seq_length) int64
    token_rows: torch.Tensor  # (n_tokens,) int64, attended positions of the flattened batch
    head_rows: torch.Tensor  # (n_rows,) int64, positions of the flattened batch that need logits
    labelled: torch.Tensor  # (n_labels,) int64, the entries of head_rows that have a label
    labels: torch.Tensor  # (n_labels,) int64

    def to(self, device: torch.device) -> "MicroBatch":
        """On the CPU nothing is copied; to a GPU the copy runs beside the computation, if pinned."""
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
        return MicroBatch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> "MicroBatch":
        pin = lambda tensor: None if tensor is None else tensor.pin_memory()  # noqa: E731
        return MicroBatch(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})


def pad(sequences: list[np.ndarray], pad_id: int, multiple: int = 8) -> tuple[np.ndarray, np.ndarray]:
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
    token_rows = np.flatnonzero(attended)
    head_rows = token_rows if head_on_all_tokens else chosen
    labelled = np.searchsorted(head_rows, chosen)
    return _micro_batch(masked, attended, token_rows, head_rows, labelled, ids.ravel()[chosen])


def prepare_batch_clm(sequences: list[np.ndarray], pad_id: int) -> MicroBatch:
    """Causal batch: the label of a position is the token after it; the last position of a sequence has none."""
    ids, attended = pad(sequences, pad_id)
    has_next = np.zeros_like(attended)
    has_next[:, :-1] = attended[:, 1:]
    token_rows = np.flatnonzero(attended)
    positions = np.flatnonzero(has_next)
    return _micro_batch(
        ids, attended, token_rows, token_rows, np.searchsorted(token_rows, positions), ids.ravel()[positions + 1]
    )


def _micro_batch(ids, attended, token_rows, head_rows, labelled, labels) -> MicroBatch:
    tensor = torch.from_numpy
    attention_mask = None if attended.all() else tensor(attended.astype(np.int64))
    return MicroBatch(
        tensor(ids), attention_mask, tensor(token_rows), tensor(head_rows), tensor(labelled), tensor(labels)
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
