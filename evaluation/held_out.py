"""How good a model is on text it has not seen, and how near it is to its teacher.

Sequences and masks are the same for every run and every model on a file: they don't depend on the seed of a run. Tokens
are masked evenly, as BERT's were and as a user of the model would mask them; so the figures of runs with other counts
or another smoothing can be compared. Where the training masks otherwise (`--mlm_smoothing`, `--mlm_mask_prop`), the
same text is evaluated under the training's masks too, under names that begin with TRAINING_MASKS: a run can get better
at the rare words that it is asked for in training, and worse at all words.

Dimensions: n_labels masked (or next) tokens of a batch; voc_size.
"""

import math
import operator
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from corpus.files import TokenCorpus
from corpus.tokenization import describe_tokenizer
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset
from models.families import LanguageModel
from training import losses
from training.batches import Batch, Batches, Masking
from training.distributed import World
from training.losses import Terms
from training.metrics_files import TRAINING_MASKS
from training.objective import Objective
from training.vocabulary_loss import usual_chunk

SEED = (0, 1 << 31)  # of the masks; no epoch has this number
TOKENS_PER_BATCH = 4096
LOSS = {False: "mlm_loss", True: "clm_loss"}  # the name of the loss, by whether the model is causal
HIDDEN_LOSS = "hidden_loss"  # the name of the loss where no words are guessed
MAX_HELD_OUT = 500  # sequences: some 9,000 masked tokens at 120 tokens each, a standard error near 0.03 in the loss


def held_out_sequences(n_sequences: int, share: float) -> np.ndarray:
    """Sorted indices of the corpus's sequences to evaluate on: a share of them, at most MAX_HELD_OUT, at least one."""
    n = min(MAX_HELD_OUT, max(1, int(n_sequences * share)), n_sequences - 1) if share else 0
    return np.sort(np.random.default_rng(0).choice(n_sequences, n, replace=False))


def held_out_batches(
    corpus: TokenCorpus,
    tokenizer,
    max_length: int,
    masked: bool,
    sequences: np.ndarray | None,
    masking: Masking | None = None,
) -> Batches:
    """Batches of these sequences of a corpus (None: of all), with masks that never change.

    Args:
        masked: False for causal models, and where no words are guessed.
        masking: None: evenly, if at all.
    """
    selected = corpus if sequences is None else corpus.take(sequences)
    dataset = LmSeqsDataset(selected, describe_tokenizer(tokenizer)["special_ids"], max_length)
    dataset.log_summary("held-out text")
    budget = max(TOKENS_PER_BATCH, int(dataset.lengths.max()) + 8)
    sampler = GroupedBatchSampler(dataset.lengths, tokens_per_batch=budget, shuffle=False)
    masking = masking or (even_masking(tokenizer) if masked else None)
    return Batches(dataset, sampler, SEED, masking, padding_id(tokenizer))


def even_masking(tokenizer) -> Masking:
    """15 % of the tokens, each as likely as any other."""
    return Masking.of_tokenizer(tokenizer, np.ones(len(tokenizer)))


def with_training_masks(even: Batches, training: Masking | None, tokenizer) -> dict[str, Batches]:
    """The batches to evaluate on, by what the names of their figures begin with: `even`, and where the training masks
    otherwise, the same text under the training's masks."""
    if training is None or training.is_like(even_masking(tokenizer)):
        return {"": even}
    dataset, sampler = even.dataset, even.sampler
    return {"": even, TRAINING_MASKS: Batches(dataset, sampler, SEED, training, padding_id(tokenizer))}


def padding_id(tokenizer) -> int:
    """GPT-2 has no padding token; what stands in a padded place is never looked at."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def evaluate_all(
    student: LanguageModel,
    teacher: LanguageModel | None,
    held_out: dict[str, Batches],
    world: World,
    dtype: torch.dtype,
    is_pressing: Callable[[], bool],
) -> dict[str, float] | None:
    """What `evaluate` returns for each of the batches, under names that begin with their keys."""
    metrics = {}
    for beginning, batches in held_out.items():
        part = evaluate(student, teacher, batches, world, dtype, is_pressing)
        if part is None:
            return None
        metrics |= {beginning + name: value for name, value in part.items()}
    return metrics


def describe(metrics: dict[str, float]) -> list[str]:
    """A line for each way of masking, for the log."""
    lines = {"held-out": "", "held-out, masked as in training": ""}
    for name, value in metrics.items():
        how = list(lines)[name.startswith(TRAINING_MASKS)]
        lines[how] += f"  {name.removeprefix(TRAINING_MASKS)} {value:.4g}"
    return [how + values for how, values in lines.items() if values]


class Remembered(LanguageModel):
    """A frozen model that several others are compared with on the same batches, in one dtype: it reads each batch only
    once, and keeps the (bs * seq_length, dim) hidden states of each."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._known: dict[bytes, torch.Tensor] = {}  # by ids

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        ids = input_ids.cpu().numpy().tobytes()
        if ids not in self._known:
            self._known[ids] = super().hidden(input_ids, attention_mask)
        return self._known[ids]


