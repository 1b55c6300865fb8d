"""The second step of distillation: a student learns a task from a teacher that has been fine-tuned on it.

First its hidden states, and if asked for its relations between tokens, follow those of the teacher's layers on the
texts of the task, then its predictions follow the teacher's (Jiao et al., 2020, arXiv 1909.10351). Both are Trainers
with another loss, for `fine_tuning.FineTuner`.

Dimensions: bs texts, padded to seq_length; n_tokens of them real; dim.
"""

import argparse
import itertools
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel, Trainer

from corpus.tokenization import describe_tokenizer
from evaluation.fine_tuning import FineTuner, encode, longest, taken_by
from models.language_model import LayerVectors
from models.student import followed_layers
from training import losses
from training.relation_loss import relation_loss, usual_heads
from utils import InputError, integer, real


def check_shared_vocabulary(teacher: str, teachers_tokenizer, student: str, students_tokenizer) -> None:
    """Raises InputError unless the models read the same tokens."""
    if describe_tokenizer(teachers_tokenizer)["vocab_hash"] != describe_tokenizer(students_tokenizer)["vocab_hash"]:
        raise InputError(f"{teacher} does not share the vocabulary of {student}.")


@dataclass(frozen=True)
class Distillation:
    """How a student learns a task from a teacher.

    Attributes:
        layer_epochs, layer_rate: of following the hidden states; the predictions have the settings of the tuner.
        alpha_relation: weight of the relations between tokens, beside the hidden states.
        alpha_ce: weight of following the teacher's predictions; the labels have the rest.
        temperature: of both softmaxes.
    """

    layer_epochs: int = 2
    layer_rate: float = 1e-4
    alpha_relation: float = 0.0
    alpha_ce: float = 0.5
    temperature: float = 2.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Distillation":
        """That of `add_distillation_flags`."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def add_distillation_flags(group) -> None:
    """A flag for each number of a Distillation, on a group of a parser's flags."""
    group.add_argument(
        "--alpha_ce",
        type=real(0, 1),
        default=Distillation.alpha_ce,
        help="weight of the teacher's predictions; the labels have the rest (%(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=real(0.01, 1000),
        default=Distillation.temperature,
        help="temperature of both softmaxes in the KL to these predictions (%(default)s)",
    )
    add_layer_flags(group, Distillation.layer_epochs)


def add_layer_flags(group, n_epoch: int) -> None:
    """The flags of `follow_layers`, on a group of a parser's flags."""
    group.add_argument(
        "--layer_epochs",
        type=integer(0, 1000),
        default=n_epoch,
        help="epochs of following all the teacher's hidden states, before its predictions (%(default)s)",
    )
    group.add_argument(
        "--layer_rate",
        type=real(0, 1, low_allowed=False),
        default=Distillation.layer_rate,
        help="peak learning rate of these epochs (%(default)s)",
    )
    group.add_argument(
        "--alpha_relation",
        type=real(0, 1e6),
        default=Distillation.alpha_relation,
        help="weight of the relations between tokens in each layer, in these epochs (%(default)s)",
    )


def distil(
    tuner: FineTuner, teacher: PreTrainedModel, texts: list[tuple[str, ...]], labels: list, length: int, title: str,
    how: Distillation,
) -> None:  # fmt: skip
    """Trains the tuner's model on a task, with the help of a teacher that reads the same tokens.

    Args:
        teacher: fine-tuned on the task.
        texts: one or two for each example.
        labels: the index of the right label, or the score, of each example; None: what the teacher says.
        length: tokens of an example that are read at most.
        title: what the progress bars say.
    """
    length = min(longest(model, tuner.tokenizer, length) for model in (tuner.model, teacher))
    s_features, t_features = (encode(tuner.tokenizer, model, texts, length) for model in (tuner.model, teacher))
    on_gpu = torch.cuda.is_available() and not tuner.use_cpu
    teacher.to("cuda" if on_gpu else "cpu").eval().requires_grad_(False)
    if how.layer_epochs:
        both = [{**t, **s} for t, s in zip(t_features, s_features, strict=True)]
        follow_layers(tuner, teacher, both, f"{title}, layers", how)
    asked = FineTuner(teacher, tuner.tokenizer, tuner.settings, 0, torch.float32, tuner.use_cpu)
    t_logits = asked.predict(t_features).tolist()
    guesses = [t[0] if len(t) == 1 else int(np.argmax(t)) for t in t_logits]
    labels = [guess if label is None else label for label, guess in zip(labels, guesses, strict=True)]
    features = [{**s, "labels": label, "t_logits": t} for s, label, t in zip(s_features, labels, t_logits, strict=True)]
    tuner.train(features, title, trainer_class=TaughtTrainer, alpha=how.alpha_ce, temperature=how.temperature)


