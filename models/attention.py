"""A CPU's attention in bfloat16, where PyTorch's own is slow: short sequences with a backward pass."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_short_in_float32"  # as `transformers` lists it
SHORT = 256  # tokens; docs/speed.md has the times on both sides of it


def take_short_sequences_in_float32(model: PreTrainedModel) -> None:
    """On a CPU. PyTorch makes the backward pass of many small products, and prepares each for the hardware's bfloat16,
    which takes longer than the product itself. (It has no such kernel where attention weights have dropout.)"""
    AttentionInterface.register(NAME, attend_on_cpu)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend_on_cpu(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As `transformers`' own function of this kind.

    Args:
        module: the attention layer.
        query, key, value: (bs, n_heads, seq_length, dim of a head).
        attention_mask: (bs, 1, seq_length, seq_length), boolean, or added to the scores.

    Returns: (bs, seq_length, n_heads, dim of a head), in the dtype of `query`; None in place of the maps.
    """
    has_backward_pass = torch.is_grad_enabled() and query.requires_grad
    is_short = query.dtype == torch.bfloat16 and query.shape[-2] <= SHORT
    if not has_backward_pass or not is_short or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        vectors = query.float(), key.float(), value.float()
        output, _ = sdpa_attention_forward(module, *vectors, attention_mask, **options)
    return output.to(query.dtype), None
