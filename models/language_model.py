"""A model taken apart into what the losses need: hidden states, the rows for the vocabulary head, queries and keys.

Dimensions: bs sequences of seq_length tokens; n hidden states of some of the tokens; dim; voc_size.
"""

import functools

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.families import FULL, SLIDING, family_of
from models.packing import ATTENTION, Packing
from models.sentence_encoder import Pooling


class LayerVectors:
    """The queries, keys and values of one of a model's layers, as the model's last call left them.

    Attributes:
        widths: of each of the three.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        family = family_of(model.config)
        self._found: dict[str, torch.Tensor] = dict.fromkeys(family.queries_keys_values)
        products = {name: model.get_submodule(f"{family.layers}.{layer}.{name}") for name in self._found}
        self._hooks = [
            product.register_forward_hook(functools.partial(self._keep, name)) for name, product in products.items()
        ]
        widths = [product.nf if isinstance(product, Conv1D) else product.out_features for product in products.values()]
        self.widths = tuple(widths) if len(widths) == 3 else (widths[0] // 3,) * 3

    def _keep(self, name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self._found[name] = output

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """(bs, seq_length, width) each, before heads and rotations."""
        found = tuple(self._found.values())
        return found if len(found) == 3 else found[0].chunk(3, -1)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class LanguageModel(nn.Module):
    """A model taken apart into encoder and vocabulary head, so that only the rows of interest reach the head.

    Args:
        pooling: how it makes one vector of a text.
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling | None = None) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling or Pooling()
        self.family = family_of(model.config)
        self.watched: LayerVectors | None = None

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, packing: Packing | None = None
    ) -> torch.Tensor:
        """(bs, seq_length) ids -> (bs * seq_length, dim) last hidden states.

        Args:
            attention_mask: (bs, seq_length) bool; padding stands at the right. None: nothing is padded.
            packing: of several sequences in one row, after `use_packed_attention`.
        """
        return self._encode(input_ids, attention_mask, packing).last_hidden_state.flatten(0, 1)

    def states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, packing: Packing | None = None
    ) -> list[torch.Tensor]:
        """As `hidden`, of the embeddings and of each layer: depth + 1 times (bs * seq_length, dim), the last one as
        `hidden` returns it."""
        states = self._encode(input_ids, attention_mask, packing, output_hidden_states=True).hidden_states
        return [state.flatten(0, 1) for state in states]

    def _encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, packing: Packing | None, **options):
        if packing is not None:
            position_ids = packing.position_ids + self.family.positions_before_first
            options |= {"packing": packing, "position_ids": position_ids}
        if self.family.causal:
            attention_mask = None  # a causal model never looks at what is to the right
        elif attention_mask is not None:
            attention_mask = self._masks(attention_mask)
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _masks(self, attended: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """(bs, seq_length) bool -> what the encoder takes: (bs, 1, 1, seq_length), since in any other form the library
        asks the device about it; or where some layers look at near tokens only, a mask for each type of layer. It is
        what attention adds to its scores, since from bools each layer would make that again."""
        to_all = attended[:, None, None, :]
        config = self.model.config
        if SLIDING not in (getattr(config, "layer_types", None) or ()):
            return self._added(to_all)
        place = torch.arange(attended.shape[1], device=attended.device)
        near = (place[:, None] - place).abs() <= config.sliding_window  # (seq_length, seq_length)
        full = to_all.expand(-1, -1, attended.shape[1], -1)
        return {FULL: self._added(full), SLIDING: self._added(to_all & near)}

    def _added(self, attended: torch.Tensor) -> torch.Tensor:
        """0 where True, -inf where False, in the dtype of the scores."""
        kind = attended.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.encoder.dtype
        return torch.zeros_like(attended, dtype=dtype).masked_fill_(~attended, -torch.inf)

    def use_packed_attention(self) -> None:
        """From now on calls may have a `packing`."""
        self.model.set_attn_implementation(ATTENTION)

    def watch(self, layer: int) -> tuple[int, ...]:
        """From now on each call of `hidden` leaves this layer's queries, keys and values in `vectors`.

        Returns: the width of each of the three.
        """
        self.watched = LayerVectors(self.model, layer)
        return self.watched.widths

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """(bs, seq_length, width) each: queries, keys and values of the last call, before heads and rotations."""
        return self.watched.vectors

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, dim) last hidden states -> (n, dim), what the projection onto the vocabulary takes."""
        return self.family.transform(self.model, hidden)

    def cast_products(self, dtype: torch.dtype) -> None:
        """Stores the weights of a frozen model in the dtype that autocast would cast them to each time, but for those
        of the projection, which may be the embeddings too. The results are the same, bit for bit."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not self.projection:
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(dtype)

    def compile_layers(self) -> None:
        """Compiles each layer by itself: since layers are alike, one graph serves them all, and a deep model takes no
        longer to compile than a shallow one."""
        # PyTorch gives up after 8 graphs. Both models in training and in evaluation, with and without padding, make 8
        # before anything unusual comes.
        torch._dynamo.config.recompile_limit = 32
        for layer in self.model.get_submodule(self.family.layers):
            layer.compile(dynamic=True)

    def freeze_head(self) -> None:
        """Freezes all weights outside the encoder."""
        of_encoder = {id(parameter) for parameter in self.encoder.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in of_encoder:
                parameter.requires_grad_(False)

    @property
    def uses_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    @property
    def projection(self) -> nn.Linear:
        """(n, dim) -> (n, voc_size)."""
        return self.model.get_submodule(self.family.projection)

    @property
    def encoder(self) -> PreTrainedModel:
        """The model without its vocabulary head."""
        return self.model.get_submodule(self.family.encoder)

    @property
    def dim(self) -> int:
        """Of the hidden states."""
        return self.model.config.hidden_size

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return self.model.config.num_hidden_layers

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, dim) last hidden states -> (n, voc_size)."""
        return self.projection(self.transform(hidden))


def freeze(model: PreTrainedModel, table: str | None) -> bool:
    """Freezes an embedding table. Returns whether the model has it."""
    if table is None:
        return False
    model.get_submodule(table).weight.requires_grad_(False)
    return True
