"""Which kernels compute attention, where PyTorch's own choice is slow."""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SHORT = 256  # tokens; docs/speed.md has the times on both sides of it


def choose_attention(device: torch.device) -> None:
    """For all models of this process that leave attention to PyTorch ("sdpa" in `transformers`).

    On a GPU, without cuDNN: it plans anew for each shape that a batch has for the first time, which takes many times
    as long as a step, and texts of any length bring ever new shapes. On a CPU, short sequences of bfloat16 are taken in
    float32 where there is a backward pass: PyTorch makes that one of many small products, and prepares each for the
    hardware's bfloat16, which takes longer than the product itself. (With dropout of the maps, it has no such kernel.)
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        AttentionInterface.register("sdpa", attend_on_cpu)


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
