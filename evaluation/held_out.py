"""How good a model is on text it has not seen, and how close it is to its teacher.

Sequences and masks are the same for every run and every model on a file: they don't depend on the seed of a run. Tokens
are masked evenly, as in BERT, so that runs with different counts or smoothing can be compared. If training masks
differently (`--mlm_smoothing`, `--mlm_mask_prop`), the same text is evaluated with training's masks too, under names
that begin with TRAINING_MASKS: a run can get better at the rare words that training asks for, and worse at words in
general.

Dimensions: n_labels masked (or next) tokens of a batch; voc_size.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from corpus.files import TokenCorpus
from corpus.tokenization import describe_tokenizer, padding_id
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import MIN_LENGTH, LmSeqsDataset
from models.language_model import LanguageModel
from models.sentence_encoder import Pooling
from training.batches import Batches, MicroBatch, MicroBatches, Padding, StepCounts
from training.distributed import World
from training.losses import ce_loss, cos_loss, label_loss, usual_chunk
from training.masking import Masking
from training.metrics_files import TRAINING_MASKS
from training.objective import Objective, loss_weights

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
    min_length: int = MIN_LENGTH,
) -> MicroBatches:
    """Batches of these sequences of a corpus (None: of all), with masks that never change, each as one micro-batch.

    Args:
        masked: False for causal models, and where no words are guessed.
        masking: None: evenly, if at all.
    """
    selected = corpus if sequences is None else corpus.take(sequences)
    special_ids = describe_tokenizer(tokenizer)["special_ids"]
    dataset = LmSeqsDataset(selected, special_ids, max_length, min_length=min_length)
    dataset.log_summary("held-out text")
    budget = max(TOKENS_PER_BATCH, int(dataset.lengths.max()) + 8)
    sampler = GroupedBatchSampler(dataset.lengths, tokens_per_batch=budget, shuffle=False)
    masking = masking or (even_masking(tokenizer) if masked else None)
    return MicroBatches(Batches(dataset, sampler, SEED, masking), Padding(padding_id(tokenizer), max_length))


def even_masking(tokenizer) -> Masking:
    """15 % of the tokens, each as likely as any other."""
    return Masking.of_tokenizer(tokenizer, np.ones(len(tokenizer)))


def with_training_masks(even: MicroBatches, training: Masking | None, tokenizer) -> dict[str, MicroBatches]:
    """The batches to evaluate on, keyed by the prefix of their metrics' names: `even`, and where the training masks
    otherwise, the same text under the training's masks."""
    if training is None or training.is_like(even_masking(tokenizer)):
        return {"": even}
    batches = Batches(even.batches.dataset, even.batches.sampler, SEED, training)
    return {"": even, TRAINING_MASKS: MicroBatches(batches, even.padding)}


def evaluate_all(
    student: LanguageModel,
    teacher: LanguageModel | None,
    held_out: dict[str, MicroBatches],
    world: World,
    dtype: torch.dtype,
    is_pressing: Callable[[], bool],
) -> dict[str, float] | None:
    """What `evaluate` returns for each of the batches, under names that begin with their keys."""
    metrics = {}
    for beginning, text in held_out.items():
        part = evaluate(student, teacher, text, world, dtype, is_pressing)
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

    def __init__(self, model: PreTrainedModel, pooling: Pooling | None = None) -> None:
        super().__init__(model, pooling)
        self._known: dict[bytes, torch.Tensor] = {}  # by ids

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, packing: None = None
    ) -> torch.Tensor:
        ids = input_ids.cpu().numpy().tobytes()
        if ids not in self._known:
            self._known[ids] = super().hidden(input_ids, attention_mask)
        return self._known[ids]


