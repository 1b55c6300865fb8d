"""Configurations of all kinds, and what is refused."""

import json

import pytest
from safetensors.torch import load_file, save_file
from small_models import SMALL
from transformers import AutoModelForMaskedLM

from models.families import family_of
from models.loading import load_config, load_language_model, save_weights
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


def test_layer_norms_are_saved_under_their_names_of_today(tmp_path):
    model = AutoModelForMaskedLM.from_config(SMALL["bert"])
    save_weights(model, tmp_path / "new")
    today = load_file(tmp_path / "new" / "model.safetensors")
    (tmp_path / "old").mkdir()
    model.config.save_pretrained(tmp_path / "old")
    before = lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
    old = {before(name): tensor for name, tensor in today.items()}  # as bert-base-uncased is on the hub
    assert old.keys() != today.keys()
    save_file(old, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    save_weights(load_language_model(str(tmp_path / "old"), "teacher", head_required=True), tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == today.keys()
