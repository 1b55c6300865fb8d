"""The losses over the vocabulary and their gradients, chunk by chunk of rows.

A row of BERT's logits is 122 kB; with those of both models, their softmaxes and gradients, the logits of a batch are
what most memory goes to. They need not be kept for a backward pass, since their gradient is known in closed form. With
s and t the logits of student and teacher, and w the weight of each term,

    cross-entropy            -log softmax(s)[label]                      d/ds = softmax(s) - onehot(label)
    distillation at T        T^2 KL(softmax(t / T) || softmax(s / T))    d/ds = T (softmax(s / T) - softmax(t / T))
    squared error            |s - t|^2                                   d/ds = 2 (s - t)

(T^2 from the factor, 1 / T from the inner derivative of s / T.) So the logits of a chunk are computed, give the loss
and its gradient by s, from which those of the rows and of the projection follow by two matrix products, and are
overwritten by the next chunk. No more than a chunk of logits is ever alive. The sums are those of `losses`.

Dimensions: n rows, the first n_labels of them with a label; voc_size, and voc_padded, the next multiple of 8, which
matrix products are faster at (the columns added have a bias of -inf: probability 0, exactly); dim.
"""

import operator
from typing import NamedTuple

import torch
from torch import nn

from training.losses import Terms, at_least_float32

ALIGNMENT = 8
CHUNK_ROWS = {"cpu": 256, "cuda": 4096}  # on a CPU the logits should stay near the cores
CHUNK_LOGITS = 1 << 27  # of a chunk, at most; what it is computed in then takes 2 GiB, even if the vocabulary is large


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
        """(n, dim) in the dtype of the weight -> (n, voc_padded), in `out`, float32 or float64."""
        if self.weight.dtype == out.dtype:
            return torch.addmm(self.bias, rows, self.weight.T, out=out)
        return out.copy_(nn.functional.linear(rows, self.weight, self.bias))


def usual_chunk(device: torch.device, voc_size: int) -> int:
    """Rows at a time."""
    return min(CHUNK_ROWS.get(device.type, max(CHUNK_ROWS.values())), max(1, CHUNK_LOGITS // voc_size))


def vocabulary_loss(
    s_rows: torch.Tensor,
    s_linear: nn.Linear,
    s_projection: Projection,
    t_rows: torch.Tensor | None,
    t_projection: Projection | None,
    labels: torch.Tensor,
    weights: Terms,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, Terms]:
    """The weighted loss of some rows, whose gradients are known as soon as it returns.

    Args:
        s_rows: (n, dim) what the student's projection is applied to; in any dtype.
        s_linear: that projection; its weight and bias get gradients, in float32 or float64.
        s_projection: `Projection.of` it, as it is now.
        t_rows: (n, dim of the teacher); None if neither ce nor mse is wanted.
        t_projection: the teacher's.
        labels: (n_labels,) int64, of the first n_labels rows.
        weights: what each sum is multiplied by: alpha divided by the number of rows; 0 leaves a term out. Those of cos
            and relation are not looked at.
        temperature: T, of the ce term.
        chunk_rows: rows at a time; None for `usual_chunk`.

    Returns:
        loss: scalar, float32 or float64, the weighted sum of the terms; `backward` may be called on it once.
        sums: ce, mse and labels: the sums over rows, scalars, float64, without gradient.
    """
    chunk_rows = chunk_rows or usual_chunk(s_rows.device, len(s_projection.weight))
    loss, ce, mse, of_labels = _VocabularyLoss.apply(
        s_rows, s_linear.weight, s_linear.bias, s_projection, t_rows, t_projection, labels,
        weights._replace(cos=0.0, relation=0.0), temperature, chunk_rows,
    )  # fmt: skip
    return loss, Terms(ce=ce, mse=mse, labels=of_labels)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, s_rows, weight, bias, s_projection, t_rows, t_projection, labels, weights, temperature, chunk_rows
    ):
        dtype, voc_size = s_projection.weight.dtype, s_projection.voc_size
        full = torch.promote_types(dtype, torch.float32)
        n, voc_padded = len(s_rows), len(s_projection.weight)
        x = s_rows.detach().to(dtype)  # (n, dim)
        # The weights are alphas divided by thousands of rows, and float16 would round such gradients to 0. So they are
        # made with weights relative to the largest, and scaled in `backward`, together with what comes from above.
        scale = max(weights) or 1.0
        relative = weights.map(lambda value: value / scale)
        grad_rows = torch.empty_like(x)
        grad_weight = x.new_zeros(voc_padded, x.shape[1], dtype=full)
        grad_bias = x.new_zeros(voc_padded, dtype=full)
        sums = Terms.zeros(x.device)
        # Made once: to get fresh memory from the system for each chunk takes as long as the softmax itself.
        buffers = x.new_empty(4, min(chunk_rows, n), voc_padded, dtype=full)

        for start in range(0, n, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, n))
            s, t, *scratch = buffers[:, : chunk.stop - start]  # (rows of the chunk, voc_padded)
            s_projection.logits(x[chunk], s)
            if t_projection is not None:
                t_projection.logits(t_rows[chunk].to(dtype), t)
            grad, chunk_sums = chunk_gradient(s, t, scratch, labels[chunk], relative, temperature, voc_size)
            sums = sums.map(operator.add, chunk_sums)
            grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            torch.mm(grad, s_projection.weight, out=grad_rows[chunk])
            if dtype == full:
                grad_weight.addmm_(grad.T, x[chunk])
            else:
                grad_weight += grad.T @ x[chunk]

        ctx.save_for_backward(grad_rows, grad_weight[:voc_size], grad_bias[:voc_size])
        ctx.scale, ctx.rows_dtype, ctx.has_bias = scale, s_rows.dtype, bias is not None
        loss = sum(weights.map(operator.mul, sums))
        ctx.mark_non_differentiable(sums.ce, sums.mse, sums.labels)
        return loss.to(full), sums.ce, sums.mse, sums.labels

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        scale = at_least_float32(grad_loss) * ctx.scale
        grad_rows = (at_least_float32(grad_rows) * scale).to(ctx.rows_dtype)
        return grad_rows, grad_weight.mul_(scale), grad_bias * scale if ctx.has_bias else None, *[None] * 7


