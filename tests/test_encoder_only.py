"""A teacher without a vocabulary head: its encoder is distilled from hidden states alone."""

import json
import math
import os

import binarized_data
import compare_models
import extract_for_distil
import numpy as np
import pytest
import report
import torch
from glue_files import write_task
from huggingface_hub import ModelCard
from transformers import AutoModel, BertModel, DistilBertModel
from workspace import load_tokenizer, rows_of, run, train, weights_of

from corpus.files import open_corpus
from corpus.tokenization import describe_tokenizer
from evaluation.held_out import held_out_sequences
from evaluation.text_vectors import TextEncoder, vectors_of
from lm_seqs_dataset import SHORTEST, LmSeqsDataset
from models.sentence_encoder import KEYS, MODE, Pooling, pooling_of, sentence_transformers_files

POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
SETTINGS = {"prompts": {"query": "query: "}}
HIDDEN = ["--alpha_ce", 0, "--alpha_mlm", 0]


@pytest.fixture(scope="module")
def encoder(workspace, tmp_path_factory):
    """A BERT without a head, as a sentence encoder lies on the hub."""
    folder = tmp_path_factory.mktemp("encoder")
    BertModel.from_pretrained(workspace / "bert-base-uncased", add_pooling_layer=False).save_pretrained(folder)
    load_tokenizer(workspace / "bert-base-uncased").save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (folder / "config_sentence_transformers.json").write_text(json.dumps(SETTINGS))
    run(extract_for_distil, "--bert_model", folder, "--dump_checkpoint", folder / "init.pth")
    return folder


