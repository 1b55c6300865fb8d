"""A model with fewer entries in its vocabulary: only some rows of the embeddings and of the projection onto it."""

import copy

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from models.families import family_of
from models.loading import auto_class
from utils import InputError


def trim_config(config: PretrainedConfig, ids: np.ndarray) -> PretrainedConfig:
    """The shape of the model with only these entries, whose special tokens have their new ids.

    Args:
        ids: (new size,) the old id of each new one, increasing.

    Raises: InputError if positions are counted from the padding token's id, and that would change.
    """
    config = copy.deepcopy(config)
    config.vocab_size = len(ids)
    for name, old in list(config.to_dict().items()):
        if name.endswith("_token_id") and isinstance(old, int):
            new = int(np.searchsorted(ids, old))
            setattr(config, name, new if new < len(ids) and ids[new] == old else None)
            if name == "pad_token_id" and new != old and family_of(config).positions_before_first:
                raise InputError(f"a {config.model_type} counts positions from the id of its padding token, {old}.")
    return config


def trim_model(model: PreTrainedModel, ids: np.ndarray) -> PreTrainedModel:
    """The model with only these entries: for the kept ones its logits are the same, row by row.

    Args:
        ids: (new size,) the old id of each new one, increasing.
    """
    config = trim_config(model.config, ids)
    rows = torch.from_numpy(ids)
    trimmed = auto_class(config).from_config(config, dtype=torch.float32)
    shapes = {name: tensor.shape for name, tensor in trimmed.state_dict().items()}
    state = {
        name: tensor if tensor.shape == shapes[name] else tensor[rows] for name, tensor in model.state_dict().items()
    }
    trimmed.load_state_dict(state)
    trimmed.tie_weights()
    return trimmed.train(model.training)
