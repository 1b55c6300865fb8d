"""sentence-transformers loads a distilled encoder and makes the vectors that its export makes: `test.sh --clients`."""

import export_onnx
import numpy as np
import pytest
from export_onnx import OnnxModel, encode_batch
from transformers import AutoModel
from workspace import load_tokenizer, run, train

from files.atomic import write_json

TEXTS = ["the cat sees the garden", "a dog", "my neighbour carries the long road as in the old days"]
KINDS = ("Transformer", "Pooling", "Normalize")
MODULES = [
    {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
    for i, kind in enumerate(KINDS)
]


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_vectors(workspace, tmp_path, mode):
    from sentence_transformers import SentenceTransformer

    teacher, student = tmp_path / "teacher", tmp_path / "student"
    AutoModel.from_pretrained(workspace / "bert-base-uncased").save_pretrained(teacher)
    load_tokenizer(workspace / "bert-base-uncased").save_pretrained(teacher)
    write_json(teacher / "modules.json", MODULES)
    (teacher / "1_Pooling").mkdir()
    write_json(teacher / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": mode})
    hidden = ("--alpha_ce", 0, "--alpha_mlm", 0, "--batch_size", 64, "--gradient_accumulation_steps", 8)
    train(workspace, student, "--teacher_name", teacher, *hidden)
    vectors = SentenceTransformer(str(student), device="cpu").encode(TEXTS)
    run(export_onnx, "--model", student, "--encoder")
    exported = OnnxModel(student / "onnx" / "model.onnx")
    batch = encode_batch(load_tokenizer(student), AutoModel.from_pretrained(student), [(text,) for text in TEXTS])
    _, found = exported.session.run(None, {name: batch[name].numpy() for name in exported.names})
    np.testing.assert_allclose(found, vectors, atol=1e-5)
    assert len(vectors[0]) == 32 and not np.allclose(vectors[0], vectors[1])
