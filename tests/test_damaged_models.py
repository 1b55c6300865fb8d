"""Models whose files are damaged, foreign or made by hand: one sentence that names the file, wherever they load."""

import json
import os
import pickle
import shutil

import binarized_data
import compare_models
import corpus_doctor
import extract_for_distil
import pytest
import torch
from workspace import run, train, weights_of

import train as train_script


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


DAMAGES = {  # what becomes of a file of weights
    "cut short": lambda content: content[: len(content) // 2],
    "cut in its header": lambda content: content[:50],
    "empty": lambda content: b"",
    "garbage": lambda content: os.urandom(len(content)),
    "text": lambda content: b"<html>404: not found</html>\n" * 100,
    "a pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "hostile": lambda content: pickle.dumps({"bert.embeddings.LayerNorm.bias": Hostile()}),
}


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def model(request, workspace, tmp_path, monkeypatch):
    """A teacher with weights in a file of this name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "teacher"
    shutil.copytree(workspace / "bert-base-uncased", folder)
    if request.param.endswith(".bin"):
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / request.param)
        (folder / "model.safetensors").unlink()
    return folder / request.param


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_wherever_they_are_loaded(model, workspace, tmp_path, capsys, damage):
    model.write_bytes(DAMAGES[damage](model.read_bytes()))
    data, out, teacher = workspace / "text.bert-base-uncased.pickle", tmp_path / "out", model.parent
    capsys.readouterr()
    train(workspace, out, "--teacher_name", teacher, expect=2)
    train(workspace, out, "--student_pretrained_weights", teacher, expect=2)
    run(extract_for_distil, "--model_name", teacher, "--dump_checkpoint", out, expect=2)
    intact = workspace / "bert-base-uncased"
    run(compare_models, "--teacher", intact, "--models", teacher, "--data_file", data, expect=2)
    run(corpus_doctor, "--data_file", data, "--teacher_name", teacher, expect=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 5
    for error in errors:
        assert f"{teacher}: {model.name} is not a file of weights, or is cut short (" in error
        assert error.endswith("copy it again.")
    assert not out.exists()
    assert not (tmp_path / "pwned").exists()


def test_a_whole_model_in_an_old_file_still_loads(model, workspace, tmp_path):
    train(workspace, tmp_path / "out", "--teacher_name", model.parent, "--gradient_accumulation_steps", 60)


BASE = {"model_type": "distilbert", "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64}
BY_HAND = {
    "null": {"dim": None},
    "a string": {"n_layers": "2"},
    "words": {"dropout": "a lot"},
    "zero layers": {"n_layers": 0},
    "zero width": {"dim": 0},
    "negative": {"max_position_embeddings": -1},
    "fraction": {"n_heads": 2.5},
    "list": {"hidden_dim": [64]},
    "unknown activation": {"activation": "swoosh"},
    "null activation": {"activation": None},
    "too much dropout": {"dropout": 2},
    "heads that do not divide": {"n_heads": 5},
    "no vocabulary": {"vocab_size": 0},
    "too large": {"dim": 1 << 16, "hidden_dim": 1 << 20, "n_layers": 1000},
    "beyond all limits": {"n_layers": 10**9},
    "infinite": {"initializer_range": float("inf")},
    "unknown family": {"model_type": "no-such-model"},
    "family without a name": {"model_type": None},
    "remote code": {"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}},
    "padding outside": {"pad_token_id": 10**6},
    "unknown attention": {"_attn_implementation": "none-such"},
    "unknown dtype": {"dtype": "float3"},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_configuration_made_by_hand_is_one_sentence(workspace, tmp_path, capsys, name):
    vocab_size = json.loads((workspace / "bert-base-uncased" / "config.json").read_text())["vocab_size"]
    (tmp_path / "student.json").write_text(json.dumps({**BASE, "vocab_size": vocab_size, **BY_HAND[name]}))
    train(workspace, tmp_path / "run", "--student_config", tmp_path / "student.json", "--alpha_cos", 0, expect=2)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert len(error.splitlines()[-1]) < 400
    assert "student" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "null", "[]", "3", '"bert"', "{", '{"a": 1', "\xff\xfe", "{}" * 3])
def test_a_configuration_that_is_none_is_one_sentence(workspace, tmp_path, capsys, content):
    (tmp_path / "student.json").write_text(content, encoding="latin-1")
    train(workspace, tmp_path / "run", "--student_config", tmp_path / "student.json", expect=2)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "student.json: no model configuration could be read" in error


def test_remote_code_is_refused(workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "teacher"
    shutil.copytree(workspace / "bert-base-uncased", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import os; os.system('touch pwned')")
    train(workspace, tmp_path / "run", "--teacher_name", folder, expect=2)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert str(folder) in error
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------------------ positions


def test_positions_that_are_no_multiple_of_8_serve_on_the_whole_road(workspace, tokenizer, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    teacher = tmp_path / "teacher"
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=61, **shape)).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    data = workspace / "text.bert-base-uncased.pickle"
    run(extract_for_distil, "--model_name", teacher, "--dump_checkpoint", tmp_path / "init.pth", "--vocab_transform")
    flags = ["--teacher_name", teacher, "--from_pretrained_weights", tmp_path / "init.pth", "--dropout", 0,
             "--attention_dropout", 0, "--gradient_accumulation_steps", 10]  # fmt: skip
    for name, more in (
        ("micro-batches", []),
        ("batches", ["--tokens_per_micro_batch", 0]),
        ("by tokens", ["--tokens_per_batch", 512, "--batch_size", 8]),
    ):
        train(workspace, tmp_path / name, *flags, *more)
    train(workspace, tmp_path / "estimate", *flags, "--dry_run", 1)
    run(compare_models, "--teacher", teacher, "--models", tmp_path / "batches", "--data_file", data, "--turns", 1)
    run(corpus_doctor, "--data_file", data, "--teacher_name", teacher, expect=1)  # it has learned nothing
    config = json.loads((tmp_path / "batches" / "config.json").read_text())
    assert config["max_position_embeddings"] == 61


def test_the_students_positions_may_be_fewer_than_the_teachers(workspace, tmp_path):
    train(workspace, tmp_path / "run", "--max_position_embeddings", 50, "--gradient_accumulation_steps", 10)


def test_too_few_positions_are_named(workspace, tmp_path, capsys):
    train(workspace, tmp_path / "run", "--max_position_embeddings", 11, expect=2)
    assert "the student takes only 11 tokens at once" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("flag", ["--dump_path", "--data_file", "--token_counts", "--student_config", "--teacher_name",
                                  "--valid_data_file", "--student_pretrained_weights"])  # fmt: skip
@pytest.mark.parametrize("kind", ["dangling link", "pipe", "inside a file", "/proc/x"])
def test_paths_of_odd_kinds_are_named_before_models_load(workspace, tmp_path, capsys, monkeypatch, flag, kind):
    odd = tmp_path / "odd"
    if kind == "dangling link":
        odd.symlink_to(tmp_path / "nothing")
    elif kind == "pipe":
        os.mkfifo(odd)
    elif kind == "inside a file":
        (tmp_path / "file").write_text("x")
        odd = tmp_path / "file" / "odd"
    else:
        odd = "/proc/x"
    monkeypatch.setattr(train_script, "build_models", None)  # would be a traceback
    train(workspace, tmp_path / "run", flag, odd, expect=2)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert str(odd) in error
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_a_tokenizer_takes_the_one_that_is_named(workspace, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(workspace / "bert-base-uncased" / name, teacher)
    train(workspace, tmp_path / "run", "--teacher_name", teacher, "--gradient_accumulation_steps", 40, expect=2)
    assert f"no tokenizer in {teacher}" in capsys.readouterr().err
    named = ["--tokenizer_name", workspace / "bert-base-uncased"]
    train(workspace, tmp_path / "run", "--teacher_name", teacher, *named, "--gradient_accumulation_steps", 40)
    text = ["--file_path", workspace / "dump.txt", "--dump_file", tmp_path / "text"]
    run(binarized_data, *text, "--tokenizer_name", teacher, expect=2)
    assert f"no tokenizer in {teacher}" in capsys.readouterr().err
    assert not list(tmp_path.glob("text*"))


def test_how_a_configuration_wants_its_outputs_does_not_matter(workspace, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(workspace / "bert-base-uncased", teacher)
    config = json.loads((teacher / "config.json").read_text())
    config |= {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    (teacher / "config.json").write_text(json.dumps(config))
    train(workspace, tmp_path / "odd", "--teacher_name", teacher, "--gradient_accumulation_steps", 40)
    train(workspace, tmp_path / "plain", "--gradient_accumulation_steps", 40)
    odd, plain = (weights_of(tmp_path / name) for name in ("odd", "plain"))
    assert all(torch.equal(odd[name], plain[name]) for name in plain)
