"""Sequences one after the other, without padding, and attention that stays within each of them.

On a GPU PyTorch's flash kernel takes them as they are, with dropout and without a mask. On a CPU a loop over the
sequences stands in for it, which is slow, and serves to test everything around it.

Dimensions: bs sequences of n_tokens in all; n_heads heads of dim_head.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils import reason_of

ATTENTION = "packed"  # among the library's kinds of attention


class Packing(NamedTuple):
    """Where the sequences of a micro-batch lie in its one row."""

    position_ids: torch.Tensor  # (1, n_tokens) int64, from 0 in each sequence
    ends: torch.Tensor  # (bs + 1,) int32: 0, and where each sequence ends (cu_seqlens)
    longest: int  # tokens


def flash(query, key, value, packing: Packing, dropout: float, scaling: float | None) -> torch.Tensor:
    """Attention as PyTorch's flash kernel computes it; all (n_tokens, n_heads, dim_head)."""
    # torch.nn.attention.varlen has a public form of this, but without dropout.
    return torch.ops.aten._flash_attention_forward(
        query, key, value, packing.ends, packing.ends, packing.longest, packing.longest,
        dropout_p=dropout, is_causal=False, return_debug_mask=False, scale=scaling,
    )[0]  # fmt: skip


def one_by_one(query, key, value, packing: Packing, dropout: float, scaling: float | None) -> torch.Tensor:
    """The same on any device, a sequence at a time."""
    cuts = packing.ends[1:-1].tolist()
    sequences = zip(*(part.transpose(0, 1).tensor_split(cuts, 1) for part in (query, key, value)), strict=True)
    each = [F.scaled_dot_product_attention(*parts, dropout_p=dropout, scale=scaling) for parts in sequences]
    return torch.cat(each, 1).transpose(0, 1)


def packed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, packing: Packing | None = None, **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What the models of `transformers` call. Without `packing`, the usual attention of padded sequences.

    Args:
        query, key, value: (bs, n_heads, seq_length, dim_head); packed (1, n_heads, n_tokens, dim_head).

    Returns: (bs, seq_length, n_heads, dim_head).
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    attend = one_by_one if query.device.type == "cpu" else flash
    flat = [part[0].transpose(0, 1) for part in (query, key, value)]
    return attend(*flat, packing, dropout, scaling)[None], None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@functools.cache
def kernel_fault(device: torch.device, dtype: torch.dtype, dim_head: int) -> str | None:
    """Why `flash` can't serve on this GPU, tried on two short sequences; None if it can, or on a CPU."""
    if device.type != "cuda":
        return None
    if dtype.itemsize != 2:
        return "the kernel for it computes in half precision"
    query, key, value = torch.randn(3, 24, 2, dim_head, device=device, dtype=dtype).requires_grad_()
    packing = Packing(None, torch.tensor([0, 8, 24], device=device, dtype=torch.int32), 16)
    try:
        found = flash(query, key, value, packing, 0.0, None)
        found.sum().backward()
    except (RuntimeError, TypeError, AttributeError) as error:  # it is not public: other versions may lack it
        return f"PyTorch's flash kernel fails here: {reason_of(error)}"
    if not torch.allclose(found, one_by_one(query, key, value, packing, 0.0, None), atol=0.05):
        return "PyTorch's flash kernel gives other results here"
    return None
