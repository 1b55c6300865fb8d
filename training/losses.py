"""The terms of the distillation loss, of each row or summed over rows: the caller divides by how many rows there are in
the whole step, so that batches of unequal size weigh by their tokens.

Pure functions of tensors, in float32, or in float64 if that comes in.
Dimensions: n rows (hidden states or logits of some of the tokens); voc_size; dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Terms(NamedTuple):
    """One value for each term of the loss: its weight, its number of rows, or its sum over rows, a scalar tensor.

    Attributes:
        ce: KL to the teacher's soft predictions.
        mse: squared error of the student's logits against the teacher's.
        labels: cross-entropy with the true tokens: the masked ones (MLM), or the next ones (CLM).
        cos: direction of the last hidden states.
        relation: relations between the tokens of a sequence (see `relation_loss`).
    """

    ce: Any = 0.0
    mse: Any = 0.0
    labels: Any = 0.0
    cos: Any = 0.0
    relation: Any = 0.0

    def map(self, function: Callable, *others: "Terms") -> "Terms":
        """The function's value for each term, called with that term's value here and in `others`."""
        return Terms(*map(function, self, *others))

    @classmethod
    def zeros(cls, device: torch.device) -> "Terms":
        """Scalars to add sums to, float64."""
        return cls(*torch.zeros(len(cls._fields), dtype=torch.float64, device=device))


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64, in which tests compute, stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def distillation(s_logits: torch.Tensor, t_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each row (Hinton et al., 2015; T^2 keeps the gradient's size).

    Args:
        s_logits, t_logits: (n, voc_size) of student and teacher.

    Returns: (n,) float32 or float64.
    """
    s_log_probs = F.log_softmax(at_least_float32(s_logits) / temperature, dim=-1)  # (n, voc_size)
    t_log_probs = F.log_softmax(at_least_float32(t_logits) / temperature, dim=-1)  # (n, voc_size)
    return F.kl_div(s_log_probs, t_log_probs, reduction="none", log_target=True).sum(-1) * temperature**2


def cross_entropy(s_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row with the true token: the MLM loss at masked positions, the CLM loss at all.

    Args:
        s_logits: (n, voc_size).
        labels: (n,) int64.

    Returns: (n,) float32 or float64.
    """
    return F.cross_entropy(at_least_float32(s_logits), labels, reduction="none")


class Widening(nn.Module):
    """A learned projection of the student's hidden states to the teacher's width, so that their directions can be
    compared. It serves the training only, and is no part of the student. Where both are of one width, nothing is done.
    """

    def __init__(self, s_dim: int, t_dim: int) -> None:
        super().__init__()
        self.projection = nn.Identity() if s_dim == t_dim else nn.Linear(s_dim, t_dim, bias=False)

    def forward(self, s_hidden: torch.Tensor) -> torch.Tensor:
        """(n, s_dim) -> (n, t_dim)."""
        return self.projection(s_hidden)


def cosine(s_hidden: torch.Tensor, t_hidden: torch.Tensor) -> torch.Tensor:
    """Sum over rows of 1 - cos(student's, teacher's last hidden state).

    Args:
        s_hidden, t_hidden: (n, dim).

    Returns: scalar, float32 or float64.
    """
    return (1 - F.cosine_similarity(at_least_float32(s_hidden), at_least_float32(t_hidden), dim=-1)).sum()
