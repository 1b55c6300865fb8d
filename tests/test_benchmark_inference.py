"""The tables hold what was measured, and the scores are those of run_glue.py in every form."""

import json

import benchmark_inference
import pytest
import run_glue
from glue_files import write_task
from workspace import run

FORMS = ["float32", "no head", "bfloat16", "onnx", "onnx int8"]  # compiling takes half a minute


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for name in ("STS-B", "RTE"):
        write_task(folder, name, n_train=96)
    return folder


def tables(out):
    """Title of the first column -> row -> cells."""
    found = {}
    for block in out.split("\n\n"):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line.startswith("|")]
        if rows:
            found[rows[0][0]] = {row[0]: row[1:] for row in rows[2:]}
    return found


def test_a_fine_tuned_model_scores_the_same_in_every_form(tmp_path, workspace, glue, capsys):
    run(run_glue, "--models", workspace / "bert-base-uncased", "--data_dir", glue, "--tasks", "RTE", "--seeds", 1,
        "--n_gpu", 0, "--fp32", "--batch_size", 8, "--learning_rate", 3e-3, "--n_epoch", 8, "--output",
        tmp_path / "glue.jsonl", "--save_models", tmp_path)  # fmt: skip
    score = json.loads((tmp_path / "glue.jsonl").read_text())["metrics"]["score"]
    capsys.readouterr()
    run(benchmark_inference, "--models", tmp_path / "bert-base-uncased-RTE-1", "--task", "RTE", "--data_dir", glue,
        "--turns", 1, "--batch_sizes", 5, "--n_gpu", 0, "--forms", *FORMS)  # fmt: skip
    accuracy = tables(capsys.readouterr().out)["RTE, outputs"]
    assert accuracy["PyTorch, float32"] == [f"{score:.2f}, ± 0 %"]
    assert float(accuracy["ONNX, float32"][0].split(",")[0]) == pytest.approx(score, abs=0.01)
    assert float(accuracy["ONNX, int8"][0].split(",")[0]) == pytest.approx(score, abs=15)


def test_models_are_timed_side_by_side(tmp_path, workspace, glue, capsys):
    (tmp_path / "twin").symlink_to(workspace / "bert-base-uncased")
    run(benchmark_inference, "--models", workspace / "bert-base-uncased", tmp_path / "twin", "--data_dir", glue,
        "--turns", 2, "--n_gpu", 0, "--forms", *FORMS, "--max_examples", 6, "--output", tmp_path / "t.md")  # fmt: skip
    out = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text() == out
    found = tables(out)
    assert set(found) == {"model", "batch size 1", "batch size 32", "STS-B, outputs"}
    assert all(cells[0].endswith("(100 %)") for cells in found["model"].values())
    for size in (1, 32):
        for cells in found[f"batch size {size}"].values():
            assert cells[0].endswith("1.00x")
            assert float(cells[1].split()[3]) > 0
    assert all(cell.startswith("±") for cells in found["STS-B, outputs"].values() for cell in cells)


def test_two_models_of_one_name_are_refused(workspace, glue, capsys):
    run(benchmark_inference, "--models", "a/x", "b/x", "--data_dir", glue, expect=2)
    assert "two of them have the same name" in capsys.readouterr().err
