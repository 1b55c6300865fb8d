import json

import extract_for_distil
import pytest
import torch
from transformers import AutoModelForMaskedLM, BertForMaskedLM, BertModel
from workspace import load_tokenizer, run, train

from evaluation.layer_choice import n_trials, one_by_one, usual_lists
from models.loading import load_config
from models.student import BERT_LAYER, TEACHER_LAYERS, build_student
from training.metrics_files import read_metrics


def extracted(workspace, path, *flags):
    run(extract_for_distil, "--bert_model", workspace / "bert-base-uncased", "--dump_checkpoint", path, *flags)
    return torch.load(path, weights_only=True)


def test_extracted_layers_are_the_teachers_bit_for_bit(workspace, teacher, tmp_path):
    state = extracted(workspace, tmp_path / "init.pth", "--vocab_transform", "--layers", 1, 2)
    theirs = teacher.state_dict()
    for student_layer, teacher_layer in ((0, 1), (1, 2)):
        for ours, name in BERT_LAYER.items():
            for part in ("weight", "bias"):
                ours_tensor = state[f"distilbert.transformer.layer.{student_layer}.{ours}.{part}"]
                assert torch.equal(ours_tensor, theirs[f"bert.encoder.layer.{teacher_layer}.{name}.{part}"])
    for ours, name in (
        ("distilbert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
        ("vocab_transform.weight", "cls.predictions.transform.dense.weight"),
        ("vocab_layer_norm.bias", "cls.predictions.transform.LayerNorm.bias"),
        ("vocab_projector.bias", "cls.predictions.bias"),
    ):
        assert torch.equal(state[ours], theirs[name])


def test_with_all_layers_the_student_is_the_teacher(workspace, teacher, tokenizer, tmp_path):
    extracted(workspace, tmp_path / "init.pth", "--vocab_transform", "--layers", 0, 1, 2, 3)
    student = build_student(load_config(tmp_path / "init.json"), tmp_path / "init.pth").eval()
    batch = tokenizer(["the cat sees the garden.", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        t_logits = teacher(**batch).logits
        s_logits = student(batch["input_ids"], batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(s_logits[real], t_logits[real], rtol=1e-5, atol=1e-5)
    # The token types matter in this: without them the logits are far from the teacher's.
    student.distilbert.embeddings.position_embeddings.weight.data -= (
        teacher.bert.embeddings.token_type_embeddings.weight[0]
    )
    with torch.no_grad():
        without = student(batch["input_ids"], batch["attention_mask"]).logits
    assert (without[real] - t_logits[real]).abs().max() > 0.1


def test_the_student_can_be_written_as_a_whole_model(workspace, tmp_path):
    folder = tmp_path / "models" / "start"
    extracted(workspace, tmp_path / "init.pth", "--vocab_transform", "--save_model", folder)
    expected = build_student(load_config(tmp_path / "init.json"), tmp_path / "init.pth").state_dict()
    found = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(workspace / "bert-base-uncased").get_vocab()
    run(extract_for_distil, "--bert_model", workspace / "bert-base-uncased", "--save_model", folder, expect=2)


def test_without_the_flag_the_transform_is_left_out(workspace, tmp_path):
    state = extracted(workspace, tmp_path / "init.pth")
    assert not any(name.startswith("vocab_transform") or name.startswith("vocab_layer_norm") for name in state)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layers", "0", "4"], "the teacher's layers are 0 to 3"),
        (["--bert_model", "no-such-folder"], "no-such-folder"),
        (["--model_type", "roberta"], "is a bert"),
        (["--choose_layers"], "--choose_layers needs text"),
        (["--dim", "16"], "--dim needs text"),
        (["--dim", "20", "--data_file", "text"], "give a multiple of 8 below 32"),
        (["--data_file", "text"], "--data_file is for --choose_layers and --dim"),
        (["--n_layers", "2"], "--n_layers is for --choose_layers"),
        (["--tokenizer_name", "x"], "--tokenizer_name is for --data_file and --save_model"),
        (["--choose_layers", "--layers", "1"], "give one of them"),
        (["--choose_layers", "--data_file", "text", "--n_layers", "4"], "the teacher has 4"),
    ],
)
def test_bad_input(workspace, tmp_path, capsys, flags, message):
    target = tmp_path / "init.pth"
    given = ["--bert_model", workspace / "bert-base-uncased", "--dump_checkpoint", target, *flags]
    run(extract_for_distil, *given, expect=2)
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_the_teachers_own_configuration_is_not_replaced(workspace, capsys):
    teacher = workspace / "bert-base-uncased"
    before = (teacher / "config.json").read_bytes()
    run(extract_for_distil, "--bert_model", teacher, "--dump_checkpoint", teacher / "config.pth", expect=2)
    assert "would replace" in capsys.readouterr().err
    assert (teacher / "config.json").read_bytes() == before and not (teacher / "config.pth").exists()


def test_of_a_teacher_without_a_head_the_encoder_is_taken(workspace, tmp_path, capsys):
    teacher = BertModel.from_pretrained(workspace / "bert-base-uncased", add_pooling_layer=False)
    teacher.save_pretrained(tmp_path / "bare")
    flags = ["--bert_model", tmp_path / "bare", "--dump_checkpoint", tmp_path / "init.pth"]
    run(extract_for_distil, *flags, "--vocab_transform")
    assert "has no language-model head: the encoder alone is taken" in capsys.readouterr().err
    state = torch.load(tmp_path / "init.pth", weights_only=True)
    assert state and all(name.startswith("distilbert.") for name in state)
    text = workspace / "text.bert-base-uncased.pickle"
    run(extract_for_distil, *flags, "--choose_layers", "--data_file", text, expect=2)
    assert "no tokenizer in" in capsys.readouterr().err
    load_tokenizer(workspace / "bert-base-uncased").save_pretrained(tmp_path / "bare")
    run(extract_for_distil, *flags, "--choose_layers", "--data_file", text, "--n_gpu", 0, "--fp32")
    header, _, best, *_ = capsys.readouterr().out.strip().splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["choice", "layers", "vectors", "hidden states"]
    layers = [int(layer) for layer in best.split("|")[2].split()]
    assert json.loads((tmp_path / "init.json").read_text())["teacher_layers"] == layers


def test_the_layers_that_do_nothing_are_not_chosen(workspace, tmp_path, capsys):
    """Of a teacher whose layers 1 and 2 hand on what they get."""
    teacher = BertForMaskedLM.from_pretrained(workspace / "bert-base-uncased")
    for layer in teacher.bert.encoder.layer[1:3]:
        for dense in (layer.attention.output.dense, layer.output.dense):
            dense.weight.data.zero_()
            dense.bias.data.zero_()
    teacher.save_pretrained(tmp_path / "teacher")
    load_tokenizer(workspace / "bert-base-uncased").save_pretrained(tmp_path / "teacher")
    flags = ["--bert_model", tmp_path / "teacher", "--dump_checkpoint", tmp_path / "init.pth", "--n_gpu", 0]
    text = workspace / "text.bert-base-uncased.pickle"
    run(extract_for_distil, *flags, "--choose_layers", "--data_file", text, "--n_sequences", 20)
    printed = capsys.readouterr()
    _, _, best, *others, _, _ = printed.out.strip().splitlines()
    assert best.split("|")[2].strip() == "0 3" and len(others) == 5
    kl = [float(line.split("|")[3]) for line in (best, *others)]
    assert kl == sorted(kl) and kl[0] == 0 < kl[-1]
    assert "layers 0 3 of 4" in printed.err
    run(extract_for_distil, *flags, "--choose_layers", "--data_file", text, "--n_sequences", 20, "--n_layers", 1)
    printed = capsys.readouterr()
    best = printed.out.strip().splitlines()[2].split("|")[2].strip()
    assert best in list("0123") and f"layers {best} of 4" in printed.err


def test_layers_are_taken_away_one_by_one():
    worth = [5, 1, 4, 2, 3]
    tried = []

    def score(layers):
        tried.append(layers)
        return -sum(worth[layer] for layer in layers)

    assert one_by_one(5, 2, score) == [0, 2]
    assert len(tried) == n_trials(5, 2) == 5 + 4 + 3


def test_usual_lists():
    assert list(usual_lists(12, 6).values()) == [
        [0, 2, 4, 7, 9, 11], [0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11], [0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11],
        [0, 1, 2, 9, 10, 11], [0, 1, 2, 3, 4, 11],
    ]  # fmt: skip
    assert list(usual_lists(3, 1)) == ["evenly spread", "every second from 1", "the highest"]


def test_train_compares_each_layer_with_the_one_it_was_taken_from(workspace, tmp_path, capsys):
    init, shape = tmp_path / "init.pth", tmp_path / "init.json"
    run(
        extract_for_distil, "--bert_model", workspace / "bert-base-uncased", "--dump_checkpoint", init, "--layers", 0, 1
    )
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({k: v for k, v in json.loads(shape.read_text()).items() if k != TEACHER_LAYERS}))
    flags = ["--from_pretrained_weights", init, "--alpha_layers", 1, "--gradient_accumulation_steps", 40]
    first_loss = {}
    for name, more in {
        "noted": ["--from_pretrained_config", shape],
        "named": ["--from_pretrained_config", plain, "--teacher_layers", 0, 1],
        "evenly spread": ["--from_pretrained_config", plain],
    }.items():
        train(workspace, tmp_path / name, *flags, *more)
        first_loss[name] = read_metrics(tmp_path / name / "metrics.jsonl")[-2]["loss_layers"]
    assert json.loads((tmp_path / "noted" / "config.json").read_text())[TEACHER_LAYERS] == [0, 1]
    assert first_loss["noted"] == first_loss["named"] < 0.5 * first_loss["evenly spread"]
    for layers in ([0], [0, 9]):
        train(workspace, tmp_path / "wrong", *flags, "--teacher_layers", *layers, expect=2)
        assert f"--teacher_layers ({layers}" in capsys.readouterr().err
