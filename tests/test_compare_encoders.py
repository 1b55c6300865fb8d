"""compare_encoders.py finds paragraphs for questions as the definition says, and shows what each model finds."""

import json

import compare_encoders
import numpy as np
import pytest
import torch
from glue_files import write_task
from transformers import AutoModel
from workspace import run

from evaluation.text_vectors import TextEncoder, ranking, read_collection, retrieval_scores, vectors_of
from files.atomic import write_json

ARTICLE = {
    "the cat sees the garden in the morning.": ["what does the cat see?", "who sees the garden?"],
    "an old sailor paints a blue boat near the harbour.": ["what does the sailor paint?"],
    "my neighbour carries seven apples without a word.": ["who carries seven apples?"],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "dev.json"
    answers = [{"text": "x", "answer_start": 0}]
    paragraphs = [
        {
            "context": context,
            "qas": [{"id": question, "question": question, "answers": answers} for question in questions],
        }
        for context, questions in ARTICLE.items()
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def test_scores_are_those_of_the_definition():
    right = np.array([0, 1, 2, 11])
    ranked = np.tile(np.arange(20), (4, 1))
    expected = (1 + 1 / np.log2(3) + 1 / np.log2(4) + 0) / 4
    assert retrieval_scores(ranked, right) == {"ndcg": pytest.approx(100 * expected), "recall": 75.0}
    q, p = np.array([[2.0, 0.1]]), np.array([[0.0, 9.0], [1.0, 1.0], [0.1, 0.0]])
    assert ranking(q, p).tolist() == [[2, 1, 0]]  # by cosine, not by length


def test_a_vector_is_that_of_the_text_alone(file, student):
    collection = read_collection(str(file), "")
    assert collection.right.tolist() == [0, 0, 1, 2] and list(ARTICLE) == collection.paragraphs
    encoder = TextEncoder(str(student), torch.device("cpu"))
    vectors = vectors_of(encoder, collection.paragraphs)
    model = AutoModel.from_pretrained(student, dtype=torch.float32).eval()
    for text, vector in zip(collection.paragraphs, vectors, strict=True):
        with torch.no_grad():
            (states,) = model(encoder.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state
        np.testing.assert_allclose(vector, states.mean(0), atol=1e-5)


def test_models_are_compared_in_one_table(file, workspace, student, tmp_path, capsys):
    write_task(tmp_path, "STS-B")
    models = [workspace / "bert-base-uncased", student]
    run(compare_encoders, "--models", *models, "--squad_file", file, "--data_dir", tmp_path, "--widths", 4, 32,
        "--n_gpu", 0, "--turns", 1, "--show", 2, "--output", tmp_path / "table.md")  # fmt: skip
    out = capsys.readouterr().out
    header, _, *lines = (tmp_path / "table.md").read_text().split("\n\n")[0].splitlines()
    names = [cell.strip() for cell in header.split("|")[1:-1]]
    rows = [dict(zip(names, [cell.strip() for cell in line.split("|")[1:-1]], strict=True)) for line in lines]
    assert [row[""] for row in rows] == ["bert-base-uncased", "student"] and [row["layers"] for row in rows] == [
        "4",
        "2",
    ]
    collection = read_collection(str(file), "")
    q, p = (vectors_of(TextEncoder(str(models[1]), "cpu"), texts) for texts in collection[:2])
    first = vectors_of(TextEncoder(str(models[0]), "cpu"), collection.paragraphs)
    for column, ranked in {
        "nDCG@10": ranking(q, p),
        "nDCG@10, first 32": ranking(q, p),
        "nDCG@10, first 4": ranking(q[:, :4], p[:, :4]),
        "mixed": ranking(q, first),
    }.items():
        assert float(rows[1][column]) == pytest.approx(retrieval_scores(ranked, collection.right)["ndcg"], abs=0.06)
    assert rows[0]["mixed"] == rows[0]["nDCG@10"]
    assert "what does the cat see?" in out and "who carries seven apples?" in out
    assert out.count("\n  * ") == 2 * 2  # of three paragraphs, the right one is always shown


def test_prompts_and_int8(file, student, tmp_path, capsys):
    model = AutoModel.from_pretrained(student)
    model.save_pretrained(tmp_path / "encoder")
    TextEncoder(str(student), "cpu").tokenizer.save_pretrained(tmp_path / "encoder")
    prompts = {"query": "the cat ", "passage": "a dog "}
    write_json(tmp_path / "encoder" / "modules.json", [{"path": "", "type": "x.Transformer"}])
    write_json(tmp_path / "encoder" / "config_sentence_transformers.json", {"prompts": prompts})
    seen = []

    class Noting(TextEncoder):
        def batch(self, texts):
            seen.extend(texts)
            return super().batch(texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_encoders, "TextEncoder", Noting)
        flags = ["--squad_file", file, "--n_gpu", 0, "--turns", 1, "--int8"]
        run(compare_encoders, "--models", tmp_path / "encoder", *flags)
    assert "the cat what does the cat see?" in seen and "a dog the cat sees the garden in the morning." in seen
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| encoder, int8 |")


def test_another_file_is_refused(student, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    run(compare_encoders, "--models", student, "--squad_file", tmp_path / "x.json", expect=2)
    assert "give a file in the format of SQuAD 1.1" in capsys.readouterr().err
