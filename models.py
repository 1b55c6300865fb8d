"""What differs between model families, and how teachers and students come into being.

One table, FAMILIES, says where a family keeps its parts; nothing about families stands anywhere else but in the layer
names of scripts/extract_for_distil.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DistilBertConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from utils import InputError, first_line, logger, why_not_loaded


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps its parts; dotted attribute names below the model with its head."""

    encoder: str
    transform: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]  # (n, dim) last hidden states -> (n, dim)
    projection: str  # of that onto the vocabulary
    layers: str  # the list of layers
    positions: str  # the table of position embeddings
    token_types: str | None = None
    causal: bool = False
    student: str = ""  # the family of its student, if not its own
    positions_before_first: int = 0  # rows of the table of positions that no token uses


def _distilbert_transform(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))


def _roberta_transform(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head.layer_norm(nn.functional.gelu(model.lm_head.dense(hidden)))


FAMILIES = {
    "distilbert": Family(
        "distilbert",
        _distilbert_transform,
        "vocab_projector",
        "distilbert.transformer.layer",
        "distilbert.embeddings.position_embeddings",
    ),
    "bert": Family(
        "bert",
        lambda model, hidden: model.cls.predictions.transform(hidden),
        "cls.predictions.decoder",
        "bert.encoder.layer",
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
        student="distilbert",
    ),
    "roberta": Family(
        "roberta",
        _roberta_transform,
        "lm_head.decoder",
        "roberta.encoder.layer",
        "roberta.embeddings.position_embeddings",
        "roberta.embeddings.token_type_embeddings",
        positions_before_first=2,
    ),
    "gpt2": Family(
        "transformer",
        lambda model, hidden: hidden,
        "lm_head",
        "transformer.h",
        "transformer.wpe",
        causal=True,
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise InputError(f"models of type {config.model_type!r} are not supported; these are: {', '.join(FAMILIES)}.")
    return FAMILIES[config.model_type]


class LanguageModel(nn.Module):
    """A model taken apart into encoder and vocabulary head, so that only the rows of interest reach the head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model.config)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(bs, seq_length) ids -> (bs * seq_length, dim) last hidden states.

        Args:
            attention_mask: (bs, seq_length) bool; padding stands at the right. None: nothing is padded.
        """
        if self.family.causal:
            attention_mask = None  # what stands at the right is never looked at
        elif attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # in any other form, the library asks the device about it
        encoder = self.model.get_submodule(self.family.encoder)
        output = encoder(input_ids=input_ids, attention_mask=attention_mask)
        return output.last_hidden_state.flatten(0, 1)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, dim) last hidden states -> (n, dim), what the projection onto the vocabulary takes."""
        return self.family.transform(self.model, hidden)

    def cast_products(self, dtype: torch.dtype) -> None:
        """Stores the weights of a frozen model in the dtype that autocast would cast them to in every pass, those of
        the projection left out, which may be the embeddings too. The results are the same, bit for bit."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not self.projection:
                module.to(dtype)

    @property
    def projection(self) -> nn.Linear:
        """(n, dim) -> (n, voc_size)."""
        return self.model.get_submodule(self.family.projection)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, dim) last hidden states -> (n, voc_size)."""
        return self.projection(self.transform(hidden))


# -------------------------------------------------------------------------------------------------------------- loading


def load_config(name: str) -> PretrainedConfig:
    """The config of a hub name, a folder, or a JSON file. Raises: InputError if there is none."""
    if str(name).endswith(".json") and not Path(name).is_file():
        raise InputError(f"{name} does not exist.")
    try:
        if Path(name).is_file():
            values = json.loads(Path(name).read_text())
            # "tie_weights_" is the original's name; files from before model types were written down are DistilBERT's.
            if "tie_weights_" in values:
                values["tie_word_embeddings"] = values.pop("tie_weights_")
            return AutoConfig.for_model(values.pop("model_type", "distilbert"), **values)
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{name}: no model configuration could be read ({why_not_loaded(name, error)}).") from None


def load_language_model(
    name: str, purpose: str, head_required: bool, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A model with its language-model head, float32, from a folder or the hub.

    Args:
        config: in place of its own, with another dropout for example.

    Raises: InputError if it can't be found, or has no head and `head_required`.
    """
    config = config or load_config(name)
    auto_class = AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM
    try:
        model, report = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{purpose} {name}: the weights could not be loaded ({first_line(error)}).") from None
    missing = sorted(report["missing_keys"])
    encoder = family_of(config).encoder
    if any(key.startswith(f"{encoder}.") for key in missing):
        raise InputError(f"{purpose} {name}: weights are missing, {_some(missing)}; the folder is not complete.")
    if missing and head_required:
        raise InputError(
            f"{purpose} {name}: it has no language-model head ({_some(missing)} missing), so its predictions would be "
            f"noise; train one first with train.py --student_type {config.model_type} "
            f"--student_pretrained_weights {name} --alpha_ce 0 --alpha_cos 0."
        )
    if missing:
        logger.info("%s %s: its head starts from random weights (%s)", purpose, name, _some(missing))
    return model


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """A .pth file of tensors. Raises: InputError if it is missing, cut short, or holds anything but tensors."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; scripts/extract_for_distil.py makes a student's initial weights.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage can raise nearly anything
        raise InputError(f"{path} is no file of weights, or cut short ({first_line(error)}).") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} does not hold a state dict, a table of named tensors.")
    return state


def build_student(config: PretrainedConfig, weights: str | None) -> PreTrainedModel:
    """A student of this shape, with random weights or those of a .pth file.

    Raises: InputError if the weights don't fit the shape.
    """
    auto_class = AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM
    student = auto_class.from_config(config, dtype=torch.float32)
    if weights is None:
        return student
    state = load_state_dict(weights)
    own = student.state_dict()
    unknown = sorted(set(state) - set(own))
    misfits = [key for key in own if key in state and state[key].shape != own[key].shape]
    if unknown or misfits:
        example = misfits[0] if misfits else unknown[0]
        shapes = f": {tuple(state[example].shape)} there, {tuple(own[example].shape)} here" if misfits else ""
        raise InputError(
            f"{weights} does not fit the student's shape ({_some(misfits or unknown)}{shapes}); "
            f"give its shape with --student_config."
        )
    tied = set(student.all_tied_weights_keys)
    missing = [key for key in own if key not in state and key not in tied]
    if len(missing) == len(own) - len(tied):
        raise InputError(f"{weights} holds none of the student's weights.")
    if missing:
        logger.warning("%s does not hold %s: these start from random weights", weights, _some(missing))
    student.load_state_dict(state, strict=False)
    student.tie_weights()
    if f"{family_of(config).positions}.weight" in state and getattr(config, "sinusoidal_pos_embds", False):
        student.config.sinusoidal_pos_embds = False  # the table is the teacher's now
    return student


def half_depth_config(teacher: PretrainedConfig, student_type: str | None = None) -> PretrainedConfig:
    """The teacher's shape at half the depth.

    Args:
        student_type: the teacher's own family, or DistilBERT for a BERT, without token types and pooler; None for the
            one that is usual.

    Raises: InputError if a teacher of this family has no student of that one.
    """
    depth = max(1, teacher.num_hidden_layers // 2)
    student_type = student_type or family_of(teacher).student or teacher.model_type
    if (teacher.model_type, student_type) == ("bert", "distilbert"):
        return DistilBertConfig(
            vocab_size=teacher.vocab_size,
            max_position_embeddings=teacher.max_position_embeddings,
            sinusoidal_pos_embds=True,
            n_layers=depth,
            n_heads=teacher.num_attention_heads,
            dim=teacher.hidden_size,
            hidden_dim=teacher.intermediate_size,
            dropout=teacher.hidden_dropout_prob,
            attention_dropout=teacher.attention_probs_dropout_prob,
            activation=teacher.hidden_act,
            initializer_range=teacher.initializer_range,
            pad_token_id=teacher.pad_token_id,
        )
    if student_type != teacher.model_type:
        raise InputError(
            f"--student_type {student_type}: its shape does not follow from a {teacher.model_type} teacher's; "
            f"give it with --student_config."
        )
    left_out = ("architectures", "_name_or_path", "transformers_version", "dtype", "model_type")
    values = {key: value for key, value in teacher.to_dict().items() if key not in left_out}
    config = AutoConfig.for_model(student_type, **values)
    config.num_hidden_layers = depth
    return config


def max_length(config: PretrainedConfig) -> int:
    """The longest sequence that the model has positions for, in tokens."""
    return config.max_position_embeddings - family_of(config).positions_before_first


def freeze(model: PreTrainedModel, table: str | None) -> bool:
    """Keeps an embedding table of the model as it is. Returns whether the model has it."""
    if table is None:
        return False
    model.get_submodule(table).weight.requires_grad_(False)
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
