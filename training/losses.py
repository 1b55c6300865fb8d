"""The terms of the loss: each as one would write it down, and those over the vocabulary also in a fast form.

`ce_loss` and its like are the plain forms, which evaluation uses too. Training computes the terms over the vocabulary
with `vocabulary_loss`, which never holds more than a chunk of logits. A row of BERT's logits is 122 kB; with those of
both models, their softmaxes and gradients, logits would take most of the memory. They need not be kept for a backward
pass, since their gradient is known in closed form. With s and t the logits of student and teacher,

    ce      T^2 KL(softmax(t / T) || softmax(s / T))    d/ds = T (softmax(s / T) - softmax(t / T))
    mse     |s - t|^2                                   d/ds = 2 (s - t)
    labels  -log softmax(s)[label]                      d/ds = softmax(s) - onehot(label)

(T^2 from the factor, 1 / T from the inner derivative of s / T.) So the logits of a chunk are computed, give the loss
and its gradient by s, from which those of the rows and of the projection follow by two matrix products, and are
overwritten by the next chunk. `ce_gradient` and its like compute value and gradient together, from a strip of the chunk
at a time; on GPUs one kernel does (`training.vocabulary_kernel`).

The weights of the terms contain the division by what is in the whole step, so that micro-batches of unequal size count
by their tokens. Apart from the products, everything computes in float32, or in float64 if given that.

Dimensions: n rows, the first n_labels of them with a label; voc_size, and voc_padded, the next multiple of 16, for
which matrix products are faster (the columns added have a bias of -inf: probability 0, exactly); dim.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from utils import logger, reason_of

LABEL_TERMS = ("mlm", "clm")  # cross-entropy with the true tokens: the masked ones, or the next ones
VOCABULARY_TERMS = ("ce", "mse", *LABEL_TERMS)
ALIGNMENT = 16
CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}  # of each model's logits at a time
# Of a strip, whose loss is computed at once, in four tensors in float32. On a CPU this is for each thread: its part of
# them should fit into its cache.
STRIP_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 27}


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64, in which tests compute, stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ----------------------------------------------------------------------------------- ce: the teacher's soft predictions


def ce_loss(s_logits: torch.Tensor, t_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each row (Hinton et al., 2015; T^2 keeps the gradient's size).

    Args:
        s_logits, t_logits: (n, voc_size) of student and teacher.

    Returns: (n,) float32 or float64.
    """
    s_log_probs = F.log_softmax(at_least_float32(s_logits) / temperature, dim=-1)  # (n, voc_size)
    t_log_probs = F.log_softmax(at_least_float32(t_logits) / temperature, dim=-1)  # (n, voc_size)
    return F.kl_div(s_log_probs, t_log_probs, reduction="none", log_target=True).sum(-1) * temperature**2


