"""What the student learns from: the loss of a micro-batch, with the teacher's help or without.

Dimensions: bs sequences of seq_length tokens; n_tokens attended positions; n_rows positions that reach the vocabulary
head; dim.
"""

import operator

import torch

from models.families import LanguageModel
from models.flops import TrainingWork
from training import losses
from training.batches import Batch, StepCounts
from training.losses import Terms
from training.recipe import Recipe
from training.relation_loss import KINDS, relation_loss, usual_heads
from training.vocabulary_loss import Projection, vocabulary_loss
from utils import InputError


class Objective:
    """The loss of a student.

    Args:
        recipe: the weights of the terms, and the like.
        student: the model to train.
        teacher: frozen; None where no loss needs one.
        device: of both.
        dtype: what to compute in: half precision under autocast, else the models' own.

    Attributes:
        names: what the log calls each term.
        alphas: the weight of each.
        widening: what is trained beside the student, and is no part of it.
        work: the FLOPs of a step.

    Raises: InputError if the teacher has no such layer, or its vectors can't be cut into so many relation heads.
    """

    def __init__(
        self, recipe: Recipe, student: LanguageModel, teacher: LanguageModel | None, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.recipe, self.student, self.device, self.dtype = recipe, student, device, dtype
        self.teacher = teacher if recipe.uses_teacher else None
        labels = recipe.alpha_mlm + recipe.alpha_clm
        self.alphas = Terms(recipe.alpha_ce, recipe.alpha_mse, labels, recipe.alpha_cos, recipe.alpha_relation)
        self.names = Terms("ce", "mse", "clm" if student.family.causal else "mlm", "cos", "relation")
        t_dim = teacher.dim if recipe.alpha_cos else student.dim
        self.widening = losses.Widening(student.dim, t_dim).to(device)
        self.t_projection = Projection.of(teacher.projection, dtype) if recipe.uses_teacher_logits else None
        heads = recipe.uses_logits, recipe.uses_teacher_logits
        self.work = TrainingWork(student, self.teacher, *heads, self.widening)
        if recipe.alpha_relation:
            self._watch_relations()

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
        """Takes note of the student's weights, which have changed with the step before."""
        if self.recipe.uses_logits:
            self.s_projection = Projection.of(self.student.projection, self.dtype)

    def n_rows(self, counts: StepCounts) -> Terms:
        """What each term's sum is divided by, to become a mean."""
        return Terms(counts.rows, counts.rows, counts.labels, counts.tokens, counts.tokens)

    def loss(self, batch: Batch, weights: Terms) -> tuple[torch.Tensor, Terms]:
        """Of one micro-batch.

        Args:
            weights: what the sums over rows are multiplied by.

        Returns: the weighted loss, a scalar, and the sums over rows, without gradient.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            s_hidden = self.student.hidden(batch.input_ids, batch.attention_mask)  # (bs * seq_length, dim)
            if self.recipe.uses_logits:
                s_rows = self.student.transform(s_hidden.index_select(0, batch.head_positions))  # (n_rows, dim)
            t_hidden, t_rows = self._teach(batch) if self.teacher else (None, None)
        loss = torch.zeros((), device=self.device)
        sums = Terms.zeros(self.device)
        if self.recipe.uses_logits:
            loss, of_logits = vocabulary_loss(
                s_rows,
                self.student.projection,
                self.s_projection,
                t_rows,
                self.t_projection,
                batch.labels,
                weights,
                self.recipe.temperature,
            )
            sums = sums.map(operator.add, of_logits)
        if weights.cos:
            s_tokens = s_hidden.index_select(0, batch.token_positions)  # (n_tokens, dim); its gradient needs no sorting
            cos = losses.cosine(self.widening(losses.at_least_float32(s_tokens)), t_hidden[batch.token_positions])
            loss = loss + weights.cos * cos
            sums = sums._replace(cos=cos.detach().double())
        if weights.relation:
            vectors, causal = (self.student.vectors, self.teacher.vectors), self.student.family.causal
            relation = relation_loss(*vectors, self.relation_heads, batch.attention_mask, causal)
            loss = loss + weights.relation * relation
            sums = sums._replace(relation=relation.detach().double())
        return loss, sums

    @torch.no_grad()
    def _teach(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(bs * seq_length, dim) and, if a loss needs logits, (n_rows, dim): the teacher's `hidden` and `transform`."""
        t_hidden = self.teacher.hidden(batch.input_ids, batch.attention_mask)
        needs_rows = self.recipe.uses_teacher_logits
        return t_hidden, self.teacher.transform(t_hidden[batch.head_positions]) if needs_rows else None
