"""Fine-tuning on SQuAD, plain and with a teacher: what comes out answers questions, and the loss is the one it says."""

import argparse
import json

import pytest
import run_squad_w_distillation as script
import torch
from huggingface_hub import ModelCard
from squad_files import write_squad
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, TrainingArguments
from workspace import run

from evaluation.squad import QuestionAnswerer

SMALL = ["--max_seq_length", 32, "--doc_stride", 8, "--max_query_length", 12, "--batch_size", 8, "--n_gpu", 0, "--fp32",
         "--learning_rate", 3e-3]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    write_squad(folder / "train.json", 96)
    write_squad(folder / "dev.json", 24, seed=1)
    return ["--train_file", folder / "train.json", "--predict_file", folder / "dev.json"]


@pytest.fixture(scope="module")
def teacher(workspace, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad") / "teacher"
    run(script, "--model_name_or_path", workspace / "bert-base-uncased", "--output_dir", folder, *SMALL, *files,
        "--num_train_epochs", 8)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def extracted(workspace, tmp_path_factory):
    """A DistilBERT without a head, from the first layers of the workspace's model."""
    import extract_for_distil
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

    folder = tmp_path_factory.mktemp("student")
    name = workspace / "bert-base-uncased"
    run(extract_for_distil, "--bert_model", name, "--dump_checkpoint", folder / "init.pth", "--vocab_transform")
    config = DistilBertConfig(**json.loads((folder / "init.json").read_text()))
    model = DistilBertForMaskedLM(config)
    model.load_state_dict(torch.load(folder / "init.pth", weights_only=True))
    model.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(name).save_pretrained(folder / "student")
    return folder / "student"


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_model_answers_and_its_files_say_how_well(teacher):
    results = results_of(teacher)
    assert results["f1"] >= results["exact_match"] > 70
    assert results["questions"] == 24
    shown = {
        result.metric_type: result.metric_value for result in ModelCard.load(teacher / "README.md").data.eval_results
    }
    assert shown == {name: pytest.approx(results[name], abs=0.005) for name in ("exact_match", "f1")}
    predictions = json.loads((teacher / "predictions.json").read_text())
    best = json.loads((teacher / "nbest_predictions.json").read_text())
    assert len(predictions) == 24
    assert all(best[id_][0]["text"] == text for id_, text in predictions.items())
    AutoModelForQuestionAnswering.from_pretrained(teacher)
    answerer = QuestionAnswerer(str(teacher))
    context = "a young queen paints the long road before it rains. "
    answer = answerer.answer("a young queen paints", context)
    assert context[answer.start :].startswith(answer.text)
    assert "road" in answer.text


def test_a_student_learns_with_its_help(tmp_path, files, teacher, extracted):
    flags = ["--model_name_or_path", extracted, "--output_dir", tmp_path / "out", *SMALL, *files]
    flags += ["--num_train_epochs", 8, "--teacher_name_or_path", teacher, "--teacher_type", "bert", "--layer_epochs", 1]
    run(script, *flags, "--alpha_ce", 1, "--alpha_squad", 0)  # from the teacher alone
    assert results_of(tmp_path / "out")["exact_match"] > 70


def test_the_loss_is_that_of_the_definition(tmp_path, teacher, extracted):
    load = AutoModelForQuestionAnswering.from_pretrained
    models = [load(name, dtype=torch.float32).eval() for name in (extracted, teacher)]
    recipe = argparse.Namespace(alpha_ce=0.7, alpha_squad=0.2, temperature=3.0)
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = script.DistillationTrainer(models[0], arguments, teacher=models[1], recipe=recipe)
    ids, attended = torch.randint(5, 90, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    attended[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": attended, "token_type_ids": torch.zeros_like(ids),
             "start_positions": torch.tensor([0, 2, 4]), "end_positions": torch.tensor([0, 5, 6])}  # fmt: skip
    loss = trainer.compute_loss(models[0], batch)
    expected = 0
    for i, length in enumerate((9, 6, 9)):  # one text at a time, without padding
        s = models[0](ids[i : i + 1, :length])
        t = models[1](ids[i : i + 1, :length])
        for name, right in (("start_logits", batch["start_positions"][i]), ("end_logits", batch["end_positions"][i])):
            log_s, log_t = ((logits[name][0].double() / 3.0).log_softmax(0) for logits in (s, t))
            kl = (log_t.exp() * (log_t - log_s)).sum() * 3.0**2
            ce = F.cross_entropy(s[name][0].double(), right)
            expected = expected + (0.7 * kl + 0.2 * ce) / 2 / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert models[0].qa_outputs.weight.grad.abs().sum() > 0


def test_a_model_can_be_scored_without_training(tmp_path, files, teacher):
    run(script, "--model_name_or_path", teacher, "--output_dir", tmp_path / "out", *SMALL, *files[2:])
    same = ("exact_match", "f1")
    assert [results_of(tmp_path / "out")[name] for name in same] == [results_of(teacher)[name] for name in same]
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("flags", [["--model_name_or_path"], ["--train_file", "{train}", "--teacher_name_or_path"]])
def test_a_model_that_was_not_fine_tuned_neither_answers_nor_teaches(tmp_path, workspace, files, capsys, flags):
    flags = [flag.format(train=files[1]) for flag in flags]
    model = workspace / "bert-base-uncased"
    run(script, "--model_name_or_path", model, "--output_dir", tmp_path / "out", *SMALL, *files[2:], *flags, model,
        expect=2)  # fmt: skip
    assert "it has no head for this task" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    ([], "give --train_file to train"),
    (["--predict_file", "{dev}", "--temperature", 3], "--temperature has no effect without --teacher_name_or_path"),
    (["--predict_file", "{dev}", "--doc_stride", 30], "but the windows begin --doc_stride 30 apart"),
    (["--predict_file", "{dev}", "--max_seq_length", 80], "takes 64 tokens"),
    (["--predict_file", "{dev}", "--teacher_name_or_path", "{teacher}"], "needs --train_file"),
    (["--predict_file", "{dev}", "--model_type", "gpt2"], "--model_type gpt2"),
    (["--predict_file", "{dev}", "--output_dir", "{teacher}"], "is not empty: add --overwrite_output_dir"),
    (["--predict_file", "nothing.json"], "--predict_file nothing.json does not exist"),
])  # fmt: skip
def test_what_can_not_be_is_told_before_anything_is_done(tmp_path, files, teacher, capsys, flags, message):
    names = {"dev": files[3], "teacher": teacher}
    flags = [str(flag).format(**names) for flag in flags]
    run(script, "--model_name_or_path", teacher, "--output_dir", tmp_path / "out", *SMALL, *flags, expect=2)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