@torch.no_grad()
def evaluate(
    student: LanguageModel,
    teacher: LanguageModel | None,
    text: MicroBatches,
    world: World,
    dtype: torch.dtype,
    is_pressing: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means over the labeled positions of all batches, over all processes.

    Args:
        is_pressing: whether there is no time left; asked before each batch.

    Returns: None if a process had no time left; else `mlm_loss` or `clm_loss` (nats), its `perplexity`, `accuracy`;
        with a teacher also `kl` (nats, at temperature 1, teacher to student), `agreement` (share of equal top-1
        predictions), and the teacher's own `teacher_loss` and `teacher_accuracy`.
    """
    student.eval()
    names = [*OWN, *(BESIDE_TEACHER if teacher else ())]
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=world.device)
    for micro_batch in _mine(text, world, is_pressing):
        values = _values(student, teacher, micro_batch, dtype)  # (names, n_labels)
        sums += torch.cat([values.new_tensor([values.shape[1]]), values.sum(1)])
    if any(world.any(is_pressing())):
        return None
    world.all_reduce(sums)
    loss, *others = (sums[1:] / sums[0]).tolist()
    metrics = {LOSS[text.batches.masking is None]: loss, "perplexity": math.exp(min(loss, 100))}
    return metrics | dict(zip(names[1:], others, strict=True))


@torch.no_grad()
def evaluate_hidden(
    objective: Objective, text: MicroBatches, world: World, is_pressing: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Means over the tokens (or sequences) of all batches, over all processes, of the terms that compare hidden states.

    Returns: None if a process had no time left; else `hidden_loss`, their weighted sum, and each term of some weight.
    """
    objective.student.eval()
    alphas = objective.recipe.alphas
    dataset = text.batches.dataset
    weights = loss_weights(alphas, StepCounts(tokens=dataset.n_tokens, sequences=len(dataset)))
    parts = torch.zeros(len(weights), dtype=torch.float64, device=world.device)  # what each term adds to the loss
    for micro_batch in _mine(text, world, is_pressing):
        s, t = objective.read_as_student(micro_batch), objective.read_as_teacher(micro_batch)
        parts += objective(s, t, micro_batch, weights)[1]
    if any(world.any(is_pressing())):
        return None
    world.all_reduce(parts)
    means = {f"hidden_{term}": part / alphas[term] for term, part in zip(alphas, parts.tolist(), strict=True)}
    return {HIDDEN_LOSS: parts.sum().item()} | means


@torch.no_grad()
def evaluate_labels(
    student: LanguageModel, teacher: LanguageModel, text: MicroBatches, device: torch.device, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """What `evaluate` takes the means of, one value for each labeled position of all batches: (n labels,) float64; and
    each one's `label`, an id, and `length`, of its sequence.

    The positions are the same for every model, so that models can be compared position by position.
    """
    student.eval()
    values, labels, lengths = [], [], []
    for micro_batch in text:
        values.append(_values(student, teacher, micro_batch.to(device), dtype))
        labels.append(micro_batch.labels)
        lengths.append(micro_batch.lengths[micro_batch.label_positions // micro_batch.input_ids.shape[1]])
    found = dict(zip((*OWN, *BESIDE_TEACHER), torch.cat(values, 1).cpu().numpy(), strict=True))
    return found | {"label": torch.cat(labels).numpy(), "length": torch.cat(lengths).numpy()}


@torch.no_grad()
def evaluate_cosine(
    student: LanguageModel, teacher: LanguageModel, text: MicroBatches, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Mean over all tokens of the cosine of both models' last hidden states; None if they differ in width."""
    if student.dim != teacher.dim:
        return None
    student.eval()
    distance = 0.0
    for micro_batch in text:
        given = micro_batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = [model.hidden(given.input_ids, given.attention_mask) for model in (student, teacher)]
            distance += cos_loss(*(states[given.token_positions] for states in hidden)).item()
    return 1 - distance / text.batches.dataset.n_tokens


OWN = ("loss", "accuracy")
BESIDE_TEACHER = ("kl", "agreement", "teacher_loss", "teacher_accuracy")


def _mine(text: MicroBatches, world: World, is_pressing: Callable[[], bool]) -> Iterator[MicroBatch]:
    """This process's micro-batches, on its device, for as long as there is time."""
    for j in range(world.rank, len(text.batches), world.size):
        if is_pressing():
            return
        for micro_batch in text[[j]]:
            yield micro_batch.to(world.device)


def _values(
    student: LanguageModel, teacher: LanguageModel | None, micro_batch: MicroBatch, dtype: torch.dtype
) -> torch.Tensor:
    """(OWN and, with a teacher, BESIDE_TEACHER; n_labels) float64. Holds no more than a chunk of logits."""
    device = micro_batch.input_ids.device
    models = [student, teacher] if teacher else [student]
    given = micro_batch.input_ids, micro_batch.attention_mask
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = [model.hidden(*given)[micro_batch.label_positions] for model in models]  # (n_labels, dim) each
        rows = usual_chunk(device, student.model.config.vocab_size, torch.float32)
        chunks = zip(micro_batch.labels.split(rows), *(states.split(rows) for states in hidden), strict=True)
        return torch.cat([_values_of_rows(models, labels, states) for labels, *states in chunks], 1)


def _values_of_rows(models: list[LanguageModel], labels: torch.Tensor, hidden: list[torch.Tensor]) -> torch.Tensor:
    """As `_values`, of the hidden states of some rows, (n, dim) for each model."""
    logits, *of_teacher = (model.logits(states) for model, states in zip(models, hidden, strict=True))
    guess = logits.argmax(-1)  # (n,)
    values = [label_loss(logits, labels), guess == labels]
    for t_logits in of_teacher:
        t_guess = t_logits.argmax(-1)
        values += [ce_loss(logits, t_logits, 1.0), guess == t_guess]
        values += [label_loss(t_logits, labels), t_guess == labels]
    return torch.stack([value.double() for value in values])