def chunk_gradient(
    s: torch.Tensor,
    t: torch.Tensor,
    scratch: list[torch.Tensor],
    labels: torch.Tensor,
    weights: Terms,
    temperature: float,
    voc_size: int,
) -> tuple[torch.Tensor, Terms]:
    """The gradient of the weighted loss by the student's logits. Overwrites `s`, `t` and `scratch`.

    Args:
        s, t: (n, voc_padded) logits, float32.
        scratch: two more of them to work in.
        labels: (n_labels,) of the first rows.

    Returns:
        gradient: (n, voc_padded) float32.
        sums: the unweighted sums over rows, scalars, float64; those left out are 0.
    """
    gradient, sums = None, Terms()
    if weights.mse:
        gradient = s - t
        gradient[:, voc_size:] = 0  # where it is inf - inf
        sums = sums._replace(mse=torch.linalg.vecdot(gradient, gradient).double().sum())
        gradient *= 2 * weights.mse
    hard = None
    if weights.labels and len(labels):
        hard, of_labels = _cross_entropy_gradient(s[: len(labels)], labels)
        hard *= weights.labels
        sums = sums._replace(labels=of_labels)
    if weights.ce:
        soft, ce = _distillation_gradient(s, t, scratch, temperature, voc_size)
        soft *= weights.ce * temperature
        sums = sums._replace(ce=ce)
        gradient = soft if gradient is None else gradient.add_(soft)
    if gradient is None:
        gradient = torch.zeros_like(s) if hard is None or len(hard) < len(s) else hard
    if hard is not None and gradient is not hard:
        gradient[: len(hard)] += hard
    return gradient, sums


def _cross_entropy_gradient(s: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(s) - onehot(label), and the sum of the losses."""
    log_probs = torch.log_softmax(s, -1)
    at_labels = labels[:, None]
    loss = -log_probs.gather(1, at_labels).double().sum()
    gradient = log_probs.exp_()
    gradient.scatter_add_(1, at_labels, gradient.new_full((1, 1), -1.0).expand(len(labels), 1))
    return gradient, loss


def _distillation_gradient(
    s: torch.Tensor, t: torch.Tensor, scratch: list[torch.Tensor], temperature: float, voc_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(s / T) - softmax(t / T), and the sum of T^2 KL. Overwrites `s`, `t` and `scratch`.

    With p and q the softmaxes of s / T and t / T, KL(q || p) = sum of q (log q - log p), and log p = s / T - lse_s with
    lse_s the log of the sum of exponentials. So KL = sum of q (t - s) / T - lse_t + lse_s, which needs no logarithm of
    the whole chunk. lse_s follows from any entry, as s / T - log p; the largest has no rounding to fear.
    """
    if temperature != 1:
        s /= temperature
        t /= temperature
    p, q = (torch.softmax(logits, -1, out=out) for logits, out in zip((s, t), scratch, strict=True))
    lse_s = s.amax(-1) - p.amax(-1).log()
    lse_t = t.amax(-1) - q.amax(-1).log()
    t -= s
    t[:, voc_size:] = 0  # where it is inf - inf
    t *= q
    kl = t.sum(-1) - lse_t + lse_s
    return p.sub_(q), kl.double().sum() * temperature**2
