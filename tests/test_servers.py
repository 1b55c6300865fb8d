"""What servers look for in a folder is in it. They do not run here: the names are from their sources of late 2026.

Text Embeddings Inference: router/src/lib.rs, backends/candle/src/models/distilbert.rs, backends/ort/src/lib.rs.
llama.cpp: conversion/bert.py, conversion/base.py. vLLM: vllm/model_executor/models/registry.py.
"""

import json

import export_onnx
import pytest
import to_bert
from export_onnx import OnnxModel
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification
from workspace import load_tokenizer, run

from files.atomic import write_json
from models.loading import save_model
from models.sentence_encoder import sentence_transformers_files

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"},
]


@pytest.fixture(scope="module")
def encoder(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers") / "encoder"
    save_model(AutoModel.from_pretrained(student), load_tokenizer(student), folder)
    (folder / "1_Pooling").mkdir()
    write_json(folder / "modules.json", MODULES)
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": "mean"})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512})
    for name, contents in sentence_transformers_files(str(folder), 32, 64).items():  # as train.py writes them
        write_json(folder / name, contents)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_text_embeddings_inference(encoder):
    config = config_of(encoder)
    numbers = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings", "pad_token_id")
    assert all(type(config[key]) is int for key in numbers)  # without ONNX
    assert config["model_type"] == "distilbert" and config["architectures"] and config["activation"] == "gelu"
    with safe_open(encoder / "model.safetensors", "pt") as weights:
        assert {"embeddings.LayerNorm.weight", "transformer.layer.0.attention.q_lin.weight"} <= set(weights.keys())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (config["dim"], config["n_layers"])  # with ONNX
    pooling = json.loads((encoder / "1_Pooling" / "config.json").read_text())
    assert (pooling["pooling_mode_cls_token"], pooling["pooling_mode_mean_tokens"]) == (False, True)
    longest = json.loads((encoder / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert longest == config["max_position_embeddings"]
    assert (encoder / "tokenizer.json").exists()
    run(export_onnx, "--model", encoder, "--encoder")
    exported = OnnxModel(encoder / "onnx" / "model.onnx")
    assert exported.names == ["input_ids", "attention_mask"]
    assert "sentence_embedding" in [output.name for output in exported.session.get_outputs()]


def test_text_embeddings_inference_as_a_classifier(student, tmp_path):
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    save_model(AutoModelForSequenceClassification.from_pretrained(student, **labels), load_tokenizer(student), tmp_path)
    config = config_of(tmp_path)
    assert (config["id2label"], config["label2id"]) == ({"0": "cat", "1": "dog"}, {"cat": 0, "dog": 1})
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert {"distilbert.embeddings.LayerNorm.weight", "pre_classifier.weight", "classifier.bias"} <= set(
            weights.keys()
        )


def test_llama_cpp(encoder):
    config = config_of(encoder)
    assert config["architectures"] == ["DistilBertModel"]
    assert {"max_position_embeddings", "dim", "hidden_dim", "n_heads", "n_layers"} <= set(config)
    pooling = [module["path"] for module in json.loads((encoder / "modules.json").read_text())
               if module["type"] == "sentence_transformers.models.Pooling"]  # fmt: skip
    assert pooling == ["1_Pooling"]


def test_vllm(encoder, tmp_path):
    run(to_bert, "--model", encoder, "--output_dir", tmp_path / "bert")
    assert config_of(tmp_path / "bert")["architectures"] == ["BertModel"]
    assert (tmp_path / "bert" / "1_Pooling" / "config.json").exists()
    fine_tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    save_model(fine_tuned, load_tokenizer(encoder), tmp_path / "classifier")
    assert config_of(tmp_path / "classifier")["architectures"] == ["BertForSequenceClassification"]
