"""Configurations and weights, from folders, files and the hub. Whatever can't be loaded is named in one sentence.

No code that comes with a model is ever run: pickles are read for tensors only, and remote code is refused.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from files.json_reader import read_json
from models.families import FAMILIES, family_of, max_length
from models.memory import check_memory
from utils import InputError, quiet_transformers, reason_of, why_not_loaded

LIMITS = {  # of the numbers of a configuration, and of the flags for them
    "vocab_size": (1, 1 << 24),
    "max_position_embeddings": (1, 1 << 20),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1 << 12),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),  # in most families
    "hidden_dim": (1, 1 << 20),  # in DistilBERT
    "initializer_range": (0, 1000),
}


def load_config(name: str) -> PretrainedConfig:
    """The config of a hub name, a folder, or a JSON file.

    Raises: InputError if there is none, or no model of a known family can be built from it.
    """
    config = read_config(name)
    count_parameters(config, name)
    return config


def read_config(name: str) -> PretrainedConfig:
    """Like `load_config`, but for a model of any family."""
    quiet_transformers()
    if str(name).endswith(".json") and not Path(name).is_file():
        raise InputError(f"{name} does not exist.")
    try:
        if Path(name).is_file():
            values = read_json(name, dict)
            # "tie_weights_" is the original's name; files from before model types were written down are DistilBERT's.
            if "tie_weights_" in values:
                values["tie_word_embeddings"] = values.pop("tie_weights_")
            config = AutoConfig.for_model(values.pop("model_type", "distilbert"), **values)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # odd values can raise almost anything
        raise InputError(f"{name}: no model configuration could be read ({why_not_loaded(name, error)}).") from None
    # How outputs come is for the caller to say.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    return config


def auto_class(config: PretrainedConfig) -> type:
    """The class of `transformers` that makes models of this family with their language-model head."""
    return AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM


def count_parameters(config: PretrainedConfig, name: str) -> int:
    """How many parameters a model of this configuration has; takes neither their memory nor their time.

    Args:
        name: of the configuration, for a message.

    Raises: InputError if no model can be built from it.
    """
    for key, (low, high) in LIMITS.items():
        value = getattr(config, key, None)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            raise InputError(f"{name}: {key} is {value}, but must be from {low:,} to {high:,}.")
    make, key = auto_class(config), config.to_json_string(use_diff=False)
    if key not in _N_PARAMETERS:
        try:
            with torch.device("meta"):
                model = make.from_config(copy.deepcopy(config), dtype=torch.float32)  # which writes into it
        except Exception as error:  # the library checks as it builds, and each place in its own way
            raise InputError(f"{name}: no model can be built from this configuration ({reason_of(error)}).") from None
        _N_PARAMETERS[key] = sum(parameter.numel() for parameter in model.parameters())
    return _N_PARAMETERS[key]


_N_PARAMETERS: dict[str, int] = {}  # of configurations counted before, since a run asks several times


def load_language_model(
    name: str, purpose: str, head_required: bool, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A model with its language-model head, float32, from a folder or the hub.

    Args:
        config: in place of its own, with another dropout for example.

    Raises: InputError if it can't be found or is damaged, has no head and `head_required`, or is too large to load.
    """
    model, missing = load_with_or_without_head(name, purpose, config)
    if missing and head_required:
        raise InputError(
            f"{purpose} {name}: it has no language-model head ({some(missing)} missing), so its predictions would be "
            f"noise; train one first with train.py --student_type {model.config.model_type} "
            f"--student_pretrained_weights {name} --alpha_ce 0 --alpha_cos 0, or distil the encoder alone "
            f"(train.py --alpha_ce 0 --alpha_mlm 0)."
        )
    return model


def load_with_or_without_head(
    name: str, purpose: str, config: PretrainedConfig | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """As `load_language_model`, and the names of the weights of its head that it lacks, which are random then."""
    config = config or load_config(name)
    check_memory(f"{purpose} {name}", torch.device("cpu"), loaded=count_parameters(config, name))
    model, missing = load_weights(auto_class(config), name, purpose, config=config)
    encoder = family_of(config).encoder
    if any(key.startswith(f"{encoder}.") for key in missing):
        raise InputError(f"{purpose} {name}: weights are missing, {some(missing)}; the folder is not complete.")
    return model, missing


def load_weights(model_class: type, name: str, purpose: str, **options) -> tuple[PreTrainedModel, list[str]]:
    """A model in float32, and the sorted names of the weights that it has not got from the folder or the hub.

    Raises: InputError if it can't be found or is damaged.
    """
    options |= {"dtype": torch.float32, "trust_remote_code": False, "weights_only": True}
    try:
        model, report = model_class.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # a damaged file can raise almost anything
        problem = _damage(name) or f"the weights could not be loaded ({reason_of(error)})"
        raise InputError(f"{purpose} {name}: {problem}.") from None
    return model, sorted(report["missing_keys"])


def _damage(folder: str) -> str | None:
    """Which file of weights in a folder can't be read, and why; None if each can."""
    for file in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]):
        try:
            if file.suffix == ".bin":
                torch.load(file, map_location="meta", weights_only=True)
            else:
                with safe_open(file, "pt"):
                    pass
        except Exception as error:  # as above
            return f"{file.name} is not a file of weights, or is cut short ({reason_of(error)}); copy it again"
    return None


def save_model(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Writes both into a folder for `from_pretrained`."""
    save_weights(model, folder)
    tokenizer_for(model.config, tokenizer).save_pretrained(folder)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model without its tokenizer. Its configuration also has those names of its width and depth that servers
    look for, where it has others of its own, as DistilBERT does."""
    # Not under the names it was loaded from: bert-base-uncased's layer norms are still called gamma and beta there.
    model.save_pretrained(folder, save_original_format=False)
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    aliases = {name: getattr(model.config, name) for name in ("hidden_size", "num_hidden_layers")}
    file.write_text(json.dumps(aliases | config, indent=2, sort_keys=True) + "\n")


def tokenizer_for(config: PretrainedConfig, tokenizer):
    """A copy to save beside a model: it cuts texts to what the model can take, and does not say where it was loaded."""
    saved = copy.deepcopy(tokenizer)
    if config.model_type in FAMILIES:
        saved.model_max_length = min(saved.model_max_length, max_length(config))
    for trace in ("is_local", "local_files_only"):
        saved.init_kwargs.pop(trace, None)
    return saved


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """A .pth file of tensors. Raises: InputError if it is missing, cut short, or holds anything but tensors."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; scripts/extract_for_distil.py makes a student's initial weights.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage can raise nearly anything
        raise InputError(f"{path} is not a file of weights, or is cut short ({reason_of(error)}).") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} does not hold a state dict, a table of named tensors.")
    return state


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
