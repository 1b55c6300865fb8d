"""Configurations and weights, from folders, files and the hub. Whatever can't be loaded is named in one sentence."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from models.families import family_of
from utils import InputError, first_line, logger, quiet_transformers, why_not_loaded


def load_config(name: str) -> PretrainedConfig:
    """The config of a hub name, a folder, or a JSON file. Raises: InputError if there is none."""
    quiet_transformers()
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


def auto_class(config: PretrainedConfig) -> type:
    """The class of `transformers` that makes models of this family with their language-model head."""
    return AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM


def load_language_model(
    name: str, purpose: str, head_required: bool, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A model with its language-model head, float32, from a folder or the hub.

    Args:
        config: in place of its own, with another dropout for example.

    Raises: InputError if it can't be found, or has no head and `head_required`.
    """
    config = config or load_config(name)
    try:
        model, report = auto_class(config).from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{purpose} {name}: the weights could not be loaded ({first_line(error)}).") from None
    missing = sorted(report["missing_keys"])
    encoder = family_of(config).encoder
    if any(key.startswith(f"{encoder}.") for key in missing):
        raise InputError(f"{purpose} {name}: weights are missing, {some(missing)}; the folder is not complete.")
    if missing and head_required:
        raise InputError(
            f"{purpose} {name}: it has no language-model head ({some(missing)} missing), so its predictions would be "
            f"noise; train one first with train.py --student_type {config.model_type} "
            f"--student_pretrained_weights {name} --alpha_ce 0 --alpha_cos 0."
        )
    if missing:
        logger.info("%s %s: its head starts from random weights (%s)", purpose, name, some(missing))
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


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
