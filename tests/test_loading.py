"""Configurations of all kinds, and what is refused."""

import json

import pytest

from models.families import family_of
from models.loading import load_config
from utils import InputError


def test_configurations_of_the_original_load(tmp_path):
    old = {
        "dim": 64,
        "n_heads": 4,
        "n_layers": 2,
        "hidden_dim": 128,
        "sinusoidal_pos_embds": True,
        "tie_weights_": False,
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    config = load_config(tmp_path / "old.json")
    assert (config.model_type, config.dim, config.tie_word_embeddings) == ("distilbert", 64, False)


def test_other_families_are_named(tmp_path):
    (tmp_path / "t5.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(InputError, match="'t5' are not supported; these are: distilbert, bert, roberta, xlm-roberta"):
        family_of(load_config(tmp_path / "t5.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json"):
        load_config(tmp_path / "broken.json")
