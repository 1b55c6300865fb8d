"""A run that was killed and continued is the run that was not killed; another run does not pass for it."""

import fcntl
import json
import os
import re
import shutil
import signal

import pytest
import torch
from processes import run_script, run_together, running
from workspace import ROOT, flags_of, rows_of, train, weights_of

import distiller
from training.checkpoint import check_resume, steps_of
from utils import InputError

OLD = {"processes": 2, "gradient_accumulation_steps": 6, "dump_path": "run", "seed": 56, "tokens_per_micro_batch": 512,
       "teacher": 1, "teacher_name": "a", "num_workers": 0}  # fmt: skip

KILLED_IN_A_WRITE = """
import os, signal

left = int(os.environ["KILL_AT"])

def dying(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("fsync", "rename", "replace"):
    setattr(os, name, dying(getattr(os, name)))
import train
raise SystemExit(train.main())
"""


@pytest.fixture
def flags(workspace):
    return flags_of(workspace, batch_size=8, n_epoch=2, valid_share=0.05)


# ------------------------------------------------------------------------------------------------------------- may it?


@pytest.mark.parametrize("changes", [
    {"num_workers": 4}, {"teacher_name": "moved"}, {"processes": 3, "gradient_accumulation_steps": 4},
    {"processes": 1, "gradient_accumulation_steps": 12}, {"processes": 12, "gradient_accumulation_steps": 1},
])  # fmt: skip
def test_what_changes_no_result_may_differ(changes):
    check_resume(OLD, OLD | changes, uses_dropout=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 57}, "--seed (56 then, 57 now)"),
        ({"teacher": 2}, "the weights of --teacher_name (1 then, 2 now)"),
        ({"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps (6 then, 3 now)"),
        ({"processes": 4}, "takes 12 batches; on 4 processes, give --gradient_accumulation_steps 3"),
        ({"processes": 5}, "takes 12 batches; on 5 processes, choose a number that divides this"),
        ({"processes": 24}, "takes 12 batches; on 24 processes, choose a number that divides this"),
    ],
)
def test_what_changes_the_result_may_not(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check_resume(OLD, OLD | changes, uses_dropout=True)


def test_the_students_shape_counts_and_not_the_flags_that_say_it():
    old = OLD | {"shape": 1, "n_layers": None, "eval_interval": None}
    check_resume(old, old | {"n_layers": 2, "eval_interval": 5}, uses_dropout=True)
    with pytest.raises(InputError, match=re.escape(": --n_layers (None then, 3 now);")):
        check_resume(old, old | {"n_layers": 3, "shape": 2}, uses_dropout=True)
    with pytest.raises(InputError, match=re.escape("the student's shape (1 then, 2 now)")):
        check_resume(old, old | {"shape": 2}, uses_dropout=True)


def test_micro_batches_matter_only_with_dropout():
    check_resume(OLD, OLD | {"tokens_per_micro_batch": 1024}, uses_dropout=False)
    with pytest.raises(InputError, match="--tokens_per_micro_batch"):
        check_resume(OLD, OLD | {"tokens_per_micro_batch": 1024}, uses_dropout=True)


def test_what_a_run_reads_is_told_by_its_content(workspace, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(workspace / "bert-base-uncased", teacher)
    run = tmp_path / "run"
    train(workspace, run, "--teacher_name", teacher)
    moved = tmp_path / "moved"
    teacher.rename(moved)
    same = ["--teacher_type", "bert", "--n_layers", 2, "--vocab_size", 160, "--eval_interval", 3]
    train(workspace, run, "--teacher_name", moved, *same, "--resume")
    train(workspace, run, "--teacher_name", moved, "--dropout", 0, "--resume", expect=2)
    assert "--dropout (None then, 0.0 now)" in capsys.readouterr().err
    from safetensors.torch import load_file, save_file

    weights = load_file(moved / "model.safetensors")
    weights["cls.predictions.bias"] = weights["cls.predictions.bias"] + 1e-3
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    train(workspace, run, "--teacher_name", moved, "--resume", expect=2)
    assert "the weights of --teacher_name (" in capsys.readouterr().err
    import pickle

    counts = pickle.loads((workspace / "counts.pickle").read_bytes())
    (tmp_path / "counts.pickle").write_bytes(pickle.dumps([count + 1 for count in counts]))
    train(workspace, run, "--resume", "--token_counts", tmp_path / "counts.pickle", expect=2)
    assert "the counts of --token_counts (" in capsys.readouterr().err


def test_two_runs_do_not_mix_in_one_folder(workspace, tmp_path, capsys):
    run = tmp_path / "run"
    train(workspace, run)
    before = (run / "metrics.jsonl").read_bytes()
    lock = os.open(run, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    train(workspace, run, "--force", expect=2)
    assert "is being written by another process" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    os.close(lock)
    train(workspace, run, "--force")


# ------------------------------------------------------------------------------------------------------------- the same


def test_it_continues_on_another_number_of_processes(tmp_path, workspace, flags, monkeypatch):
    flags = [*flags, "--dropout", 0, "--attention_dropout", 0]
    train(workspace, tmp_path / "whole", *flags, "--gradient_accumulation_steps", 4)
    step = distiller.Distiller.step

    def step_and_stop(self, micro_batches, counts):
        finished = step(self, micro_batches, counts)
        if self.n_done == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return finished

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(distiller.Distiller, "step", step_and_stop)
        train(workspace, run, *flags, "--gradient_accumulation_steps", 4, expect=75)
    more = ["--gradient_accumulation_steps", 2, "--dump_path", run, "--resume"]
    results = run_together(2, ROOT / "train.py", *flags, *more)
    assert [result.returncode for result in results] == [0, 0], results
    for name, tensor in weights_of(tmp_path / "whole").items():
        torch.testing.assert_close(weights_of(run)[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    assert [row["step"] for row in rows_of(run)] == [row["step"] for row in rows_of(tmp_path / "whole")]


def test_the_best_model_loads_and_is_the_best(workspace, tmp_path, flags):
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    run = tmp_path / "run"
    train(workspace, run, *flags, "--gradient_accumulation_steps", 4, "--eval_interval", 1)
    model, report = AutoModelForMaskedLM.from_pretrained(run / "best", output_loading_info=True)
    assert not any(report.values())
    assert AutoTokenizer.from_pretrained(run / "best").mask_token == "[MASK]"
    assert len(pipeline("fill-mask", str(run / "best"))("the cat sees the [MASK].")) == 5
    losses = {row["step"]: row["mlm_loss"] for row in rows_of(run) if row["kind"] == "valid"}
    best = min(losses, key=losses.get)
    state = torch.load(run / "checkpoints" / f"step_{steps_of(run / 'checkpoints')[-1]}" / "state.pth")
    assert state["best_loss"] == losses[best]
    last = weights_of(run)
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items()) == (best == max(losses))


def test_killed_in_writes_and_resumed_equals_not_killed(workspace, tmp_path, flags):
    """SIGKILL inside a save: before the so many'th call that changes what is on the disk for good."""
    flags = [*flags, "--gradient_accumulation_steps", 4, "--checkpoint_interval", 2]
    train(workspace, tmp_path / "whole", *flags)
    run, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(KILLED_IN_A_WRITE)
    for calls in (9, 23, 40):
        result = run_script(script, *flags, "--dump_path", run, "--resume", PYTHONPATH=str(ROOT), KILL_AT=str(calls))
        assert result.returncode == -signal.SIGKILL, result.stderr
    train(workspace, run, *flags, "--resume")
    assert rows_of(run) == rows_of(tmp_path / "whole")
    killed, whole = weights_of(run), weights_of(tmp_path / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert not list(run.rglob("*.tmp"))


def test_a_line_that_a_kill_cut_is_dropped_and_what_is_no_row_is_named(workspace, tmp_path, flags, capsys):
    run = tmp_path / "run"
    train(workspace, run, *flags)
    rows = rows_of(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    train(workspace, run, *flags, "--resume")
    assert rows_of(run) == rows
    (run / "metrics.jsonl").write_text("nonsense\n")
    train(workspace, run, *flags, "--resume", expect=2)
    assert "metrics.jsonl, line 1: it is not JSON" in capsys.readouterr().err
    (run / "parameters.json").write_text(json.dumps([1]))
    train(workspace, run, *flags, "--resume", expect=2)
    assert "parameters.json: it is a list, but must be an object" in capsys.readouterr().err


def test_a_finished_run_without_its_checkpoints_is_left_alone(workspace, tmp_path, flags, capsys):
    run = tmp_path / "run"
    train(workspace, run, *flags, "--gradient_accumulation_steps", 20)
    shutil.rmtree(run / "checkpoints")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    train(workspace, run, *flags, "--gradient_accumulation_steps", 20, "--resume", expect=2)
    error = capsys.readouterr().err
    assert "had checkpoints, but there are none left" in error and "--force" in error
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    train(workspace, run, *flags, "--gradient_accumulation_steps", 20, "--force")


def test_a_student_of_another_width_resumes_with_its_projection(workspace, tmp_path):
    """The projection of hidden states is in the state, but not in the model."""
    flags = ["--dim", 24, "--n_heads", 3, "--n_layers", 2, "--dropout", 0, "--attention_dropout", 0, "--n_epoch", 2,
             "--checkpoint_interval", 5, "--keep_checkpoints", 99]  # fmt: skip
    train(workspace, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in steps_of(tmp_path / "run" / "checkpoints"):
        if step > 5:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    train(workspace, tmp_path / "run", *flags, "--resume")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    weights, whole = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(weights[name], value) for name, value in whole.items())
    assert not any("widening" in name or "projection" in name for name in weights)


def test_killed_at_any_moment_it_can_be_resumed(workspace, tmp_path, flags):
    """SIGKILL from outside, as soon as some steps are done."""
    run = tmp_path / "run"
    flags = [*flags, "--gradient_accumulation_steps", 1, "--checkpoint_interval", 3, "--dump_path", run, "--resume"]
    with running(ROOT / "train.py", *flags) as training:
        while training.is_running and len(steps_of(run / "checkpoints")) < 2:
            pass
        training.kill()
        assert training.result().returncode == -signal.SIGKILL
    result = run_script(ROOT / "train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "continuing after step" in result.stderr
