"""The losses over the vocabulary and their gradients, chunk by chunk of rows.

A row of BERT's logits is 122 kB; with those of both models, their softmaxes and gradients, the logits of a batch are
what most memory goes to. But their gradient is known in closed form: with s and t the logits of student and teacher,

    dL/ds = w_ce T (softmax(s / T) - softmax(t / T)) + w_hard (softmax(s) - onehot(label)) + 2 w_mse (s - t)

so one pass over chunks of rows computes the logits, the losses and what the rows and the projection get as gradients,
and no more than a chunk of logits is ever alive. The sums are those of `losses`, which says where they come from.

Dimensions: n rows (tokens), the first n_labels of them with a hard label; voc_size, and voc_padded, the next multiple
of 8, which matrix products are faster at (the columns added have a bias of -inf: probability 0, exactly); dim.
"""

from typing import NamedTuple

import torch
from torch import nn

TERMS = ("ce", "mse", "hard")
ALIGNMENT = 8
CHUNK_ROWS = {"cpu": 256, "cuda": 4096}  # on a CPU the logits should stay near the cores


class Projection(NamedTuple):
    """A frozen copy of a projection onto the vocabulary, ready for matrix products."""

    weight: torch.Tensor  # (voc_padded, dim), in the dtype to compute in
    bias: torch.Tensor  # (voc_padded,), same
    voc_size: int

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> "Projection":
        voc_size, dim = linear.weight.shape
        voc_padded = -(-voc_size // ALIGNMENT) * ALIGNMENT
        weight = linear.weight.new_zeros(voc_padded, dim, dtype=dtype)
        weight[:voc_size] = linear.weight
        bias = weight.new_full((voc_padded,), -torch.inf)
        bias[:voc_size] = 0 if linear.bias is None else linear.bias
        return cls(weight, bias, voc_size)

    def logits(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(n, dim) in the dtype of the weight -> (n, voc_padded) float32, in `out`."""
        if self.weight.dtype == torch.float32:
            return torch.addmm(self.bias, rows, self.weight.T, out=out)
        return out.copy_(nn.functional.linear(rows, self.weight, self.bias))


class Weights(NamedTuple):
    """What each sum is multiplied by in the loss: alpha divided by the number of rows; 0 leaves the term out."""

    ce: float = 0.0
    mse: float = 0.0
    hard: float = 0.0


def vocabulary_loss(
    s_rows: torch.Tensor,
    s_linear: nn.Linear,
    s_projection: Projection,
    t_rows: torch.Tensor | None,
    t_projection: Projection | None,
    labels: torch.Tensor,
    weights: Weights,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss of some rows, whose gradients are known as soon as it returns.

    Args:
        s_rows: (n, dim) what the student's projection is applied to; in any dtype.
        s_linear: that projection; its weight and bias get gradients, in float32.
        s_projection: `Projection.of` it, as it is now.
        t_rows: (n, dim of the teacher); None if neither ce nor mse is wanted.
        t_projection: the teacher's.
        labels: (n_labels,) int64, of the first n_labels rows.
        weights: of the terms.
        temperature: T, of the ce term.
        chunk_rows: rows at a time; None for what suits the device.

    Returns:
        loss: scalar, float32, the weighted sum of the terms; `backward` may be called on it once.
        sums: (3,) float64, the sums over rows of the terms in the order of TERMS, without gradient.
    """
    chunk_rows = chunk_rows or CHUNK_ROWS.get(s_rows.device.type, max(CHUNK_ROWS.values()))
    return _VocabularyLoss.apply(
        s_rows, s_linear.weight, s_linear.bias, s_projection, t_rows, t_projection, labels, weights, temperature,
        chunk_rows,
    )  # fmt: skip


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, s_rows, weight, bias, s_projection, t_rows, t_projection, labels, weights, temperature, chunk_rows
    ):
        dtype, voc_size = s_projection.weight.dtype, s_projection.voc_size
        n, voc_padded = len(s_rows), len(s_projection.weight)
        x = s_rows.detach().to(dtype)  # (n, dim)
        # Gradients are made with weights relative to the largest, so that float16 holds them, and scaled in `backward`.
        scale = max(weights) or 1.0
        relative = Weights(*(value / scale for value in weights))
        grad_rows = torch.empty_like(x)
        grad_weight = x.new_zeros(voc_padded, x.shape[1], dtype=torch.float32)
        grad_bias = x.new_zeros(voc_padded, dtype=torch.float32)
        row_sums = x.new_zeros(len(TERMS), n, dtype=torch.float32)
        # Made once: to get fresh memory from the system for each chunk takes as long as the softmax itself.
        buffers = x.new_empty(4, min(chunk_rows, n), voc_padded, dtype=torch.float32)

        for start in range(0, n, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, n))
            s, t, *room = buffers[:, : chunk.stop - start]  # (rows of the chunk, voc_padded)
            s_projection.logits(x[chunk], s)
            if t_projection is not None:
                t_projection.logits(t_rows[chunk].to(dtype), t)
            grad = chunk_gradient(
                s, t, room, labels[chunk], relative, temperature, voc_size, row_sums[:, chunk]
            )  # (rows of the chunk, voc_padded)
            grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            torch.mm(grad, s_projection.weight, out=grad_rows[chunk])
            if dtype == torch.float32:
                grad_weight.addmm_(grad.T, x[chunk])
            else:
                grad_weight += grad.T @ x[chunk]

        ctx.save_for_backward(grad_rows, grad_weight[:voc_size], grad_bias[:voc_size])
        ctx.scale, ctx.rows_dtype, ctx.has_bias = scale, s_rows.dtype, bias is not None
        sums = row_sums.double().sum(1)
        ctx.mark_non_differentiable(sums)
        loss = sum(weight * total for weight, total in zip(weights, sums, strict=True))
        return loss.float(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad_loss.float() * ctx.scale
        grad_rows = (grad_rows.float() * scale).to(ctx.rows_dtype)
        return grad_rows, grad_weight.mul_(scale), grad_bias * scale if ctx.has_bias else None, *[None] * 7


def chunk_gradient(
    s: torch.Tensor,
    t: torch.Tensor,
    room: list[torch.Tensor],
    labels: torch.Tensor,
    weights: Weights,
    temperature: float,
    voc_size: int,
    row_sums: torch.Tensor,
) -> torch.Tensor:
    """The losses of each row, and their gradient by the student's logits. Overwrites `s`, `t` and `room`.

    Args:
        s, t: (n, voc_padded) logits, float32.
        room: two more of them to work in.
        labels: (n_labels,) of the first rows.
        row_sums: (3, n) receives the unweighted loss of each row and term, in the order of TERMS.

    Returns: (n, voc_padded) float32.
    """
    grad = None
    if weights.mse:
        grad = s - t
        grad[:, voc_size:] = 0  # where it is inf - inf
        row_sums[1] = torch.linalg.vecdot(grad, grad)
        grad *= 2 * weights.mse
    hard = None
    if weights.hard and len(labels):
        hard, row_sums[2, : len(labels)] = _hard_gradient(s[: len(labels)], labels, weights.hard)
    if weights.ce:
        soft, row_sums[0] = _soft_gradient(s, t, room, temperature, voc_size)
        soft *= weights.ce * temperature
        grad = soft if grad is None else grad.add_(soft)
    if grad is None:
        grad = torch.zeros_like(s) if hard is None or len(hard) < len(s) else hard
    if hard is not None and grad is not hard:
        grad[: len(hard)] += hard
    return grad


def _hard_gradient(s: torch.Tensor, labels: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy with the labels: its gradient, and each row's loss."""
    log_probs = torch.log_softmax(s, -1)
    at_labels = labels[:, None]
    row_losses = -log_probs.gather(1, at_labels).squeeze(1)
    grad = log_probs.exp_()
    grad.scatter_add_(1, at_labels, grad.new_full((1, 1), -1.0).expand(len(labels), 1))
    return grad.mul_(weight), row_losses


def _soft_gradient(
    s: torch.Tensor, t: torch.Tensor, room: list[torch.Tensor], temperature: float, voc_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(s / T) - softmax(t / T), and T^2 KL of each row. Overwrites `s`, `t` and `room`."""
    if temperature != 1:
        s /= temperature
        t /= temperature
    p, q = (torch.softmax(logits, -1, out=out) for logits, out in zip((s, t), room, strict=True))
    # log of the sum of exponentials, from the largest entry and its probability: cheaper than from all
    lse_s = s.amax(-1) - p.amax(-1).log()
    lse_t = t.amax(-1) - q.amax(-1).log()
    t -= s
    t[:, voc_size:] = 0  # where it is inf - inf
    t *= q
    kl = t.sum(-1) - lse_t + lse_s
    return p.sub_(q), kl * temperature**2
