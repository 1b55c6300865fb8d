"""A model taken apart is the same model."""

import json

import pytest
import torch
from small_models import SMALL
from transformers import BertConfig

from models.families import ROBERTA, family_of, max_length
from models.language_model import LanguageModel, freeze
from models.loading import auto_class, tokenizer_for


@pytest.mark.parametrize("name", SMALL)
def test_encoder_and_head_together_are_the_model(name):
    config = SMALL[name]
    model = auto_class(config).from_config(config).eval()
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
    rotary = ("modernbert", "eurobert")
    assert freeze(model, family_of(config).positions) == (name not in rotary)
    assert freeze(model, family_of(config).token_types) == (name not in ("distilbert", "gpt2", *rotary))
    longest = {"gpt2": 1024, "modernbert": 8192, "eurobert": 8192}
    assert max_length(config) == longest.get(name, 510 if family_of(config) is ROBERTA else 512)


def test_one_mask_for_all_layers_would_be_found(monkeypatch):
    """ModernBERT takes such a mask as it is, so that its sliding windows vanish as soon as a batch is padded."""
    monkeypatch.setattr(LanguageModel, "_masks", lambda self, attended: attended[:, None, None, :])
    with pytest.raises(AssertionError, match="not close"):
        test_encoder_and_head_together_are_the_model("modernbert")
    test_encoder_and_head_together_are_the_model("bert")


@pytest.mark.parametrize("name", SMALL)
def test_vectors_are_what_the_layer_attends_with(name):
    model = auto_class(SMALL[name]).from_config(SMALL[name]).eval()
    parts = LanguageModel(model)
    assert parts.watch(parts.depth - 1) == (32, 32, 32)
    seen = {}
    layer = model.get_submodule(f"{parts.family.layers}.3")
    for name in parts.family.queries_keys_values:
        layer.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.update({module: args[0]}))
    with torch.no_grad():
        for _ in range(2):  # the vectors are those of the last call
            parts.hidden(torch.randint(5, 99, (3, 12)), None)
        vectors = parts.vectors
        expected = torch.cat([module(x) for module, x in seen.items()], -1).chunk(3, -1)
    for ours, theirs in zip(vectors, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.shape == (3, 12, 32)


@pytest.mark.parametrize("name", SMALL)
def test_a_teacher_in_half_precision_says_what_autocast_says(name):
    config = SMALL[name]
    torch.manual_seed(0)
    parts = LanguageModel(auto_class(config).from_config(config).eval())
    input_ids = torch.randint(5, 99, (3, 12))
    found = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(parts.transform(parts.hidden(input_ids, None)))
        parts.cast_products(torch.bfloat16)
    assert torch.equal(*found)
    assert parts.projection.weight.dtype == torch.float32
    assert sum(p.dtype == torch.bfloat16 for p in parts.parameters()) > 4 * 4


@pytest.mark.parametrize("longest, expected", [(20, 20), (512, 64)])
def test_a_saved_tokenizer_cuts_texts_to_what_the_model_can_take(tokenizer, tmp_path, longest, expected):
    tokenizer_for(BertConfig(max_position_embeddings=longest), tokenizer).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == expected and not {"is_local", "local_files_only"} & set(saved)
    assert tokenizer.model_max_length == 64