@torch.no_grad()
def evaluate(
    student: LanguageModel,
    teacher: LanguageModel | None,
    batches: Batches,
    world: World,
    dtype: torch.dtype,
    is_pressing: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means over the labelled positions of all batches, over all processes.

    Args:
        is_pressing: whether there is no time left; asked before each batch.

    Returns: None if a process had no time left; else `mlm_loss` or `clm_loss` (nats), its `perplexity`, `accuracy`;
        with a teacher also `kl` (nats, at temperature 1, teacher to student), `agreement` (share of equal top-1
        predictions), and the teacher's own `teacher_loss` and `teacher_accuracy`.
    """
    student.eval()
    names = [*OWN, *(BESIDE_TEACHER if teacher else ())]
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=world.device)
    for batch in _mine(batches, world, is_pressing):
        values = _values(student, teacher, batch, dtype)  # (names, n_labels)
        sums += torch.cat([values.new_tensor([values.shape[1]]), values.sum(1)])
    if world.any(is_pressing()):
        return None
    world.all_reduce(sums)
    loss, *others = (sums[1:] / sums[0]).tolist()
    metrics = {LOSS[batches.masking is None]: loss, "perplexity": math.exp(min(loss, 100))}
    return metrics | dict(zip(names[1:], others, strict=True))


@torch.no_grad()
def evaluate_hidden(
    objective: Objective, batches: Batches, world: World, is_pressing: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Means over the tokens of all batches, over all processes, of the terms that compare hidden states.

    Returns: None if a process had no time left; else `hidden_loss`, their weighted sum, and each term of some weight.
    """
    objective.student.eval()
    sums, n_tokens = Terms.zeros(world.device), torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in _mine(batches, world, is_pressing):
        _, of_batch = objective.loss(batch, objective.alphas)
        sums = sums.map(operator.add, of_batch)
        n_tokens += len(batch.token_positions)
    if world.any(is_pressing()):
        return None
    together = torch.stack([*sums, n_tokens])
    world.all_reduce(together)
    means = Terms(*(together[:-1] / together[-1]).tolist())
    named = zip(objective.names, means, objective.alphas, strict=True)
    terms = {f"hidden_{name}": mean for name, mean, alpha in named if alpha}
    return {HIDDEN_LOSS: sum(objective.alphas.map(operator.mul, means))} | terms


@torch.no_grad()
def evaluate_labels(
    student: LanguageModel, teacher: LanguageModel, batches: Batches, device: torch.device, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """What `evaluate` takes the means of, one value for each labelled position of all batches: (n labels,) float64; and
    each one's `label`, an id, and `length`, of its sequence.

    The positions are the same for every model, so that models can be compared position by position.
    """
    student.eval()
    values, labels, lengths = [], [], []
    for batch in (batches[j] for j in range(len(batches))):
        values.append(_values(student, teacher, batch.to(device), dtype))
        labels.append(batch.labels)
        bs, seq_length = batch.input_ids.shape
        of_sequence = torch.full((bs,), seq_length) if batch.attention_mask is None else batch.attention_mask.sum(1)
        lengths.append(of_sequence[batch.head_positions[: len(batch.labels)] // seq_length])
    found = dict(zip((*OWN, *BESIDE_TEACHER), torch.cat(values, 1).cpu().numpy(), strict=True))
    return found | {"label": torch.cat(labels).numpy(), "length": torch.cat(lengths).numpy()}


@torch.no_grad()
def evaluate_cosine(
    student: LanguageModel, teacher: LanguageModel, batches: Batches, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Mean over all tokens of the cosine of both models' last hidden states; None if they differ in width."""
    if student.dim != teacher.dim:
        return None
    student.eval()
    distance = 0.0
    for j in range(len(batches)):
        batch = batches[j].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = (
                m.hidden(batch.input_ids, batch.attention_mask)[batch.token_positions] for m in (student, teacher)
            )
            distance += losses.cosine(*hidden).item()
    return 1 - distance / batches.dataset.n_tokens


OWN = ("loss", "accuracy")
BESIDE_TEACHER = ("kl", "agreement", "teacher_loss", "teacher_accuracy")


def _mine(batches: Batches, world: World, is_pressing: Callable[[], bool]) -> Iterator[Batch]:
    """This process's batches, on its device, until there is no time left."""
    numbers = batches.sampler.batches_of_rank(world.rank, world.size)
    for batch in DataLoader(batches, batch_size=None, sampler=numbers, generator=torch.Generator()):
        if is_pressing():
            return
        yield batch.to(world.device)


def _values(student: LanguageModel, teacher: LanguageModel | None, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """(OWN and, with a teacher, BESIDE_TEACHER; n_labels) float64. No more than a chunk of logits is ever alive."""
    device, positions = batch.input_ids.device, batch.head_positions[: len(batch.labels)]  # (n_labels,)
    models = [student, teacher] if teacher else [student]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = [model.hidden(batch.input_ids, batch.attention_mask)[positions] for model in models]
        rows = usual_chunk(device, student.model.config.vocab_size)
        chunks = zip(batch.labels.split(rows), *(states.split(rows) for states in hidden), strict=True)
        return torch.cat([_values_of_rows(models, labels, states) for labels, *states in chunks], 1)


def _values_of_rows(models: list[LanguageModel], labels: torch.Tensor, hidden: list[torch.Tensor]) -> torch.Tensor:
    """As `_values`, of the hidden states of some rows, (n, dim) for each model."""
    logits, *of_teacher = (model.logits(states) for model, states in zip(models, hidden, strict=True))
    guess = logits.argmax(-1)  # (n,)
    values = [losses.cross_entropy(logits, labels), guess == labels]
    for t_logits in of_teacher:
        t_guess = t_logits.argmax(-1)
        values += [losses.distillation(logits, t_logits, 1.0), guess == t_guess]
        values += [losses.cross_entropy(t_logits, labels), t_guess == labels]
    return torch.stack([value.double() for value in values])
