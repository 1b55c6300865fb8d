"""train.py through its command line, on a small BERT."""

import functools
import json
import math
import os
import pickle
import shutil
import signal

import binarized_data
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from processes import run_together
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM
from workspace import ROOT, flags_of, rows_of, run, train, weights_of

import distiller
from dataset import open_token_file
from evaluation.held_out import held_out_sequences
from lm_seqs_dataset import LmSeqsDataset
from training import dry_run
from training.checkpoint import load_newest
from training.optimization import Optimization


def metrics(folder, kind):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(workspace, folder, "--n_epoch", 2)
    return folder


# ------------------------------------------------------------------------------------------------------- what it leaves


def test_the_output_is_a_model_with_its_papers(finished):
    expected = {
        "README.md", "checkpoint.pth", "config.json", "git_log.json", "log", "metrics.jsonl", "model.safetensors",
        "model_epoch_0.pth", "model_epoch_1.pth", "parameters.json", "tokenizer.json", "tokenizer_config.json",
        "checkpoints", "best",
    }  # fmt: skip
    assert expected == set(os.listdir(finished))
    assert any(name.startswith("events.out") for name in os.listdir(finished / "log" / "train"))
    assert os.stat(finished / "model.safetensors").st_mode == os.stat(finished / "metrics.jsonl").st_mode


def test_it_loads_with_from_pretrained_and_nothing_else(finished):
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

    model, report = AutoModelForMaskedLM.from_pretrained(finished, output_loading_info=True)
    assert not any(report.values())
    assert model.config.model_type == "distilbert"
    assert model.config.num_hidden_layers == 2
    for name, tensor in weights_of(finished).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert AutoModel.from_pretrained(finished).config.architectures == ["DistilBertForMaskedLM"]
    assert AutoTokenizer.from_pretrained(finished).mask_token == "[MASK]"
    guesses = pipeline("fill-mask", str(finished))("the cat sees the [MASK].")
    assert len(guesses) == 5


def test_the_card_says_what_it_is_and_how_it_was_made(finished):
    card = (finished / "README.md").read_text()
    last = metrics(finished, "valid")[-1]
    assert f"{last['mlm_loss']:.4g}" in card
    assert f"{last['agreement']:.4g}" in card
    assert json.loads((finished / "parameters.json").read_text())["command"] in card
    assert "distilled from" in card
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "fill-mask", None)
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {name: pytest.approx(last[name], abs=1e-4) for name in ("mlm_loss", "kl", "agreement")}


def test_every_metric_is_noted(finished):
    train_rows, valid_rows = metrics(finished, "train"), metrics(finished, "valid")
    names = {"kind", "step", "tokens", "loss", "loss_ce", "loss_mlm", "loss_cos", "lr", "tokens_per_second",
             "tflops", "mfu", "peak_memory_gib"}  # fmt: skip
    assert set(train_rows[0]) == names
    names = {"mlm_loss", "perplexity", "accuracy", "kl", "agreement", "teacher_loss", "teacher_accuracy"}
    names |= {f"training_masks_{name}" for name in names}  # --mlm_smoothing is 0.7
    assert set(valid_rows[0]) == names | {"kind", "step", "tokens"}
    assert valid_rows[0]["step"] == 0
    assert valid_rows[-1]["step"] == train_rows[-1]["step"]
    for row in train_rows:
        assert row["loss"] == pytest.approx(5 * row["loss_ce"] + 2 * row["loss_mlm"] + row["loss_cos"])


# ---------------------------------------------------------------------------------------------------- the right numbers


def test_the_schedule_ends_at_zero_and_every_token_counts(workspace, finished):
    rows = metrics(finished, "train")
    assert rows[-1]["lr"] == 0
    assert max(row["lr"] for row in rows) <= 5e-4
    file = open_token_file(workspace / "text.bert-base-uncased.pickle")
    trained = LmSeqsDataset(file, file.made_by["special_ids"], 64, exclude=held_out_sequences(len(file), 0.01))
    batches = math.ceil(len(trained) / 8)
    assert batches % 4, "the last step of an epoch should be a short one here"
    assert rows[-1]["step"] == 2 * math.ceil(batches / 4)
    assert rows[-1]["tokens"] == 2 * trained.n_tokens


