"""A DistilBERT as a BERT, for software that knows only BERT: the same layers and heads, and token types of zero."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForTokenClassification,
    DistilBertModel,
    PreTrainedModel,
)

from models.student import BERT_LAYER, BERT_SHAPE
from utils import InputError

SAME_HEAD = {
    DistilBertModel: BertModel,
    DistilBertForMaskedLM: BertForMaskedLM,
    DistilBertForQuestionAnswering: BertForQuestionAnswering,
    DistilBertForTokenClassification: BertForTokenClassification,
}
# DistilBERT's name of a part -> BERT's.
PARTS = {f".{ours}.": f".{theirs}." for ours, theirs in BERT_LAYER.items()} | {
    "distilbert.": "bert.",
    "transformer.layer.": "encoder.layer.",
    "vocab_transform.": "cls.predictions.transform.dense.",
    "vocab_layer_norm.": "cls.predictions.transform.LayerNorm.",
    "vocab_projector.": "cls.predictions.decoder.",
}


def as_bert(model: PreTrainedModel) -> PreTrainedModel:
    """A BERT with the same outputs, to rounding.

    Raises: InputError if the model is no DistilBERT, or has a head that BERT does not have.
    """
    name = model.name_or_path
    if model.config.model_type != "distilbert":
        raise InputError(f"{name} is a {model.config.model_type}, not a distilbert.")
    if type(model) not in SAME_HEAD:
        raise InputError(
            f"{name} is a {type(model).__name__}, and BERT's head for that is another one: rewrite the student that it "
            f"was fine-tuned from, and fine-tune the result."
        )
    bert = SAME_HEAD[type(model)](bert_config(model.config), **no_pooler(type(model)))
    state = {bert_name(key): value for key, value in model.state_dict().items()}
    if bias := [key for key in state if key.endswith("decoder.bias")]:
        state["cls.predictions.bias"] = state[bias[0]]
    types = next(key for key in bert.state_dict() if key.endswith("token_type_embeddings.weight"))
    state[types] = torch.zeros(bert.config.type_vocab_size, bert.config.hidden_size)
    bert.load_state_dict(state)
    bert.tie_weights()
    return bert.eval()


def bert_name(name: str) -> str:
    """Of a weight, given DistilBERT's name for it."""
    for ours, theirs in PARTS.items():
        name = name.replace(ours, theirs)
    return name


def no_pooler(model_class: type[PreTrainedModel]) -> dict:
    """What tells a bare BERT to leave out the layer that a DistilBERT has not got."""
    return {"add_pooling_layer": False} if model_class is DistilBertModel else {}


def bert_config(config) -> BertConfig:
    shape = {theirs: getattr(config, ours) for ours, theirs in BERT_SHAPE.items()}
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    return BertConfig(**shape, **labels, layer_norm_eps=1e-12, tie_word_embeddings=config.tie_word_embeddings)