def follow_layers(
    tuner: FineTuner, teacher: PreTrainedModel, features: list[dict], title: str, how: Distillation
) -> None:
    """Trains the tuner's model to have the teacher's hidden states: its embeddings those of the teacher's, and each
    layer those of the one it was taken from (see `models.student.followed_layers`).

    Args:
        teacher: frozen, on the tuner's device.
        features: of the texts, with all that either model's `forward` takes.
        title: what the progress bar says.
        how: for how long, at which rate, and with what weight of relations.
    """
    student = tuner.model
    settings = replace(tuner.settings, n_epoch=how.layer_epochs, learning_rate=how.layer_rate)
    layers = followed_layers(None, student.config, teacher.config)
    # A part of the model for as long as it trains, since the Trainer optimizes what belongs to its model.
    student.widening = losses.Widening(student.config.hidden_size, teacher.config.hidden_size)
    follower = FineTuner(student, tuner.tokenizer, settings, tuner.seed, tuner.dtype, tuner.use_cpu)
    watched = [
        (LayerVectors(student, i), LayerVectors(teacher, layer)) for i, layer in enumerate(layers) if how.alpha_relation
    ]
    follower.train(
        features, title, trainer_class=LayerTrainer, teacher=teacher, layers=layers, watched=watched,
        alpha_relation=how.alpha_relation,
    )  # fmt: skip
    for vectors in itertools.chain.from_iterable(watched):
        vectors.remove()
    del student.widening


class LayerTrainer(Trainer):
    """The squared difference of hidden states, the sum over the layers of a mean over tokens and dimensions; and
    alpha_relation x the KL of relations, the sum over the layers of a mean over tokens (see `training.relation_loss`).

    Args:
        teacher: frozen, on the student's device.
        layers: which layer of the teacher each of the student's follows.
        watched: the vectors of each pair of layers whose relations are compared.
        alpha_relation: their weight.
    """

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel,
        layers: list[int],
        watched: list[tuple[LayerVectors, LayerVectors]],
        alpha_relation: float,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.states = teacher, [0, *(layer + 1 for layer in layers)]
        self.watched, self.alpha_relation = watched, alpha_relation
        self.heads = usual_heads([width for pair in watched for vectors in pair for width in vectors.widths])

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        attended = inputs["attention_mask"].bool()  # (bs, seq_length)
        output = model(**taken_by(self.model, inputs), output_hidden_states=True)
        with torch.no_grad(), self.accelerator.autocast():  # the student's `forward` has it around itself
            t_output = self.teacher(**taken_by(self.teacher, inputs), output_hidden_states=True)
        s = [self.model.widening(losses.at_least_float32(state[attended])) for state in output.hidden_states]
        t = [t_output.hidden_states[state][attended] for state in self.states]  # (n_tokens, dim)
        loss = losses.layer_loss(s, t)
        for of_student, of_teacher in self.watched:
            relation = relation_loss(of_student.vectors, of_teacher.vectors, self.heads, attended)
            loss = loss + self.alpha_relation * relation
        loss = loss / attended.sum()
        return (loss, output) if return_outputs else loss


class TaughtTrainer(Trainer):
    """(1 - alpha) x the loss of the task + alpha x that of following a teacher: T^2 KL(teacher || student) where there
    are labels, the squared error where there are scores.

    Args:
        alpha, temperature: of these.

    Each of the features has `t_logits`, the outputs of the teacher's head: (number of labels,) floats.
    """

    def __init__(self, *args, alpha: float, temperature: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.temperature = alpha, temperature

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        t_logits = inputs["t_logits"]  # (bs, number of labels)
        output = model(**{name: value for name, value in inputs.items() if name != "t_logits"})
        if t_logits.shape[1] == 1:
            following = mse_loss(output.logits.float(), t_logits)
        else:
            following = losses.ce_loss(output.logits, t_logits, self.temperature).mean()
        loss = (1 - self.alpha) * output.loss + self.alpha * following
        return (loss, output) if return_outputs else loss