def test_training_brings_the_student_near_its_teacher(workspace, tmp_path):
    train(workspace, tmp_path / "run", "--n_epoch", 4, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 1,
          "--valid_share", 0.1)  # fmt: skip
    rows = metrics(tmp_path / "run", "valid")
    assert rows[-1]["kl"] < 0.8 * rows[0]["kl"]
    assert rows[-1]["agreement"] > rows[0]["agreement"] + 0.1
    losses = metrics(tmp_path / "run", "train")
    for term in ("loss_ce", "loss_mlm", "loss_cos"):
        assert losses[-1][term] < losses[0][term]


def test_the_same_command_gives_the_same_weights(workspace, tmp_path, finished):
    train(workspace, tmp_path / "run", "--n_epoch", 2, "--num_workers", 2)  # and workers change nothing
    assert_same_weights(weights_of(finished), weights_of(tmp_path / "run"))


def test_stopped_and_resumed_equals_not_stopped(workspace, tmp_path, finished, monkeypatch):
    step = distiller.Distiller.step

    def step_and_stop(self, micro_batches, counts):
        finished = step(self, micro_batches, counts)
        if self.n_done in (3, 14):
            os.kill(os.getpid(), signal.SIGTERM)
        return finished

    folder = tmp_path / "run"
    monkeypatch.setattr(distiller.Distiller, "step", step_and_stop)
    train(workspace, folder, "--n_epoch", 2, "--resume", expect=75)  # nothing to resume: it starts
    train(workspace, folder, "--n_epoch", 2, "--resume", expect=75)
    train(workspace, folder, "--n_epoch", 2, "--resume")
    assert_same_weights(weights_of(finished), weights_of(folder))
    assert rows_of(finished) == rows_of(folder)


def test_a_changed_flag_does_not_resume(workspace, finished, capsys):
    train(workspace, finished, "--n_epoch", 2, "--resume", "--learning_rate", 1e-3, "--seed", 57, expect=2)
    error = capsys.readouterr().err
    assert "--learning_rate (0.0005 then, 0.001 now)" in error
    assert "--seed (56 then, 57 now)" in error


