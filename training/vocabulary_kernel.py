"""The gradient of the vocabulary loss in one kernel, for GPUs (needs Triton, which PyTorch's CUDA builds bring along).

PyTorch's operations read and write the logits many times. This kernel reads them twice and writes once, in the
dtype that the products made them in: one program for each row first finds the sums of the softmaxes, and then the loss
and the gradient, which it writes over the student's logits. It computes in float32, and adds in an order that never
changes.

Dimensions: n rows, the first n_labels of them with a label; voc_size; voc_padded columns in memory.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 2048  # that a program holds at a time


@triton.jit
def _read(row, columns, voc_size, voc_padded):
    """Logits as float32, and past the end of the vocabulary what adds nothing to a softmax. (A mask that ends with the
    vocabulary would keep the compiler from loading several at a time.)"""
    logits = tl.load(row + columns, mask=columns < voc_padded, other=0.0).to(tl.float32)
    return tl.where(columns < voc_size, logits, -1e30)


@triton.jit
def _add_to_sum(largest, total, logits):
    """Each lane keeps the largest logit so far, and the sum of exponentials relative to it."""
    new_largest = tl.maximum(largest, logits)
    return new_largest, total * tl.exp(largest - new_largest) + tl.exp(logits - new_largest)


@triton.jit
def _log_sum(largest, total):
    """Of the exponentials of all lanes."""
    of_row = tl.max(largest, 0)
    return of_row + tl.log(tl.sum(total * tl.exp(largest - of_row), 0))


@triton.jit(do_not_specialize=["n_rows", "n_labels"])  # they differ in every micro-batch
def _row_gradient(
    s_logits, t_logits, labels, losses, n_rows, n_labels, voc_size, voc_padded, ce, mse, of_label, temperature,
    HAS_CE: tl.constexpr, HAS_MSE: tl.constexpr, HAS_LABELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = s_logits + row * voc_padded, t_logits + row * voc_padded
    lanes = tl.arange(0, COLUMNS)
    nothing = tl.zeros([COLUMNS], tl.float32)

    s_largest, t_largest, hard_largest = nothing - 1e30, nothing - 1e30, nothing - 1e30
    s_total, t_total, hard_total = nothing, nothing, nothing  # "hard": at temperature 1, for the label
    for start in range(0, voc_size, COLUMNS):
        s = _read(s_row, start + lanes, voc_size, voc_padded)
        if HAS_CE:
            t = _read(t_row, start + lanes, voc_size, voc_padded)
            s_largest, s_total = _add_to_sum(s_largest, s_total, s / temperature)
            t_largest, t_total = _add_to_sum(t_largest, t_total, t / temperature)
        if HAS_LABELS:
            hard_largest, hard_total = _add_to_sum(hard_largest, hard_total, s)
    if HAS_CE:
        s_log_sum, t_log_sum = _log_sum(s_largest, s_total), _log_sum(t_largest, t_total)
    if HAS_LABELS:
        hard_log_sum = _log_sum(hard_largest, hard_total)
        has_label = row < n_labels
        label = tl.load(labels + row, mask=has_label, other=-1)
        weight = tl.where(has_label, of_label, 0.0)

    divergence, squares, at_label = nothing, nothing, nothing
    for start in range(0, voc_padded, COLUMNS):
        columns = start + lanes
        inside = columns < voc_size
        s = _read(s_row, columns, voc_size, voc_padded)
        gradient = nothing
        if HAS_CE or HAS_MSE:
            t = _read(t_row, columns, voc_size, voc_padded)
        if HAS_CE:
            p, q = tl.exp(s / temperature - s_log_sum), tl.exp(t / temperature - t_log_sum)
            gradient += ce * temperature * (p - q)
            divergence += tl.where(inside, q * (t - s) / temperature, 0.0)
        if HAS_MSE:
            gradient += 2 * mse * (s - t)
            squares += (s - t) * (s - t)
        if HAS_LABELS:
            is_label = columns == label
            gradient += weight * (tl.exp(s - hard_log_sum) - tl.where(is_label, 1.0, 0.0))
            at_label += tl.where(is_label, s, 0.0)
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(s_row + columns, gradient.to(s_logits.dtype.element_ty), mask=columns < voc_padded)

    if HAS_CE:
        kl = tl.sum(divergence, 0) - t_log_sum + s_log_sum
        tl.store(losses + row, ce * temperature * temperature * kl)
    if HAS_MSE:
        tl.store(losses + n_rows + row, mse * tl.sum(squares, 0))
    if HAS_LABELS:
        tl.store(losses + 2 * n_rows + row, weight * (hard_log_sum - tl.sum(at_label, 0)))


def fused_gradient(
    s: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    weights: dict[str, float],
    temperature: float,
    voc_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `losses.chunk_gradient`."""
    n, voc_padded = s.shape
    label_term = next((term for term in weights if term not in ("ce", "mse")), "")
    losses = s.new_zeros(3, n, dtype=torch.float32)  # of each row: ce, mse, labels
    _row_gradient[(n,)](
        s, t, labels, losses, n, len(labels), voc_size, voc_padded,
        weights.get("ce", 0.0), weights.get("mse", 0.0), weights.get(label_term, 0.0), float(temperature),
        "ce" in weights, "mse" in weights, bool(label_term) and len(labels) > 0, COLUMNS, num_warps=8,
    )  # fmt: skip
    of_term = dict(zip(("ce", "mse", label_term), losses.double().sum(1), strict=True))
    return torch.stack([of_term[term] for term in weights]), s.sum(0, dtype=torch.float32)
