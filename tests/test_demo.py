"""The page of a model is a folder that holds all it needs. (What it shows was looked at in a browser.)"""

import json
import re

import demo
import pytest
from export_onnx import FLOAT32, INT8
from transformers import AutoModel, AutoModelForSequenceClassification
from workspace import load_tokenizer, run


@pytest.fixture
def exported(monkeypatch):
    """Empty files in place of those that take seconds to make; test_export_onnx.py has the real ones."""

    def export(model, tokenizer, folder):
        folder.mkdir()
        for name in (FLOAT32, INT8):
            (folder / name).write_bytes(b"0" * 1000)

    monkeypatch.setattr(demo, "export", export)


def page_of(folder):
    return json.loads(re.search(r"^const page = (.*);$", (folder / "index.html").read_text(), re.MULTILINE)[1])


def test_two_models_stand_side_by_side(tmp_path, workspace, student, exported):
    run(demo, "--models", workspace / "bert-base-uncased", student, "--output_dir", tmp_path / "page", "--cdn")
    page = page_of(tmp_path / "page")
    assert [(model["name"], model["task"]) for model in page["models"]] == [
        ("bert-base-uncased", "fill-mask"), ("student", "fill-mask")
    ]  # fmt: skip
    assert page["library"].startswith("https://")
    for name in ("bert-base-uncased", "student"):
        folder = tmp_path / "page" / "models" / name
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert {"config.json", "tokenizer.json", "tokenizer_config.json", f"onnx/{INT8}"} <= files
        assert not {"model.safetensors", f"onnx/{FLOAT32}"} & files


@pytest.mark.parametrize(
    "auto_class, task",
    [(AutoModel, "feature-extraction"), (AutoModelForSequenceClassification, "text-classification")],
)
def test_the_head_says_what_the_page_does(tmp_path, student, exported, auto_class, task):
    auto_class.from_pretrained(student).save_pretrained(tmp_path / "a</script>")
    load_tokenizer(student).save_pretrained(tmp_path / "a</script>")
    run(demo, "--models", tmp_path / "a</script>", "--output_dir", tmp_path / "page", "--cdn")
    (model,) = page_of(tmp_path / "page")["models"]
    assert (model["name"], model["task"]) == ("script>", task)  # the last part of the name


def test_without_npm_the_way_out_is_named(tmp_path, student, exported, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    run(demo, "--models", student, "--output_dir", tmp_path / "page", expect=2)
    assert "install Node.js, or use --cdn" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_models_with_different_heads_are_told(tmp_path, workspace, student, exported, capsys):
    AutoModel.from_pretrained(student).save_pretrained(tmp_path / "encoder")
    load_tokenizer(student).save_pretrained(tmp_path / "encoder")
    run(demo, "--models", student, tmp_path / "encoder", "--output_dir", tmp_path / "page", "--cdn", expect=2)
    assert "have different heads" in capsys.readouterr().err