def test_any_number_of_processes_takes_the_same_steps(workspace, tmp_path):
    """Four batches a step, whoever computes them; dropout, which each process draws for itself, is off."""
    flags = flags_of(workspace, batch_size=8, n_epoch=1, dropout=0, attention_dropout=0)
    for size in (1, 4):
        more = ["--gradient_accumulation_steps", 4 // size, "--dump_path", tmp_path / str(size)]
        results = run_together(size, ROOT / "train.py", *flags, *more)
        assert [result.returncode for result in results] == [0] * size, results[0].stderr
    one = weights_of(tmp_path / "1")
    for name, tensor in weights_of(tmp_path / "4").items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    for a, b in zip(metrics(tmp_path / "1", "train"), metrics(tmp_path / "4", "train"), strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_micro_batches_of_several_batches_change_no_more_than_rounding(workspace, tmp_path):
    for tokens in (0, 600):
        train(
            workspace,
            tmp_path / str(tokens),
            "--dropout",
            0,
            "--attention_dropout",
            0,
            "--tokens_per_micro_batch",
            tokens,
        )
    each, merged = (metrics(tmp_path / name, "train") for name in ("0", "600"))
    for a, b in zip(each, merged, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_compiled_models_learn_the_same(workspace, tokenizer, tmp_path, monkeypatch):
    """Graphs of all sizes and their gradients are made, but no machine code, which takes minutes: PyTorch tests it."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    flags = ["--teacher_name", tmp_path / "teacher", "--dropout", 0, "--attention_dropout", 0, "--valid_share", 0,
             "--gradient_accumulation_steps", 16, "--alpha_relation", 100, "--n_epoch", 1]  # fmt: skip
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        train(workspace, tmp_path / name, *flags, *more)
    plain, compiled = (metrics(tmp_path / name, "train") for name in ("plain", "compiled"))
    for a, b in zip(plain, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["loss_relation"] == pytest.approx(b["loss_relation"], rel=1e-3) and a["loss_relation"] > 0


def test_a_dry_run_says_what_it_takes_and_writes_nothing(workspace, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    train(workspace, tmp_path / "run", "--dry_run", 3, "--peak_tflops", 100, "--n_epoch", 2)
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    assert "3 of 18 steps" in shown
    assert "tokens/s, MFU 0." in shown
    for part in ("the whole run", "process-hours", "evaluations", "peak memory", "micro-batch", "disk"):
        assert part in shown
    train(workspace, tmp_path / "run", "--dry_run", 1000, "--gradient_accumulation_steps", 1000)  # a single step
    assert "1 of 1 steps" in capsys.readouterr().out


def test_the_disk_that_a_dry_run_foretells_is_what_a_run_takes(workspace, tmp_path, finished, monkeypatch):
    taken = sum(file.stat().st_size for kind in ("*.pth", "*.safetensors") for file in finished.rglob(kind))
    estimates = []
    monkeypatch.setattr(dry_run, "report", lambda estimate, *_: estimates.append(estimate))
    train(workspace, tmp_path / "run", "--n_epoch", 2, "--dry_run", 1)
    assert estimates[0].disk == pytest.approx(taken, rel=0.15)  # headers and names are a part of such small files


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(workspace, tmp_path, monkeypatch):
    """Operations whose result the processor has to see, or whose shape depends on data, would wait for a GPU."""
    step, seen = distiller.Distiller.step, []

    def step_and_note(self, micro_batches, counts):
        with Operations() as operations:
            finished = step(self, micro_batches, counts)
        seen.append(operations.names)
        return finished

    monkeypatch.setattr(distiller.Distiller, "step", step_and_note)
    train(workspace, tmp_path / "run", "--alpha_mse", 0.01)
    assert {"addmm", "_fused_adamw_"} <= {name for names in seen for name in names}
    waits = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "multinomial"}
    assert not waits & {name for names in seen for name in names}


def test_positions_stay_frozen_unless_asked_otherwise(workspace, tmp_path):
    import extract_for_distil

    init = tmp_path / "init.pth"
    run(
        extract_for_distil,
        "--bert_model",
        workspace / "bert-base-uncased",
        "--dump_checkpoint",
        init,
        "--vocab_transform",
    )
    name = "distilbert.embeddings.position_embeddings.weight"
    before = torch.load(init, weights_only=True)
    for flags, stays in (([], True), (["--no-freeze_pos_embs"], False)):
        train(workspace, tmp_path / "run", "--from_pretrained_weights", init, "--force", *flags)
        after = weights_of(tmp_path / "run")
        assert torch.equal(before[name], after[name]) == stays
        assert json.loads((tmp_path / "run" / "config.json").read_text())["sinusoidal_pos_embds"] is False
        assert not torch.equal(before["vocab_transform.weight"], after["vocab_transform.weight"])


def test_initializer_range_and_architecture_flags_are_obeyed(workspace, tmp_path):
    train(workspace, tmp_path / "run", "--n_layers", 3, "--hidden_dim", 48, "--initializer_range", 0.5,
          "--learning_rate", 1e-9)  # fmt: skip
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["n_layers"], config["hidden_dim"], config["initializer_range"]) == (3, 48, 0.5)
    assert weights_of(tmp_path / "run")["distilbert.embeddings.word_embeddings.weight"].std() == pytest.approx(
        0.5, rel=0.1
    )


def test_without_a_teacher_it_trains_a_language_model(workspace, tmp_path):
    flags = ["--alpha_ce", 0, "--alpha_cos", 0, "--student_type", "bert", "--student_pretrained_weights"]
    import train as script

    data = workspace / "text.bert-base-uncased.pickle"
    run(script, "--dump_path", tmp_path / "run", "--data_file", data, *flags, workspace / "bert-base-uncased",
        "--batch_size", 8, "--gradient_accumulation_steps", 1, "--n_gpu", 0, "--n_epoch", 1,
        "--learning_rate", 2e-3)  # fmt: skip
    rows = metrics(tmp_path / "run", "valid")
    assert rows[-1]["mlm_loss"] < rows[0]["mlm_loss"] - 0.5
    assert "agreement" not in rows[-1]
    assert "trained by language modeling" in (tmp_path / "run" / "README.md").read_text()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("bert", 4)


def test_old_pickles_and_old_flags_give_the_same_run(workspace, tmp_path, finished):
    file = open_token_file(workspace / "text.bert-base-uncased.pickle")
    (tmp_path / "old.pickle").write_bytes(pickle.dumps([np.array(file[i]) for i in range(len(file))]))
    name = str(workspace / "bert-base-uncased")
    train(workspace, tmp_path / "run", "--n_epoch", 2, "--data_file", tmp_path / "old.pickle", "--bert_model", name,
          "--bert_tokenizer", name, "--local-rank", -1)  # fmt: skip
    assert_same_weights(weights_of(finished), weights_of(tmp_path / "run"))


def test_old_pickle_shards_and_our_file_give_the_same_training(tmp_path, workspace):
    data = workspace / "text.bert-base-uncased.pickle"
    with open(data, "rb") as file:
        (tmp_path / "old.pickle").write_bytes(pickle.dumps([np.array(sequence) for sequence in pickle.load(file)]))
    for k in range(3):
        run(binarized_data, "--file_path", workspace / "dump.txt", "--dump_file", tmp_path / "text",
            "--tokenizer_name", workspace / "bert-base-uncased", "--shard_id", k, "--num_shards", 3)  # fmt: skip
    sources = {"ours": [data], "old": [tmp_path / "old.pickle"], "shards": [tmp_path / "text.*-of-00003.pickle"]}
    for name, files in sources.items():
        train(workspace, tmp_path / name, "--data_file", *files, "--log_interval", 1)
    assert rows_of(tmp_path / "old") == rows_of(tmp_path / "ours") == rows_of(tmp_path / "shards")
    assert len(rows_of(tmp_path / "ours")) > 3


def test_a_command_of_the_later_generation_runs(workspace, tmp_path):
    config = json.loads((ROOT / "training_configs" / "distilbert-base-uncased.json").read_text())
    vocab_size = json.loads((workspace / "bert-base-uncased" / "config.json").read_text())["vocab_size"]
    config |= {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64, "vocab_size": vocab_size}
    (tmp_path / "student.json").write_text(json.dumps(config))
    train(workspace, tmp_path / "run", "--student_type", "distilbert", "--student_config", tmp_path / "student.json",
          "--teacher_type", "bert", "--alpha_ce", 5.0, "--alpha_mlm", 2.0, "--alpha_cos", 1.0, "--alpha_clm", 0.0,
          "--mlm", "--freeze_pos_embs", "--force", "--fp16_opt_level", "O1", "--log_interval", 1)  # fmt: skip
    rows = metrics(tmp_path / "run", "train")
    assert len(rows) == rows[-1]["step"]


# ------------------------------------------------------------------------------------------------------------ bad input


def swap_tokens(folder, one, other):
    """Exchanges two entries of the vocabulary of the tokenizer in a folder."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data_file", "nothing.pickle"], "nothing.pickle does not exist"),
        (["--data_file", "{w}/dump.txt"], "dump.txt is not a pickle"),
        (["--data_file", "{w}"], "is a folder"),
        (["--token_counts", "nothing.pickle"], "nothing.pickle does not exist"),
        (["--token_counts", "{t}/short.pickle"], "short.pickle counts a vocabulary of 99 tokens"),
        (["--teacher_name", "no-such-model"], "no-such-model"),
        (["--tokenizer_name", "no-such-tokenizer"], "no-such-tokenizer"),
        (["--student_config", "{t}/none.json"], "none.json does not exist"),
        (["--student_config", "{t}/other_vocabulary.json"], "do not share a vocabulary"),
        (["--student_config", "{t}/wide.json", "--n_layers", "2"], "--n_layers contradicts"),
        (["--student_pretrained_weights", "{t}/swapped"], "2 entries differ, the first is 28: 'a' and 'b'"),
        (["--student_pretrained_weights", "{t}/none.pth"], "none.pth does not exist"),
        (["--student_pretrained_weights", "{t}/hostile.pth"], "hostile.pth is not a file of weights"),
        (["--student_pretrained_weights", "{t}/misfit.pth"], "misfit.pth does not fit"),
        (["--n_heads", "5"], "not a multiple of its 5 heads"),
        (["--force", "--resume"], "--force starts over and --resume continues"),
        (["--relation_heads", "2"], "--relation_heads has no effect without --alpha_relation"),
        (["--word_mask", "0.9"], "must add up to 1"),
        (["--alpha_ce", "-1"], "--alpha_ce: '-1' is not a number from 0 to 1e+06"),
        (["--alpha_ce", "0", "--alpha_mlm", "0", "--alpha_cos", "0"], "nothing to learn from"),
        (["--alpha_clm", "1"], "--alpha_clm 1.0: a distilbert is not causal"),
        (["--no-mlm"], "--no-mlm: a distilbert is not a causal model"),
        (["--temperature", "0"], "--temperature: '0' is not a number from 0.01"),
        (["--n_epoch", "0"], "--n_epoch: '0' is not a whole number from 1"),
        (["--tokens_per_batch", "20"], "--tokens_per_batch 20"),
        (["--tokens_per_batch", "512", "--no-group_by_size"], "--no-group_by_size"),
        (["--teacher_type", "roberta"], "--teacher_type roberta"),
        (["--student_type", "gpt2"], "--student_type gpt2"),
        (["--n_gpu", "8"], "--n_gpu 8"),
        (["--fp16"], "--fp16 needs a GPU"),
        (["--valid_share", "2"], "--valid_share: '2' is not a number from 0 to 1"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(workspace, tmp_path, capsys, monkeypatch, flags, message):
    if torch.cuda.is_available() and flags[0] in ("--n_gpu", "--fp16"):
        pytest.skip("this machine has a GPU, where these flags are right")
    (tmp_path / "short.pickle").write_bytes(pickle.dumps([1] * 99))
    vocab_size = json.loads((workspace / "bert-base-uncased" / "config.json").read_text())["vocab_size"]
    shape = {"model_type": "distilbert", "n_layers": 1, "n_heads": 2, "dim": 64, "hidden_dim": 64}
    (tmp_path / "wide.json").write_text(json.dumps({**shape, "vocab_size": vocab_size}))
    (tmp_path / "other_vocabulary.json").write_text(json.dumps({**shape, "dim": 32, "vocab_size": 30522}))
    swap_tokens(shutil.copytree(workspace / "bert-base-uncased", tmp_path / "swapped"), "a", "b")
    torch.save({"vocab_projector.bias": torch.zeros(7)}, tmp_path / "misfit.pth")
    torch.save([os.system], tmp_path / "hostile.pth")
    flags = [flag.format(w=workspace, t=tmp_path) for flag in flags]
    train(workspace, tmp_path / "run", *flags, expect=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_is_an_error(workspace, tmp_path, capsys):
    train(workspace, tmp_path / "run", "--learnin_rate", 1, expect=2)
    assert capsys.readouterr().err == "error: unrecognized arguments: --learnin_rate 1; --help explains the flags.\n"


def test_another_tokenizers_data_is_refused(workspace, tmp_path, capsys):
    import binarized_data
    import train_vocabulary

    run(train_vocabulary, "--file_path", workspace / "dump.txt", "--vocab_size", 120, "--output", tmp_path / "other")
    run(binarized_data, "--file_path", workspace / "dump.txt", "--bert_tokenizer", tmp_path / "other",
        "--dump_file", tmp_path / "text")  # fmt: skip
    train(workspace, tmp_path / "run", "--data_file", tmp_path / "text.other.pickle", expect=2)
    assert "was binarized with the tokenizer other" in capsys.readouterr().err


def test_a_tokenizer_without_a_mask_is_refused(workspace, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace / "bert-base-uncased")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "maskless")
    train(workspace, tmp_path / "run", "--tokenizer_name", tmp_path / "maskless", expect=2)
    assert "no mask token" in capsys.readouterr().err


def test_force_overwrites_a_run_and_nothing_else(workspace, tmp_path, capsys):
    folder = tmp_path / "run"
    train(workspace, folder)
    (folder / "notes.txt").write_text("mine")
    train(workspace, folder, expect=2)
    assert "already exists: add --force" in capsys.readouterr().err
    train(workspace, folder, "--force", "--student_pretrained_weights", folder / "checkpoint.pth", expect=2)
    assert "checkpoint.pth, which this run reads" in capsys.readouterr().err
    assert (folder / "checkpoint.pth").exists()
    train(workspace, folder, "--force", "--data_file", "nothing.pickle", expect=2)
    assert (folder / "checkpoint.pth").exists()
    train(workspace, folder, "--force")
    assert (folder / "notes.txt").read_text() == "mine"

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    train(workspace, tmp_path / "precious", "--force", expect=2)
    assert "is not the output of a run" in capsys.readouterr().err


def test_resume_without_a_state_overwrites_nothing_but_a_run(workspace, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(workspace / "bert-base-uncased", teacher)
    before = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    train(workspace, teacher, "--resume", "--teacher_name", teacher, expect=2)
    assert "is not the output of a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()} == before

    folder = tmp_path / "run"
    train(workspace, folder)
    shutil.rmtree(folder / "checkpoints")
    train(workspace, folder, "--resume", "--student_pretrained_weights", folder / "checkpoint.pth", expect=2)
    assert "checkpoint.pth, which this run reads" in capsys.readouterr().err
    assert (folder / "checkpoint.pth").exists()


def overflow_in_steps(monkeypatch, *steps):
    finite = Optimization.backward

    def overflow(self, loss):
        finite(self, loss * torch.inf if self.scheduler.last_epoch in steps else loss)

    monkeypatch.setattr(Optimization, "backward", overflow)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(workspace, tmp_path, capsys, monkeypatch):
    overflow_in_steps(monkeypatch, 3)
    folder = tmp_path / "run"
    train(workspace, folder, "--checkpoint_interval", 1, expect=1)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    state = load_newest(folder / "checkpoints")
    assert state["step"] > 0
    assert "not finite in 1 of the last" in error
    assert f"up to {state['step'] + 1} of" in error
    assert all(tensor.isfinite().all() for tensor in state["student"].values())


def test_some_steps_that_are_not_finite_are_left_out(workspace, tmp_path, capsys, monkeypatch):
    overflow_in_steps(monkeypatch, 3, 4)
    train(workspace, tmp_path / "run", "--max_bad_steps", 2, "--log_interval", 8)
    assert "not finite in 2 of the last 8 steps, up to 8 of 9, which were left out" in capsys.readouterr().err
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path / "run", "train"))
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run").values())
    train(workspace, tmp_path / "other", "--max_bad_steps", 1, "--log_interval", 8, expect=1)
    assert "not finite in 2 of the last 8 steps" in capsys.readouterr().err
