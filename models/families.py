"""What differs between model families. One table, FAMILIES, says where a family keeps its parts.

Dimensions: n hidden states of some of the tokens; dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from utils import InputError

# Flags of train.py -> attributes of configurations; each is set where a family has it.
DROPOUT = {
    "dropout": ("hidden_dropout_prob", "dropout", "resid_pdrop", "embd_pdrop", "embedding_dropout", "mlp_dropout"),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
}
FULL, SLIDING = "full_attention", "sliding_attention"  # types of layers, in configurations that have several


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps its parts; dotted attribute names below the model with its head."""

    encoder: str
    transform: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]  # (n, dim) last hidden states -> (n, dim)
    projection: str  # of that onto the vocabulary
    layers: str  # the list of layers
    queries_keys_values: tuple[str, ...]  # below a layer: a product for each, or one for all three
    positions: str | None = None  # the table of position embeddings; None: positions are rotations, without a table
    token_types: str | None = None
    causal: bool = False
    student: str = ""  # the family of its student, if not its own
    positions_before_first: int = 0  # rows of the table of positions that no token uses
    packs: bool = False  # whether it takes sequences without padding (see `models.packing`)


BERTS_ATTENTION = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))


def _distilbert_transform(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))


def _roberta_transform(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head.layer_norm(nn.functional.gelu(model.lm_head.dense(hidden)))


ROBERTA = Family(
    "roberta",
    _roberta_transform,
    "lm_head.decoder",
    "roberta.encoder.layer",
    BERTS_ATTENTION,
    "roberta.embeddings.position_embeddings",
    "roberta.embeddings.token_type_embeddings",
    positions_before_first=2,
    packs=True,
)
FAMILIES = {
    "distilbert": Family(
        "distilbert",
        _distilbert_transform,
        "vocab_projector",
        "distilbert.transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "distilbert.embeddings.position_embeddings",
        packs=True,
    ),
    "bert": Family(
        "bert",
        lambda model, hidden: model.cls.predictions.transform(hidden),
        "cls.predictions.decoder",
        "bert.encoder.layer",
        BERTS_ATTENTION,
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
        student="distilbert",
        packs=True,
    ),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": Family(  # its generator; the discriminator guesses no words
        "electra",
        lambda model, hidden: model.generator_predictions(hidden),
        "generator_lm_head",
        "electra.encoder.layer",
        BERTS_ATTENTION,
        "electra.embeddings.position_embeddings",
        "electra.embeddings.token_type_embeddings",
        packs=True,
    ),
    "modernbert": Family("model", lambda model, hidden: model.head(hidden), "decoder", "model.layers", ("attn.Wqkv",)),
    "eurobert": Family(
        "model",
        lambda model, hidden: hidden,
        "lm_head",
        "model.layers",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    "gpt2": Family(
        "transformer",
        lambda model, hidden: hidden,
        "lm_head",
        "transformer.h",
        ("attn.c_attn",),
        "transformer.wpe",
        causal=True,
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise InputError(f"models of type {config.model_type!r} are not supported; these are: {', '.join(FAMILIES)}.")
    return FAMILIES[config.model_type]


def max_length(config: PretrainedConfig) -> int:
    """The longest sequence that the model can take, in tokens."""
    return config.max_position_embeddings - family_of(config).positions_before_first
