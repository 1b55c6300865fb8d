"""A narrower model: the channels, heads, and neurons of a wider one that matter most on some text, with their weights
(structured pruning; Muralidharan et al., 2024, arXiv 2407.14679).

A channel is an entry of the hidden states, the same in all layers. The larger its values are after the layer norms, the
more it matters. A head, or a neuron of a feed-forward layer, matters the more, the more it adds to the hidden states.

Dimensions: dim of the hidden states.
"""

import copy
import functools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from models.families import family_of
from models.language_model import LanguageModel
from models.student import BERT_LAYER
from utils import InputError

NARROWABLE = ("distilbert", "bert", "roberta", "xlm-roberta", "camembert")  # those with BERT's layers
CHANNELS, HEADS, NEURONS = "channels", "heads", "neurons"
# Product of a layer, by DistilBERT's name -> what the rows of its weights are (its outputs), and what the columns are.
PRODUCTS = {
    "attention.q_lin": (HEADS, CHANNELS),
    "attention.k_lin": (HEADS, CHANNELS),
    "attention.v_lin": (HEADS, CHANNELS),
    "attention.out_lin": (CHANNELS, HEADS),
    "ffn.lin1": (NEURONS, CHANNELS),
    "ffn.lin2": (CHANNELS, NEURONS),
}
PRODUCTS |= {BERT_LAYER[name]: kinds for name, kinds in PRODUCTS.items()}


def narrow_config(config: PretrainedConfig, dim: int) -> PretrainedConfig:
    """The same shape with hidden states of this width, and proportionally few heads and neurons.

    Raises: InputError if there is no such model.
    """
    if config.model_type not in NARROWABLE:
        raise InputError(f"--dim: a {config.model_type} can't be made narrower; these can: {', '.join(NARROWABLE)}.")
    of_head = config.hidden_size // config.num_attention_heads
    if dim >= config.hidden_size or dim % of_head:
        raise InputError(
            f"--dim {dim}: heads are {of_head} wide, so give a multiple of {of_head} below {config.hidden_size}."
        )
    narrow, neurons = copy.deepcopy(config), _neurons(config)
    setattr(narrow, neurons, getattr(config, neurons) * dim // config.hidden_size)
    narrow.hidden_size, narrow.num_attention_heads = dim, dim // of_head
    return narrow


def _neurons(config: PretrainedConfig) -> str:
    """What a configuration calls the width of the feed-forward layers."""
    return "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"


def narrowed(model: PreTrainedModel, dim: int, text: Iterable) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """The shape and the weights of a narrower model.

    Args:
        dim: of its hidden states, as `narrow_config` takes it.
        text: batches to measure on, on the model's device (`training.batches.MicroBatch`).
    """
    config, parts = narrow_config(model.config, dim), list(_parts(model))
    importance = _importance(model, parts, text)
    channels = _largest(importance[CHANNELS], dim)
    of_layer = {}  # the heads and the neurons that are kept of each
    for part in parts:
        if part.columns == HEADS:
            heads = importance[part.name].unflatten(0, (model.config.num_attention_heads, -1))  # (n_heads, head width)
            places = torch.arange(heads.numel()).view(heads.shape)
            of_layer[part.layer, HEADS] = places[_largest(heads.sum(1), config.num_attention_heads)].flatten()
        elif part.columns == NEURONS:
            of_layer[part.layer, NEURONS] = _largest(importance[part.name], getattr(config, _neurons(config)))
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    for part in parts:
        rows, columns = (
            channels if kind == CHANNELS else of_layer.get((part.layer, kind)) for kind in (part.rows, part.columns)
        )
        for name, _ in part.module.named_parameters(part.name, recurse=False):
            tensor = state[name] if rows is None else state[name][rows]
            state[name] = tensor[:, columns].contiguous() if tensor.ndim == 2 else tensor
    return config, state


class Part(NamedTuple):
    """A module with weights: its name, the name of the layer it is in ("" outside), and what the rows and the columns
    of its weights are; None for entries of a vocabulary or positions."""

    name: str
    module: nn.Module
    layer: str
    rows: str | None
    columns: str


def _parts(model: PreTrainedModel) -> Iterator[Part]:
    family = family_of(model.config)
    in_layer = re.compile(rf"({re.escape(family.layers)}\.\d+)\.(.+)")
    projection = model.get_submodule(family.projection)
    for name, module in model.named_modules():
        layer, product = match.groups() if (match := in_layer.fullmatch(name)) else ("", "")
        if isinstance(module, nn.Embedding) or module is projection:
            yield Part(name, module, layer, None, CHANNELS)
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            yield Part(name, module, layer, *PRODUCTS.get(product, (CHANNELS, CHANNELS)))


@torch.no_grad()
def _importance(model: PreTrainedModel, parts: list[Part], text: Iterable) -> dict[str, torch.Tensor]:
    """CHANNELS -> (dim,), how large each channel is; the name of each product that adds to the hidden states -> (number
    of its columns,), how large what each of them adds is."""
    found: dict[str, torch.Tensor] = {}
    tokens = None  # where those of a batch are, without padding

    def after_norm(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        add(CHANNELS, output.flatten(0, 1)[tokens].abs())

    def after_product(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        add(name, args[0].flatten(0, 1)[tokens].square() * module.weight.square().sum(0))

    def add(name: str, values: torch.Tensor) -> None:
        found[name] = found.get(name, 0) + values.sum(0).cpu()

    hooks = []
    for part in parts:
        if isinstance(part.module, nn.LayerNorm):
            hooks.append(part.module.register_forward_hook(after_norm))
        elif part.columns in (HEADS, NEURONS):
            hooks.append(part.module.register_forward_hook(functools.partial(after_product, part.name)))
    encoder = LanguageModel(model.eval())
    for batch in text:
        tokens = batch.token_positions
        encoder.hidden(batch.input_ids, batch.attention_mask)
    for hook in hooks:
        hook.remove()
    return found


def _largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """(n,) int64, the places of the n largest of some values, in their order."""
    return values.topk(n).indices.sort().values
