"""What the student learns from: the weighted sum of the terms of the loss, for a micro-batch.

Dimensions: bs sequences of seq_length tokens; n_tokens attended positions; n_rows positions that reach the vocabulary
head; dim.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from models.flops import TrainingWork
from models.language_model import LanguageModel
from models.student import followed_layers
from training.batches import MicroBatch, StepCounts
from training.losses import (
    VOCABULARY_TERMS,
    Projection,
    Widening,
    at_least_float32,
    cos_loss,
    layer_loss,
    vocabulary_loss,
)
from training.recipe import Recipe
from training.relation_loss import KINDS, relation_loss, usual_heads
from utils import InputError


def loss_weights(alphas: dict[str, float], counts: StepCounts) -> dict[str, float]:
    """Each term's alpha, divided by the number of rows, labels, tokens, or sequences of the whole step, on all
    processes, that the term is a mean over.

    The gradients of all micro-batches and processes then add up to the gradient of that mean, whatever their sizes.
    """
    divisors = {
        "ce": counts.rows, "mse": counts.rows, "mlm": counts.labels, "clm": counts.labels, "cos": counts.tokens,
        "relation": counts.tokens, "layers": counts.tokens, "pooled": counts.sequences,
    }  # fmt: skip
    return {term: alpha / max(1, divisors[term]) for term, alpha in alphas.items()}


class Outputs(NamedTuple):
    """A model's outputs for a micro-batch, as far as a loss needs them."""

    hidden: torch.Tensor  # (bs * seq_length, dim) last hidden states
    rows: torch.Tensor | None  # (n_rows, dim) what the projection onto the vocabulary is applied to
    vectors: tuple[torch.Tensor, ...] | None  # (bs, seq_length, width) queries, keys and values
    states: list[torch.Tensor] | None  # (n_tokens, dim) of the embeddings and of each layer that is compared