def ce_gradient(
    s: torch.Tensor, t: torch.Tensor, scratch: list[torch.Tensor], weight: float, temperature: float, voc_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the weighted sum of the losses: the gradient by the student's logits, and the value. Overwrites `s`, `t` and
    `scratch`.

    With p and q the softmaxes of s / T and t / T, KL(q || p) = sum of q (log q - log p), and log p = s / T - lse_s with
    lse_s the log of the sum of exponentials. So KL = sum of q (t - s) / T - lse_t + lse_s, which needs no logarithm of
    the whole chunk. lse_s follows from any entry, as s / T - log p; taking the largest avoids rounding errors.

    Args:
        s, t: (n, voc_padded) logits.
        scratch: two more tensors of that shape to work in.
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
    return p.sub_(q).mul_(weight * temperature), kl.double().sum() * (weight * temperature**2)


# ---------------------------------------------------------------------------------------------- mlm, clm: true tokens


def label_loss(s_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row with the true token.

    Args:
        s_logits: (n, voc_size).
        labels: (n,) int64.

    Returns: (n,) float32 or float64.
    """
    return F.cross_entropy(at_least_float32(s_logits), labels, reduction="none")


def label_gradient(s: torch.Tensor, labels: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the weighted sum of the losses: the gradient by the (n, voc_padded) logits, and the value."""
    log_probs = torch.log_softmax(s, -1)
    at_labels = labels[:, None]
    loss = -log_probs.gather(1, at_labels).double().sum()
    gradient = log_probs.exp_()
    gradient.scatter_add_(1, at_labels, gradient.new_full((1, 1), -1.0).expand(len(labels), 1))
    return gradient.mul_(weight), weight * loss


# ------------------------------------------------------------------------------------------ mse: the teacher's logits


def mse_gradient(s: torch.Tensor, t: torch.Tensor, weight: float, voc_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the weighted squared distance between the (n, voc_padded) logits: the gradient by the student's, the value."""
    apart = s - t
    apart[:, voc_size:] = 0  # where it is inf - inf
    loss = weight * torch.linalg.vecdot(apart, apart).double().sum()
    return apart.mul_(2 * weight), loss


# ----------------------------------------------------------------------- cos: the direction of the last hidden states


def cos_loss(s_hidden: torch.Tensor, t_hidden: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of 1 - cos(student's, teacher's last hidden state).

    Args:
        s_hidden, t_hidden: (n_tokens, dim).

    Returns: scalar, float32 or float64.
    """
    return (1 - F.cosine_similarity(at_least_float32(s_hidden), at_least_float32(t_hidden), dim=-1)).sum()


# -------------------------------------------------------------------------------------- layers: all the hidden states


def layer_loss(s_states: Sequence[torch.Tensor], t_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over pairs of hidden states, and over tokens, of the mean squared difference (Jiao et al., 2020, arXiv
    1909.10351, equations 8 and 9).

    Args:
        s_states, t_states: (n_tokens, dim) each, of the student's embeddings and layers, and of those they follow.

    Returns: scalar, float32 or float64.
    """
    pairs = zip(map(at_least_float32, s_states), map(at_least_float32, t_states), strict=True)
    return torch.stack([F.mse_loss(s, t, reduction="sum") / s.shape[-1] for s, t in pairs]).sum()


class Widening(nn.Module):
    """Learns to map the student's hidden states to the teacher's width, so that their directions can be compared. It
    serves the training only, and is not part of the student. If both have the same width, it does nothing.
    """

    def __init__(self, s_dim: int, t_dim: int) -> None:
        super().__init__()
        self.linear = nn.Identity() if s_dim == t_dim else nn.Linear(s_dim, t_dim, bias=False)

    def forward(self, s_hidden: torch.Tensor) -> torch.Tensor:
        """(n, s_dim) -> (n, t_dim)."""
        return self.linear(s_hidden)


# ------------------------------------------------------------------------ all terms over the vocabulary, chunk by chunk


class Projection(NamedTuple):
    """A frozen copy of a projection onto the vocabulary, ready for matrix products."""

    matrix: torch.Tensor  # (voc_padded, dim), in the dtype to compute in
    bias: torch.Tensor  # (voc_padded,), same
    voc_size: int

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> "Projection":
        voc_size, dim = linear.weight.shape
        voc_padded = -(-voc_size // ALIGNMENT) * ALIGNMENT
        matrix = linear.weight.new_zeros(voc_padded, dim, dtype=dtype)
        matrix[:voc_size] = linear.weight
        bias = matrix.new_full((voc_padded,), -torch.inf)
        bias[:voc_size] = 0 if linear.bias is None else linear.bias
        return cls(matrix, bias, voc_size)

    def logits(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(n, dim) in the dtype of the matrix -> (n, voc_padded), in `out`, of the same dtype or a wider one."""
        if self.matrix.dtype == out.dtype:  # also in half precision, for the kernel
            return torch.addmm(self.bias, rows, self.matrix.T, out=out)
        return out.copy_(F.linear(rows, self.matrix, self.bias))


def kind_of(device: torch.device) -> str:
    """Of two: whatever is not a CPU is taken for a large GPU."""
    return "cpu" if device.type == "cpu" else "cuda"


def usual_chunk(device: torch.device, voc_size: int, dtype: torch.dtype) -> int:
    """Rows of logits, in this dtype, at a time."""
    return max(1, CHUNK_BYTES[kind_of(device)] // (voc_size * dtype.itemsize))


def usual_strip(device: torch.device, voc_size: int) -> int:
    """Rows whose loss is computed at a time."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return threads * max(1, STRIP_LOGITS[kind_of(device)] // voc_size)


def vocabulary_loss(
    s_rows: torch.Tensor,
    s_linear: nn.Linear,
    s_projection: Projection,
    t_rows: torch.Tensor | None,
    t_projection: Projection | None,
    labels: torch.Tensor,
    weights: dict[str, float],
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss of some rows, whose gradients are known as soon as it returns.

    Args:
        s_rows: (n, dim) what the student's projection is applied to; in any dtype.
        s_linear: that projection; its matrix and bias get gradients, in float32 or float64.
        s_projection: `Projection.of` it, as it is now.
        t_rows: (n, dim of the teacher); None if neither ce nor mse is wanted.
        t_projection: the teacher's.
        labels: (n_labels,) int64, of the first n_labels rows. Labeled rows come first, so that the others
            need no softmax at temperature 1.
        weights: what the sum of each term is multiplied by; those of VOCABULARY_TERMS that are wanted.
        temperature: T, of the ce term.
        chunk_rows: rows at a time; None for `usual_chunk`.

    Returns:
        loss: scalar, float32 or float64; `backward` may be called on it once.
        parts: (number of weights,) float64, what each term adds to it, without gradient.
    """
    fused = None if s_projection.matrix.dtype == torch.float64 else gradient_kernel(s_rows.device)
    if chunk_rows is None:
        chunk_rows = usual_chunk(s_rows.device, len(s_projection.matrix), s_projection.matrix.dtype)
    return _VocabularyLoss.apply(
        s_rows, s_linear.weight, s_linear.bias, s_projection, t_rows, t_projection, labels, weights, temperature,
        chunk_rows, fused,
    )  # fmt: skip


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, s_rows, matrix, bias, s_projection, t_rows, t_projection, labels, weights, temperature, chunk_rows, fused
    ):
        dtype, voc_size = s_projection.matrix.dtype, s_projection.voc_size
        full = torch.promote_types(dtype, torch.float32)
        n, voc_padded = len(s_rows), len(s_projection.matrix)
        x = s_rows.detach().to(dtype)  # (n, dim)
        # The weights are alphas divided by thousands of rows, and float16 would round such gradients to 0. So they are
        # made with weights relative to the largest, and scaled in `backward`, together with what comes from above.
        scale = max(weights.values())
        relative = {term: weight / scale for term, weight in weights.items()}
        grad_rows = torch.empty_like(x)
        grad_matrix = None
        grad_bias = x.new_zeros(voc_padded, dtype=full)
        parts = x.new_zeros(len(weights), dtype=torch.float64)
        gradient_of = fused or chunk_gradient
        # Made once: getting fresh memory from the system for each chunk takes as long as the softmax itself.
        buffers = x.new_empty(2, min(chunk_rows, n), voc_padded)

        for start in range(0, n, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, n))
            s, t = buffers[:, : chunk.stop - start]  # (rows of the chunk, voc_padded)
            s_projection.logits(x[chunk], s)
            if t_projection is not None:
                t_projection.logits(t_rows[chunk].to(dtype), t)
            chunk_parts, of_bias = gradient_of(s, t, labels[chunk], relative, temperature, voc_size)
            parts += chunk_parts
            grad_bias += of_bias
            torch.mm(s, s_projection.matrix, out=grad_rows[chunk])
            # Without the padding, since autograd adds the gradient of tied embeddings in place only to a whole tensor.
            grad = s[:, :voc_size].T
            if grad_matrix is None:
                grad_matrix = torch.mm(grad, x[chunk]).to(full)
            elif dtype == full:
                grad_matrix.addmm_(grad, x[chunk])
            else:
                grad_matrix += grad @ x[chunk]

        if grad_matrix is None:
            grad_matrix = x.new_zeros(voc_size, x.shape[1], dtype=full)
        ctx.save_for_backward(grad_rows, grad_matrix, grad_bias[:voc_size])
        ctx.scale, ctx.rows_dtype, ctx.has_bias = scale, s_rows.dtype, bias is not None
        parts *= scale
        ctx.mark_non_differentiable(parts)
        return parts.sum().to(full), parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_rows, grad_matrix, grad_bias = ctx.saved_tensors
        scale = at_least_float32(grad_loss) * ctx.scale
        grad_rows = (at_least_float32(grad_rows) * scale).to(ctx.rows_dtype)
        return grad_rows, grad_matrix.mul_(scale), grad_bias * scale if ctx.has_bias else None, *[None] * 8


@functools.cache
def gradient_kernel(device: torch.device) -> Callable | None:
    """`chunk_gradient` as one kernel; None on a CPU, and where Triton is missing or can't build it."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from training.vocabulary_kernel import fused_gradient

    try:
        s, t = torch.zeros(2, 1, ALIGNMENT, device=device)
        fused_gradient(s, t, torch.zeros(1, dtype=torch.int64, device=device), {"ce": 1.0, "mlm": 1.0}, 2.0, 9)
    except Exception as error:  # whatever the compiler says, for instance that there is no C compiler
        logger.warning(
            "Triton can't build the kernel of the vocabulary loss (%s); slower operations replace it", reason_of(error)
        )
        return None
    return fused_gradient


def chunk_gradient(
    s: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    weights: dict[str, float],
    temperature: float,
    voc_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the gradient of the weighted loss by the student's logits over them, a strip at a time.

    Args:
        s, t: (n, voc_padded) logits.
        labels: (n_labels,) of the first rows.
        weights: as of `vocabulary_loss`.

    Returns: (number of weights,) float64, what each term adds to the loss; (voc_padded,) the sum of the gradient.
    """
    n, voc_padded = s.shape
    strip_rows = min(usual_strip(s.device, voc_padded), n)
    strips = s.new_empty(4, strip_rows, voc_padded, dtype=torch.promote_types(s.dtype, torch.float32))
    parts, of_bias = strips.new_zeros(len(weights), dtype=torch.float64), strips.new_zeros(voc_padded)
    for start in range(0, n, strip_rows):
        rows = slice(start, min(start + strip_rows, n))
        s_strip, t_strip, *scratch = strips[:, : rows.stop - start]
        s_strip.copy_(s[rows])
        t_strip.copy_(t[rows])
        gradient, of_strip = strip_gradient(s_strip, t_strip, scratch, labels[rows], weights, temperature, voc_size)
        parts += of_strip
        of_bias += gradient.sum(0)
        s[rows] = gradient
    return parts, of_bias


def strip_gradient(
    s: torch.Tensor,
    t: torch.Tensor,
    scratch: list[torch.Tensor],
    labels: torch.Tensor,
    weights: dict[str, float],
    temperature: float,
    voc_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the weighted loss by the student's logits, of a strip. Overwrites `s`, `t` and `scratch`.

    Args:
        s, t: (n, voc_padded) logits, float32 or float64.
        scratch: two more tensors of that shape to work in.
        labels, weights, temperature, voc_size: as of `chunk_gradient`.

    Returns: (n, voc_padded) gradient; (number of weights,) float64, what each term adds to the loss.
    """
    gradient, parts = None, {}
    if "mse" in weights:
        gradient, parts["mse"] = mse_gradient(s, t, weights["mse"], voc_size)
    of_labels = None
    for term in LABEL_TERMS:
        if term in weights and len(labels):
            of_labels, parts[term] = label_gradient(s[: len(labels)], labels, weights[term])
    if "ce" in weights:  # last, since it overwrites the logits
        soft, parts["ce"] = ce_gradient(s, t, scratch, weights["ce"], temperature, voc_size)
        gradient = soft if gradient is None else gradient.add_(soft)
    if gradient is None:
        gradient = torch.zeros_like(s) if of_labels is None or len(of_labels) < len(s) else of_labels
    if of_labels is not None and gradient is not of_labels:
        gradient[: len(of_labels)] += of_labels
    nothing = s.new_zeros((), dtype=torch.float64)  # of labels, in a chunk without any
    return gradient, torch.stack([parts.get(term, nothing) for term in weights])
