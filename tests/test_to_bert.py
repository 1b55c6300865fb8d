"""A DistilBERT as a BERT gives the same outputs, to rounding, under every head that both have."""

import pytest
import to_bert
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from workspace import load_tokenizer, run

PAIRS = [["the cat sees the garden", "a dog"], ["every child remembers", "the north wind paints a letter"]]


def outputs_of(model, tokenizer):
    batch = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt")
    if model.config.model_type == "distilbert":
        batch.pop("token_type_ids", None)
    with torch.no_grad():
        outputs = model.eval()(**batch)
    return outputs[0][batch.attention_mask.bool()]


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForMaskedLM, AutoModelForQuestionAnswering, AutoModelForTokenClassification]
)
def test_outputs_stay_the_same(tmp_path, student, auto_class):
    tokenizer = load_tokenizer(student)
    torch.manual_seed(0)
    model = auto_class.from_pretrained(student, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms too, which all start alike
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "distilbert")
    tokenizer.save_pretrained(tmp_path / "distilbert")
    run(to_bert, "--model", tmp_path / "distilbert", "--output_dir", tmp_path / "bert")
    bert = auto_class.from_pretrained(tmp_path / "bert", dtype=torch.float32)
    assert bert.config.model_type == "bert" and bert.config.num_hidden_layers == model.config.n_layers
    expected, found = (outputs_of(each, load_tokenizer(tmp_path / "bert")) for each in (model, bert))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_has_no_equal_is_told(tmp_path, workspace, student, capsys):
    classifier = AutoModelForSequenceClassification.from_pretrained(student)
    classifier.save_pretrained(tmp_path / "classifier")
    load_tokenizer(student).save_pretrained(tmp_path / "classifier")
    for name, message in (
        (tmp_path / "classifier", "BERT's head for that is another one"),
        (workspace / "bert-base-uncased", "is a bert, not a distilbert"),
    ):
        run(to_bert, "--model", name, "--output_dir", tmp_path / "bert", expect=2)
        assert message in capsys.readouterr().err and not (tmp_path / "bert").exists()
