import json

import pytest
import torch
from conftest import ROOT
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    RobertaConfig,
)

from models.families import LanguageModel, family_of, freeze, max_length
from models.loading import load_config
from models.student import build_student, half_depth_config
from utils import InputError

SMALL = {
    "bert": BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64),
    "distilbert": DistilBertConfig(vocab_size=99, dim=32, n_layers=4, n_heads=4, hidden_dim=64),
    "roberta": RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    ),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4),
}


def test_half_of_bert_base_is_the_shipped_configuration():
    shipped = load_config(ROOT / "training_configs" / "distilbert-base-uncased.json")
    assert half_depth_config(BertConfig()).to_dict() == shipped.to_dict()
    student = build_student(shipped, None)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6) == 67
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", SMALL)
def test_encoder_and_head_together_are_the_model(name):
    config = SMALL[name]
    auto_class = AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM
    model = auto_class.from_config(config).eval()
    input_ids = torch.randint(5, 99, (3, 12))
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    attention_mask[1, 7:] = False
    parts = LanguageModel(model)
    with torch.no_grad():
        hidden = parts.hidden(input_ids, attention_mask)
        whole = model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    rows = attention_mask.flatten()
    torch.testing.assert_close(parts.logits(hidden)[rows], whole.logits.flatten(0, 1)[rows])
    torch.testing.assert_close(hidden[rows], whole.hidden_states[-1].flatten(0, 1)[rows])
    assert len(model.get_submodule(family_of(config).layers)) == 4
    assert freeze(model, family_of(config).positions)
    assert freeze(model, family_of(config).token_types) == (name in ("bert", "roberta"))
    assert max_length(config) == {"gpt2": 1024, "roberta": 510}.get(name, 512)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_a_student_of_half_its_depth(name):
    student = half_depth_config(SMALL[name])
    assert student.num_hidden_layers == 2
    assert student.model_type == {"bert": "distilbert"}.get(name, name)
    assert student.vocab_size == 99
    assert half_depth_config(SMALL[name], name).model_type == name


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
    with pytest.raises(InputError, match="'t5' are not supported; these are: distilbert, bert, roberta, gpt2"):
        family_of(load_config(tmp_path / "t5.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json"):
        load_config(tmp_path / "broken.json")


@pytest.mark.parametrize("name", SMALL)
def test_a_teacher_in_half_precision_says_what_autocast_says(name):
    config = SMALL[name]
    auto_class = AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM
    torch.manual_seed(0)
    parts = LanguageModel(auto_class.from_config(config).eval())
    input_ids = torch.randint(5, 99, (3, 12))
    found = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(parts.transform(parts.hidden(input_ids, None)))
        parts.cast_products(torch.bfloat16)
    assert torch.equal(*found)
    assert parts.projection.weight.dtype == torch.float32
    assert sum(p.dtype == torch.bfloat16 for p in parts.parameters()) > 4 * 4
