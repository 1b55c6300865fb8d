"""run_glue.py fine-tunes and scores models side by side, and continues where it was."""

import json

import numpy as np
import pytest
import run_glue
import torch
from glue_files import write_task
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel
from workspace import load_tokenizer, run

from evaluation import fine_tuning
from evaluation.fine_tuning import FineTuner, Settings, encode, load_for
from evaluation.glue import TASKS, read_task
from evaluation.text_vectors import TextEncoder, vectors_of
from utils import RunError


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for name in ("CoLA", "STS-B", "RTE"):
        write_task(folder, name, n_train=128)
    return folder


def flags_of(workspace, student, glue, output):
    return ["--models", workspace / "bert-base-uncased", student, "--data_dir", glue, "--n_gpu", 0, "--fp32",
            "--batch_size", 8, "--learning_rate", 3e-3, "--dropout", 0, "--output", output]  # fmt: skip


def rows_in(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_models_are_scored_side_by_side_and_nothing_twice(tmp_path, workspace, student, glue, capsys):
    output = tmp_path / "glue.jsonl"
    flags = flags_of(workspace, student, glue, output)
    run(run_glue, *flags, "--tasks", "CoLA", "RTE", "--seeds", 1, "--n_epoch", 6, "--hidden_states")
    rows = rows_in(output)
    assert [(row["model"], row["task"], row["seed"]) for row in rows] == [
        (model, task, seed)
        for task, seed in (("STS-B, hidden states", None), ("CoLA", 1), ("RTE", 1))
        for model in ("bert-base-uncased", "student")
    ]
    scores = {(row["model"], row["task"]): row["metrics"]["score"] for row in rows}
    assert scores["bert-base-uncased", "CoLA"] > 70  # chance is 0
    assert scores["bert-base-uncased", "RTE"] > 80  # chance is 50
    table = capsys.readouterr().out
    (line,) = (line for line in table.splitlines() if line.startswith("| CoLA"))
    assert [float(cell) for cell in line.split("|")[2:-1]] == [
        pytest.approx(scores[model, "CoLA"], abs=0.05) for model in ("bert-base-uncased", "student")
    ]
    run(run_glue, *flags, "--tasks", "CoLA", "--seeds", 1, 2, "--n_epoch", 6)
    again = rows_in(output)
    assert again[: len(rows)] == rows
    assert [(row["task"], row["seed"]) for row in again[len(rows) :]] == [("CoLA", 2)] * 2
    run(run_glue, *flags, "--tasks", "none")
    assert "Median of up to 2 seeds" in capsys.readouterr().out


def test_a_score_is_the_same_whenever_it_is_made(tmp_path, workspace, student, glue):
    for name in ("a", "b"):
        flags = flags_of(workspace, student, glue, tmp_path / name)
        run(run_glue, *flags, "--tasks", "RTE", "--seeds", 7, "--n_epoch", 1)
    assert rows_in(tmp_path / "a")[1]["metrics"] == rows_in(tmp_path / "b")[1]["metrics"]


def test_dropout_is_the_one_that_is_asked_for(workspace, student):
    for name in (workspace / "bert-base-uncased", student):
        body = load_for(AutoModelForSequenceClassification, str(name), dropout=0.25).base_model
        assert {module.p for module in body.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def test_a_model_trained_in_half_precision_predicts_in_float32(student, glue):
    tokenizer, model = load_tokenizer(student), load_for(AutoModelForSequenceClassification, str(student))
    examples = read_task(TASKS["CoLA"], str(glue))[0][:16]
    features = encode(tokenizer, model, [example.texts for example in examples], 128)
    labelled = [feature | {"labels": example.label} for feature, example in zip(features, examples, strict=True)]
    tuner = FineTuner(model, tokenizer, Settings(n_epoch=1, batch_size=4), 0, torch.bfloat16, use_cpu=True)
    tuner.train(labelled, "")
    with torch.no_grad():
        inputs = tokenizer.pad(features, return_tensors="pt")
        expected = type(model).forward(model.eval(), **inputs).logits
    np.testing.assert_allclose(tuner.predict(features), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_several_gpus_do_not_make_larger_batches(student, glue, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    tokenizer, model = load_tokenizer(student), load_for(AutoModelForSequenceClassification, str(student))
    examples = read_task(TASKS["CoLA"], str(glue))[0][:16]
    features = encode(tokenizer, model, [example.texts for example in examples], 128)
    steps = []
    monkeypatch.setattr(fine_tuning._Progress, "on_step_end", lambda self, args, state, *_, **__: steps.append(state))
    tuner = FineTuner(model, tokenizer, Settings(n_epoch=1, batch_size=4), 0, torch.float32, use_cpu=False)
    tuner.train([feature | {"labels": 0} for feature in features], "")
    assert len(steps) == 4
    assert tuner.predict(features).shape == (16, 2)


def test_no_more_is_read_than_the_model_has_positions_for(student):
    model = load_for(AutoModelForSequenceClassification, str(student))
    (feature,) = encode(load_tokenizer(student), model, [("the cat sees the garden " * 40,)], 512)
    assert len(feature["input_ids"]) == 64


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, student):
    config = GPT2Config(vocab_size=160, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(student)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"  # as GPT-2's
    model = load_for(AutoModelForSequenceClassification, str(tmp_path), tokenizer, num_labels=2)
    assert tokenizer.pad_token == "[SEP]"
    assert model(torch.randint(8, 99, (3, 5))).logits.shape == (3, 2)  # refuses batches without knowing the padding


def test_fine_tuned_models_can_be_kept(tmp_path, workspace, student, glue):
    from transformers import pipeline

    flags = flags_of(workspace, student, glue, tmp_path / "glue.jsonl")
    run(run_glue, *flags, "--tasks", "CoLA", "--seeds", 1, "--n_epoch", 1, "--save_models", tmp_path / "kept")
    classify = pipeline("text-classification", str(tmp_path / "kept" / "student-CoLA-1"))
    assert classify("the cat sees the garden")[0]["label"] in ("LABEL_0", "LABEL_1")
    for folder in (student, tmp_path / "kept" / "student-CoLA-1"):
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        assert not {"is_local", "local_files_only"} & set(saved)
    (result,) = ModelCard.load(tmp_path / "kept" / "student-CoLA-1" / "README.md").data.eval_results
    scored = rows_in(tmp_path / "glue.jsonl")[1]["metrics"]["matthews"]
    assert (result.metric_type, result.metric_value) == ("matthews_correlation", pytest.approx(scored, abs=0.005))


def test_a_model_that_was_kept_under_other_settings_is_not_taken(tmp_path, workspace, student, glue):
    flags = [*flags_of(workspace, student, glue, tmp_path / "glue.jsonl"), "--tasks", "CoLA", "--seeds", 1]
    kept = ["--save_models", tmp_path / "kept", "--n_epoch"]
    run(run_glue, *flags, *kept, 1)
    run(run_glue, *flags, "--n_epoch", 2)
    run(run_glue, *flags, *kept, 2)  # the scores are known, the models are others
    for name in ("bert-base-uncased", "student"):
        (row,) = rows_in(tmp_path / "kept" / f"{name}-CoLA-1" / run_glue.SCORE)
        assert (row["model"], row["n_epoch"]) == (name, 2)
    files = [path.stat().st_mtime_ns for path in tmp_path.glob("kept/*/*")]
    run(run_glue, *flags, *kept, 2)
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("kept/*/*")] == files


def test_a_student_is_taught_by_the_fine_tuned_teacher(tmp_path, workspace, student, glue, capsys):
    output = tmp_path / "glue.jsonl"
    flags = [*flags_of(workspace, student, glue, output), "--tasks", "CoLA", "STS-B", "--seeds", 1, "--n_epoch", 6]
    flags += ["--save_models", tmp_path / "kept", "--distil", "--alpha_ce", 1]  # the labels alone count for nothing
    run(run_glue, *flags)
    rows = rows_in(output)
    assert [(row["model"], row["task"]) for row in rows] == [
        (model, task) for task in ("CoLA", "STS-B") for model in ("bert-base-uncased", "student", "student-taught")
    ]
    assert rows[2]["metrics"]["score"] > 70  # chance is 0
    for row in rows[2::3]:
        assert (row["alpha_ce"], row["teacher"], row["weights"]) == (1, rows[0]["weights"], rows[1]["weights"])
        assert (row["layer_epochs"], row["layer_rate"]) == (2, 1e-4)
    assert "| student-taught |" in capsys.readouterr().out
    assert (tmp_path / "kept" / "student-taught-STS-B-1" / "model.safetensors").exists()
    run(run_glue, *flags)
    assert rows_in(output) == rows

    (tmp_path / "kept" / "bert-base-uncased-CoLA-1" / "model.safetensors").write_text("")
    run(run_glue, *flags, "--alpha_ce", 0.9, expect=2)
    assert "bert-base-uncased-CoLA-1: " in (error := capsys.readouterr().err)
    assert "Remove that folder" in error


def test_a_student_is_taught_on_copies_too(tmp_path, workspace, student, glue, monkeypatch):
    n_texts, train = [], FineTuner.train
    counted = lambda self, features, *more, **options: (
        n_texts.append(len(features)) or train(self, features, *more, **options)
    )
    monkeypatch.setattr(FineTuner, "train", counted)
    flags = [*flags_of(workspace, student, glue, tmp_path / "glue.jsonl"), "--tasks", "RTE", "--seeds", 1, 2]
    flags += ["--n_epoch", 1, "--save_models", tmp_path / "kept", "--distil", "--layer_epochs", 1]
    run(run_glue, *flags, "--max_train_examples", 20, "--augment", 2)
    lines = rows_in(tmp_path / "kept" / "RTE-2-bert-base-uncased.jsonl")
    with_copies = 20 + sum(len(line["copies"]) for line in lines[1:])
    assert 40 < with_copies <= 60
    assert n_texts == 2 * [20, 20, with_copies, with_copies]
    assert [row.get("augment") for row in rows_in(tmp_path / "glue.jsonl")] == 2 * [None, None, 2]


def test_a_launcher_is_refused(tmp_path, workspace, student, glue, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(run_glue, *flags_of(workspace, student, glue, tmp_path / "glue.jsonl"), "--tasks", "CoLA", expect=2)
    assert "start it with python, without a launcher" in capsys.readouterr().err


def test_mean_hidden_states_are_those_of_each_text_alone(workspace, student, glue):
    import torch
    from transformers import AutoModel

    tokenizer = load_tokenizer(student)
    texts = [text for example in read_task(TASKS["STS-B"], str(glue))[1][0] for text in example.texts]
    states = vectors_of(TextEncoder(str(student), torch.device("cpu")), texts)
    model = AutoModel.from_pretrained(student, dtype=torch.float32).eval()
    with torch.no_grad():
        for i in (0, 13, len(texts) - 1):
            ids = tokenizer(texts[i], return_tensors="pt").input_ids
            np.testing.assert_allclose(states[i], model(ids).last_hidden_state[0].mean(0), atol=1e-5)


@pytest.mark.parametrize("flags, message", [
    (["--tasks", "none"], "holds no scores of these models yet"),
    (["--tasks", "SST-2"], "SST-2/train.tsv does not exist"),
    (["--models", "a/x", "b/x"], "two of them have the same name"),
    (["--save_models", "{more_tokens}/tokenizer.json"], "is not a folder"),
    (["--distil"], "--distil needs --save_models"),
    (["--alpha_ce", "0.9"], "--alpha_ce has no effect without --distil"),
    (["--tasks", "RTE", "--tokenizer_name", "{more_tokens}"], "name its own with --tokenizer_name"),
])  # fmt: skip
def test_what_can_not_be_is_told(tmp_path, workspace, student, glue, capsys, flags, message):
    tokenizer = load_tokenizer(student)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "more")
    flags = [flag.format(more_tokens=tmp_path / "more") for flag in flags]
    run(run_glue, *flags_of(workspace, student, glue, tmp_path / "glue.jsonl"), *flags, expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_what_is_not_finite_is_neither_scored_nor_kept(tmp_path, workspace, student, glue, capsys):
    flags = [*flags_of(workspace, student, glue, tmp_path / "glue.jsonl"), "--tasks", "CoLA", "--seeds", 1]
    model = AutoModelForSequenceClassification.from_pretrained(workspace / "bert-base-uncased")
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(student).save_pretrained(tmp_path / "broken")
    run(run_glue, *flags, "--models", tmp_path / "broken", "--save_models", tmp_path / "kept", expect=1)
    assert "the weights are not finite any more; choose a lower --learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "glue.jsonl").exists() and not list(tmp_path.glob("kept/*"))
    tuner = FineTuner(model, load_tokenizer(student), Settings(), 0, torch.float32, use_cpu=True)
    with pytest.raises(RunError, match="some of its predictions are not finite"):
        tuner.predict(encode(load_tokenizer(student), model, [("the cat",)], 128))
