"""What is exported answers as PyTorch does, at any batch size and length, in both precisions."""

import json
import sys

import export_onnx
import numpy as np
import pytest
import torch
from export_onnx import FLOAT16, FLOAT32, INT8, OnnxModel, deviation, encode_batch
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer
from workspace import load_tokenizer, run

from models.loading import save_model
from utils import InputError

TEXTS = [
    ("the cat sees the garden",),
    ("a dog",),
    ("my neighbour carries the long road as in the old days before it rains",),
]


def test_a_distilled_model_answers_as_in_pytorch(student, capsys):
    run(export_onnx, "--model", student)
    out = capsys.readouterr().out
    assert "onnx/model.onnx" in out
    assert "onnx/model_quantized.onnx" in out
    tokenizer, model = load_tokenizer(student), export_onnx.load_with_its_head(str(student), None)
    for texts in (TEXTS, TEXTS[:1], TEXTS[:2] * 4):
        batch = encode_batch(tokenizer, model, texts)
        with torch.no_grad():
            expected = model(**batch).logits.numpy()
        attended = batch["attention_mask"].bool().numpy()
        plain, quantized = (OnnxModel(student / "onnx" / name)(batch) for name in (FLOAT32, INT8))
        np.testing.assert_allclose(plain[attended], expected[attended], atol=1e-4)
        assert 0 < deviation(quantized[attended], expected[attended]) < 0.2
    sizes = [(student / "onnx" / name).stat().st_size for name in (FLOAT32, INT8)]
    assert sizes[1] < sizes[0]
    assert {file.name for file in (student / "onnx").iterdir()} == {FLOAT32, INT8}


def test_the_head_of_a_task_is_exported_with_it(tmp_path, workspace, student):
    for name, auto_class in (
        (workspace / "bert-base-uncased", AutoModelForSequenceClassification),  # with token types
        (student, AutoModelForQuestionAnswering),  # without
    ):
        folder = tmp_path / name.name
        auto_class.from_pretrained(name).save_pretrained(folder)
        AutoTokenizer.from_pretrained(name).save_pretrained(folder)
        run(export_onnx, "--model", folder, "--output_dir", folder / "files", "--fp16")
        model = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
        batch = encode_batch(load_tokenizer(folder), model, TEXTS)
        with torch.no_grad():
            expected = model(**batch)
        expected = expected.logits if "logits" in expected else expected.start_logits
        attended = batch["attention_mask"].bool() if expected.shape[1] > 2 else torch.ones_like(expected, dtype=bool)
        output = OnnxModel(folder / "files" / FLOAT32)(batch)
        np.testing.assert_allclose(output[attended.numpy()], expected[attended].numpy(), atol=1e-4)
        half = OnnxModel(folder / "files" / FLOAT16)(batch)
        assert half.dtype == np.float32 and deviation(half[attended.numpy()], expected[attended].numpy()) < 0.01


def test_an_encoder_gives_hidden_states(tmp_path, student):
    run(export_onnx, "--model", student, "--encoder", "--output_dir", tmp_path)
    model = AutoModel.from_pretrained(student, dtype=torch.float32).eval()
    batch = encode_batch(load_tokenizer(student), model, TEXTS)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    exported = OnnxModel(tmp_path / FLOAT32)
    assert [output.name for output in exported.session.get_outputs()] == ["last_hidden_state"]
    attended = batch["attention_mask"].bool()
    np.testing.assert_allclose(exported(batch)[attended.numpy()], expected[attended].numpy(), atol=1e-4)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_sentence_encoder_gives_a_vector_for_each_text(tmp_path, student, mode):
    folder = tmp_path / "encoder"
    model = AutoModel.from_pretrained(student, dtype=torch.float32).eval()
    save_model(model, load_tokenizer(student), folder)
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * (mode == "mean")
    modules = [{"path": f"{i}_{kind}", "type": f"x.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    run(export_onnx, "--model", folder, "--encoder")
    exported = OnnxModel(folder / "onnx" / FLOAT32)
    assert [output.name for output in exported.session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    batch = encode_batch(load_tokenizer(folder), model, TEXTS)
    _, found = exported.session.run(None, {name: batch[name].numpy() for name in exported.names})
    for (text,), vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            (states,) = model(**load_tokenizer(folder)(text, return_tensors="pt")).last_hidden_state
        expected = states[0] if mode == "cls" else states.mean(0) / states.mean(0).norm()
        np.testing.assert_allclose(vector, expected, atol=1e-4)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / FLOAT32).write_bytes(b"\x08\x07garbage")
    with pytest.raises(InputError, match=f"{FLOAT32} is not an ONNX model, or is damaged .*make it again"):
        OnnxModel(tmp_path / FLOAT32)


def test_missing_packages_are_asked_for_in_a_sentence(student, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run(export_onnx, "--model", student, expect=2)
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_a_hub_name_needs_a_folder_to_write_to(capsys):
    run(export_onnx, "--model", "some/model", expect=2)
    assert "name one for the files with --output_dir" in capsys.readouterr().err
