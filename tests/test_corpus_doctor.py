"""The doctor finds what makes a corpus unfit, and only that."""

import pickle

import corpus_doctor
import numpy as np
import pytest
from workspace import run, train


@pytest.fixture(scope="module")
def trained(workspace, tmp_path_factory):
    """A teacher that has learned something of the text, in some seconds."""
    folder = tmp_path_factory.mktemp("trained") / "teacher"
    train(workspace, folder, "--teacher_name", workspace / "bert-base-uncased", "--student_type", "bert",
          "--n_layers", 1, "--dim", 64, "--n_heads", 2, "--hidden_dim", 128, "--max_position_embeddings", 64,
          "--initializer_range", 0.05, "--alpha_ce", 0, "--alpha_cos", 0, "--mlm_smoothing", 0, "--n_epoch", 8,
          "--learning_rate", 0.003, "--gradient_accumulation_steps", 1, "--dropout", 0, "--attention_dropout", 0,
          "--log_interval", 100)  # fmt: skip
    return folder


def test_the_doctor_finds_a_corpus_fit(tmp_path, workspace, trained, capsys):
    run(corpus_doctor, "--data_file", workspace / "text.bert-base-uncased.pickle", "--teacher_name", trained,
        "--token_counts", workspace / "counts.pickle", "--plot", tmp_path / "x.png")  # fmt: skip
    out = capsys.readouterr().out
    assert "fit to train on" in out
    assert "checksum intact" in out
    assert "→ [MASK]}" in out
    assert "is not the count" not in out
    assert "counted 0 times" not in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    counts = np.array(pickle.loads((workspace / "counts.pickle").read_bytes()))
    n, counts[counts.argmax()] = counts.max(), 0
    (tmp_path / "counts.pickle").write_bytes(pickle.dumps(counts.tolist()))
    run(corpus_doctor, "--data_file", workspace / "text.bert-base-uncased.pickle", "--tokenizer_name", trained,
        "--token_counts", tmp_path / "counts.pickle")  # fmt: skip
    assert f"{n:,} tokens of this text were counted 0 times" in capsys.readouterr().out


def test_the_doctor_tells_a_wrong_tokenizer_by_the_teachers_loss(tmp_path, workspace, trained, capsys):
    with open(workspace / "text.bert-base-uncased.pickle", "rb") as file:
        sequences = pickle.load(file)
    other_id = lambda ids: np.where(ids > 80, ids - 50, ids + 40)
    shifted = [np.array([s[0], *other_id(s[1:-1]), s[-1]]) for s in sequences]
    (tmp_path / "old.pickle").write_bytes(pickle.dumps(shifted))
    flags = ["--data_file", tmp_path / "old.pickle", "--teacher_name", trained]
    run(corpus_doctor, *flags, expect=1)
    assert "is worse than a guess by frequency" in capsys.readouterr().out


def test_the_doctor_names_missing_boundaries_and_foreign_ids(tmp_path, workspace, capsys):
    (tmp_path / "old.pickle").write_bytes(pickle.dumps([[7, 8, 9], [2, 7, 60000, 3]] * 30))
    flags = ["--data_file", tmp_path / "old.pickle", "--tokenizer_name", workspace / "bert-base-uncased"]
    run(corpus_doctor, *flags, expect=1)
    out = capsys.readouterr().out
    assert "lack their boundary tokens" in out
    assert "made with another tokenizer" in out
    run(corpus_doctor, "--data_file", tmp_path / "old.pickle", expect=2)
    assert "give --tokenizer_name" in capsys.readouterr().err