class Objective:
    """The loss of a student.

    Args:
        recipe: the alphas, and the like.
        student: the model to train.
        teacher: frozen; None where no loss needs one.
        device: of both.
        dtype: what to compute in: half precision under autocast, otherwise the models' own.

    Attributes:
        widening: what is trained beside the student, and is not part of it.
        work: the FLOPs of a step.

    Raises: InputError if the teacher has no such layer, or its vectors can't be cut into so many relation heads.
    """

    def __init__(
        self, recipe: Recipe, student: LanguageModel, teacher: LanguageModel | None, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.recipe, self.student, self.device, self.dtype = recipe, student, device, dtype
        self.teacher = teacher if recipe.uses_teacher else None
        compares_states = recipe.alpha_cos or recipe.alpha_layers or recipe.alpha_pooled
        self.widening = Widening(student.dim, teacher.dim if compares_states else student.dim).to(device)
        self.t_projection = Projection.of(teacher.projection, dtype) if recipe.uses_teacher_logits else None
        heads = recipe.uses_logits, recipe.uses_teacher_logits
        n_compared = (1 if recipe.alpha_cos else 0) + (student.depth + 1 if recipe.alpha_layers else 0)
        self.center = torch.zeros((), device=device)  # of the teacher's vectors of texts (see `find_center`)
        self.work = TrainingWork(student, self.teacher, *heads, self.widening, n_compared)
        if recipe.alpha_relation:
            self._watch_relations()
        if recipe.alpha_layers:
            layers = followed_layers(recipe.teacher_layers, student.model.config, teacher.model.config)
            self.states_of = {student: range(student.depth + 1), teacher: [0, *(layer + 1 for layer in layers)]}

    def _watch_relations(self) -> None:
        recipe, student, teacher = self.recipe, self.student, self.teacher
        layer = teacher.depth - 1 if recipe.relation_layer is None else recipe.relation_layer
        if layer >= teacher.depth:
            raise InputError(f"--relation_layer {layer}: the teacher's layers are 0 to {teacher.depth - 1}.")
        s_widths, t_widths = student.watch(student.depth - 1), teacher.watch(layer)
        self.relation_heads = recipe.relation_heads or usual_heads((*s_widths, *t_widths))
        for who, widths in (("student", s_widths), ("teacher", t_widths)):
            for kind, width in zip(KINDS, widths, strict=True):
                if width % self.relation_heads:
                    raise InputError(
                        f"--relation_heads {self.relation_heads} does not divide {width}, the width of the {who}'s "
                        f"{kind}; {usual_heads((*s_widths, *t_widths))} would do."
                    )
        self.work.add_relations(sum(s_widths), sum(t_widths))

    def begin_step(self) -> None:
        """Copies the student's projection, which the last step has changed, for matrix products."""
        if self.recipe.uses_logits:
            self.s_projection = Projection.of(self.student.projection, self.dtype)

    def read_as_student(self, micro_batch: MicroBatch) -> Outputs:
        return self._read(self.student, micro_batch, self.recipe.uses_logits)

    @torch.no_grad()
    def read_as_teacher(self, micro_batch: MicroBatch) -> Outputs | None:
        """None if no loss needs a teacher."""
        return self._read(self.teacher, micro_batch, self.recipe.uses_teacher_logits) if self.teacher else None

    def _read(self, model: LanguageModel, micro_batch: MicroBatch, needs_rows: bool) -> Outputs:
        given, states = (micro_batch.input_ids, micro_batch.attention_mask, micro_batch.packing), None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            if self.recipe.alpha_layers:
                every = model.states(*given)
                hidden = every[-1]
                states = [every[i].index_select(0, micro_batch.token_positions) for i in self.states_of[model]]
            else:
                hidden = model.hidden(*given)
            rows = model.transform(hidden.index_select(0, micro_batch.row_positions)) if needs_rows else None
        return Outputs(hidden, rows, model.vectors if self.recipe.alpha_relation else None, states)

    def __call__(
        self, s: Outputs, t: Outputs | None, micro_batch: MicroBatch, weights: dict[str, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch.

        Args:
            s, t: what student and teacher make of it.
            weights: what the sum of each term is multiplied by (see `loss_weights`).

        Returns: the loss, a scalar; (number of weights,) float64, what each term adds to it, without gradient.
        """
        loss, parts = torch.zeros((), device=self.device), {}
        if of_vocabulary := {term: weight for term, weight in weights.items() if term in VOCABULARY_TERMS}:
            loss, of_each = vocabulary_loss(
                s.rows, self.student.projection, self.s_projection, t.rows if t else None, self.t_projection,
                micro_batch.labels, of_vocabulary, self.recipe.temperature,
            )  # fmt: skip
            parts |= zip(of_vocabulary, of_each, strict=True)
        if "cos" in weights:
            positions = micro_batch.token_positions
            s_hidden = self.widening(at_least_float32(s.hidden.index_select(0, positions)))  # (n_tokens, dim)
            cos = weights["cos"] * cos_loss(s_hidden, t.hidden.index_select(0, positions))
            loss = loss + cos
            parts["cos"] = cos.detach().double()
        if "relation" in weights:
            relation = weights["relation"] * self._relations(s.vectors, t.vectors, micro_batch)
            loss = loss + relation
            parts["relation"] = relation.detach().double()
        if "layers" in weights:
            widened = [self.widening(at_least_float32(states)) for states in s.states]
            layers = weights["layers"] * layer_loss(widened, t.states)
            loss = loss + layers
            parts["layers"] = layers.detach().double()
        if "pooled" in weights:
            s_pooled, t_pooled = (self._pool(outputs.hidden, micro_batch) for outputs in (s, t))  # (bs, dim)
            directions = (normalize(vectors, dim=-1) - self.center for vectors in (self.widening(s_pooled), t_pooled))
            pooled = weights["pooled"] * cos_loss(*directions)
            loss = loss + pooled
            parts["pooled"] = pooled.detach().double()
        return loss, torch.stack([parts[term] for term in weights])

    @torch.no_grad()
    def find_center(self, micro_batches: list[MicroBatch]) -> None:
        """The mean of the teacher's vectors of some texts, from which `pooled` measures directions from now on.

        Encoders keep their vectors in a narrow cone. Seen from the origin, vectors of unrelated texts have nearly the
        same direction, and what tells texts apart is a small part of the loss.
        """
        vectors = []
        for micro_batch in micro_batches:
            micro_batch = micro_batch.to(self.device)
            vectors.append(normalize(self._pool(self.read_as_teacher(micro_batch).hidden, micro_batch), dim=-1))
        self.center = torch.cat(vectors).mean(0)  # (dim of the teacher,)

    def _pool(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """(bs * seq_length, dim) -> (number of sequences, dim), as the teacher does it."""
        groups = micro_batch.by_sequence(at_least_float32(hidden))
        return torch.cat([self.teacher.pooling(states, attended) for (states,), attended in groups])

    def _relations(
        self, s_vectors: tuple[torch.Tensor, ...], t_vectors: tuple[torch.Tensor, ...], micro_batch: MicroBatch
    ) -> torch.Tensor:
        """The relation loss of queries, keys and values, (1 or bs, seq_length, width) each."""
        loss = torch.zeros((), device=self.device)
        flat = (vectors.flatten(0, 1) for vectors in (*s_vectors, *t_vectors))
        for vectors, attended in micro_batch.by_sequence(*flat):
            s, t = vectors[: len(KINDS)], vectors[len(KINDS) :]
            loss = loss + relation_loss(s, t, self.relation_heads, attended, self.student.family.causal)
        return loss