@pytest.fixture(scope="module")
def student(workspace, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "student"
    train(workspace, folder, "--teacher_name", encoder, *HIDDEN, "--alpha_relation", 1, "--from_pretrained_weights",
          encoder / "init.pth", "--learning_rate", 3e-3, "--dropout", 0, "--attention_dropout", 0,
          "--n_epoch", 2, "--language", "en", "de", "--license", "mit", "--datasets", "a/b")  # fmt: skip
    return folder


def test_the_student_nears_the_teacher(student):
    first, *_, last = (row for row in rows_of(student) if row["kind"] == "valid")
    assert {"hidden_loss", "hidden_cos", "hidden_relation"} < last.keys() and "mlm_loss" not in last
    assert last["hidden_loss"] == pytest.approx(last["hidden_cos"] + last["hidden_relation"])
    assert last["hidden_loss"] < 0.8 * first["hidden_loss"]


def test_the_card_says_what_it_is_and_what_only_the_user_knows(student):
    data = ModelCard.load(student / "README.md").data
    assert (data.language, data.license, data.datasets) == (["en", "de"], "mit", ["a/b"])
    assert "held-out text, not masked" in (student / "README.md").read_text()
    assert 'pipeline("feature-extraction"' in (student / "README.md").read_text()


def test_the_held_out_loss_is_what_the_saved_models_say_of_the_text_as_it_is(workspace, encoder, student):
    teacher, loaded = (AutoModel.from_pretrained(name).eval() for name in (encoder, student))
    assert isinstance(loaded, DistilBertModel)
    assert AutoModel.from_pretrained(student / "best").config.n_layers == 2
    text = open_corpus([workspace / "text.bert-base-uncased.pickle"])
    chosen = text.take(held_out_sequences(len(text), 0.01))
    special_ids = describe_tokenizer(load_tokenizer(student))["special_ids"]
    sequences = LmSeqsDataset(chosen, special_ids, 64)
    distances = []
    for i in range(len(sequences)):
        ids = torch.from_numpy(sequences[i].astype(np.int64))[None]
        with torch.no_grad():
            ours, theirs = loaded(ids).last_hidden_state, teacher(ids).last_hidden_state
        distances.append(1 - torch.cosine_similarity(ours[0], theirs[0], -1))
    last = [row for row in rows_of(student) if row["kind"] == "valid"][-1]
    assert torch.cat(distances).mean().item() == pytest.approx(last["hidden_cos"], rel=1e-4)


def test_vectors_are_compared_from_their_mean(workspace, encoder, tmp_path):
    folder = tmp_path / "student"
    train(workspace, folder, "--teacher_name", encoder, *HIDDEN, "--alpha_cos", 0, "--alpha_pooled", 1,
          "--from_pretrained_weights", encoder / "init.pth")  # fmt: skip
    last = [row for row in rows_of(folder) if row["kind"] == "valid"][-1]
    teacher, ours = (AutoModel.from_pretrained(name).eval() for name in (encoder, folder))
    text = open_corpus([workspace / "text.bert-base-uncased.pickle"])
    held_out = held_out_sequences(len(text), 0.01)
    special_ids = describe_tokenizer(load_tokenizer(folder))["special_ids"]
    trained = LmSeqsDataset(text, special_ids, 64, held_out, SHORTEST)
    evaluated = LmSeqsDataset(text.take(held_out), special_ids, 64, min_length=SHORTEST)

    @torch.no_grad()
    def vector(model, ids):
        mean = model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    places = np.unique(np.linspace(0, len(trained) - 1, 200).astype(int))
    center = torch.stack([vector(teacher, trained[i]) for i in places]).mean(0)
    s, t = (torch.stack([vector(model, ids) for ids in evaluated]) for model in (ours, teacher))
    apart = lambda center: 1 - torch.cosine_similarity(s - center, t - center).mean().item()
    assert last["hidden_pooled"] == pytest.approx(apart(center), rel=1e-4)
    assert apart(center) > 1.2 * apart(0)  # so that another center would be found


def test_the_head_does_not_learn(encoder, student):
    start, written = torch.load(encoder / "init.pth", weights_only=True), weights_of(student)
    learnt = "distilbert.embeddings.word_embeddings.weight"
    assert not torch.equal(written[learnt], start[learnt])
    assert torch.equal(written["vocab_layer_norm.weight"], torch.ones(32))


def test_sentence_transformers_treat_it_as_its_teacher(encoder, student, workspace, tmp_path):
    for folder in (student, student / "best"):
        assert json.loads((folder / "modules.json").read_text()) == MODULES
        assert json.loads((folder / "1_Pooling" / "config.json").read_text()) == POOLING
        assert json.loads((folder / "config_sentence_transformers.json").read_text()) == SETTINGS
        assert json.loads((folder / "sentence_bert_config.json").read_text()) == {"max_seq_length": 64}
    narrow = tmp_path / "narrow"
    train(workspace, narrow, "--teacher_name", encoder, *HIDDEN, "--dim", 16, "--n_heads", 2, "--hidden_dim", 32,
          "--n_layers", 1, "--gradient_accumulation_steps", 30)  # fmt: skip
    assert json.loads((narrow / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 16


def test_steps_with_weights_are_not_taken_over(workspace, encoder, tmp_path, capsys):
    dense = [*MODULES, {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(dense))
    assert sentence_transformers_files(str(tmp_path), 32, 64) == {}
    assert "not taken over: Dense" in capsys.readouterr().err
    assert sentence_transformers_files(str(workspace), 32, 64) == {}


def test_the_pooling_is_told_in_every_version_s_words(tmp_path, capsys):
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    file = tmp_path / "1_Pooling" / "config.json"
    file.parent.mkdir()
    for settings, mode in (
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({}, "mean"),
    ):
        file.write_text(json.dumps(settings))
        written = sentence_transformers_files(str(tmp_path), 32, 64)["1_Pooling/config.json"]
        assert [key for key, value in written.items() if value] == [KEYS[mode]]
        assert pooling_of(str(tmp_path)) == Pooling(mode, normalized=True)
    file.write_text(json.dumps({MODE: ["cls", "max"]}))
    assert pooling_of(str(tmp_path)) is None
    assert "makes its vectors by cls and max, which is not supported here" in capsys.readouterr().err


def test_a_narrow_student_keeps_its_way_to_the_teachers_vectors(workspace, encoder, tmp_path, capsys):
    run, narrow = tmp_path / "run", ["--dim", 16, "--n_heads", 4, "--hidden_dim", 32, "--n_layers", 2]
    flags = ["--teacher_name", encoder, *HIDDEN, "--alpha_cos", 0, "--alpha_pooled", 1, "--keep_dense"]
    train(workspace, run, *flags, expect=2)
    assert "is as wide as its teacher" in capsys.readouterr().err
    train(
        workspace,
        run,
        *flags,
        *narrow,
        "--learning_rate",
        3e-3,
        "--batch_size",
        8,
        "--gradient_accumulation_steps",
        1,
        "--n_epoch",
        4,
        "--dropout",
        0,
        "--attention_dropout",
        0,
    )
    for folder in (run, run / "best"):
        kinds = [module["type"].rpartition(".")[2] for module in json.loads((folder / "modules.json").read_text())]
        assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
        settings = json.loads((folder / "2_Dense" / "config.json").read_text())
        assert (settings["in_features"], settings["out_features"], settings["bias"]) == (16, 32, False)
    state = max(run.glob("checkpoints/step_*/state.pth"), key=os.path.getmtime)
    widening = torch.load(state, weights_only=True)["widening"]["linear.weight"]
    assert torch.equal(pooling_of(str(run)).dense, widening)
    texts = ["the cat sees the garden", "an old sailor paints a letter before it rains"]
    s, t = (vectors_of(TextEncoder(str(folder), torch.device("cpu")), texts) for folder in (run, encoder))
    assert s.shape == t.shape == (2, 32)
    first, *_, last = (row for row in rows_of(run) if row["kind"] == "valid")
    assert last["hidden_pooled"] < first["hidden_pooled"]


def test_no_more_is_read_than_the_student_takes(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps(MODULES[:1]))
    for longest, expected in ((512, 64), (32, 32), (None, None)):
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
        files = sentence_transformers_files(str(tmp_path), 32, 64)
        assert files["sentence_bert_config.json"] == {"max_seq_length": expected}


def test_a_stopped_run_continues(workspace, encoder, tmp_path):
    flags = ["--teacher_name", encoder, *HIDDEN, "--alpha_relation", 1]
    train(workspace, tmp_path / "run", *flags)
    whole = weights_of(tmp_path / "run")
    train(workspace, tmp_path / "run", *flags, "--resume")
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(tmp_path / "run").items())


def test_a_dry_run(workspace, encoder, tmp_path, capsys):
    train(workspace, tmp_path / "run", "--teacher_name", encoder, *HIDDEN, "--alpha_relation", 1, "--dry_run", 1)
    assert "tokens/s" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_loss_on_words_needs_the_head(workspace, encoder, tmp_path, capsys):
    train(workspace, tmp_path / "run", "--teacher_name", encoder, expect=2)
    assert "no language-model head" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_compare_models_compares_hidden_states(workspace, encoder, student, tmp_path, capsys):
    write_task(tmp_path / "glue", "STS-B")
    run(compare_models, "--teacher", encoder, "--models", student, "--data_file",
        workspace / "text.bert-base-uncased.pickle", "--data_dir", tmp_path / "glue", "--n_gpu", 0, "--turns", 1,
        "--fp32")  # fmt: skip
    table = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")]
    header, _, teacher, student_row = cells
    column = header.index("cosine")
    assert teacher[column] == "1.000" and 0.5 < float(student_row[column]) < 1
    assert math.isfinite(float(student_row[header.index("STS-B")]))


def test_a_report_compares_hidden_states(student, tmp_path):
    run(report, "--runs", student, "--turns", 1, "--n_gpu", 0, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "cosine of hidden states with the teacher" in page and "held-out: loss of hidden states" in page
    assert "First guesses" not in page


def test_short_texts_count_for_an_encoder_and_not_for_a_language_model(workspace, encoder, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("who sees the garden\nthe cat\n" * 60)
    run(binarized_data, "--file_path", tmp_path / "questions.txt", "--tokenizer_name", encoder, "--dump_file",
        tmp_path / "questions")  # fmt: skip
    text = ("--data_file", tmp_path / f"questions.{encoder.name}.pickle")
    train(workspace, tmp_path / "run", "--teacher_name", encoder, *text, *HIDDEN)
    assert "training text" in (log := capsys.readouterr().err) and "119 sequences" in log and " 0 short" in log
    train(workspace, tmp_path / "words", *text, expect=2)
    assert "have fewer than 12 tokens" in capsys.readouterr().err


def test_a_text_without_the_teachers_prompts_is_told(workspace, encoder, tmp_path, capsys):
    train(workspace, tmp_path / "run", "--teacher_name", encoder, *HIDDEN, "--dry_run", 1)
    assert "expects 'query: ' before a text" in capsys.readouterr().err
    lines = (workspace / "dump.txt").read_text().splitlines()[:80]
    (tmp_path / "text.txt").write_text("".join(f"query: {line}\n" for line in lines))
    run(binarized_data, "--file_path", tmp_path / "text.txt", "--tokenizer_name", encoder, "--dump_file",
        tmp_path / "text")  # fmt: skip
    text = ("--data_file", tmp_path / f"text.{encoder.name}.pickle")
    train(workspace, tmp_path / "run", "--teacher_name", encoder, *text, *HIDDEN, "--dry_run", 1)
    assert "before a text" not in capsys.readouterr().err
