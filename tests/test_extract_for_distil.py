import extract_for_distil
import pytest
import torch
from workspace import run

from models.loading import load_config
from models.student import BERT_LAYER, build_student


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


def test_without_the_flag_the_transform_is_left_out(workspace, tmp_path):
    state = extracted(workspace, tmp_path / "init.pth")
    assert not any(name.startswith("vocab_transform") or name.startswith("vocab_layer_norm") for name in state)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layers", "0", "4"], "the teacher's layers are 0 to 3"),
        (["--bert_model", "no-such-folder"], "no-such-folder"),
        (["--model_type", "roberta"], "is a bert"),
    ],
)
def test_bad_input(workspace, tmp_path, capsys, flags, message):
    target = tmp_path / "init.pth"
    given = ["--bert_model", workspace / "bert-base-uncased", "--dump_checkpoint", target, *flags]
    run(extract_for_distil, *given, expect=2)
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_teacher_without_a_head_is_refused(workspace, tmp_path, capsys):
    from transformers import BertModel

    BertModel.from_pretrained(workspace / "bert-base-uncased", add_pooling_layer=False).save_pretrained(
        tmp_path / "bare"
    )
    run(extract_for_distil, "--bert_model", tmp_path / "bare", "--dump_checkpoint", tmp_path / "init.pth", expect=2)
    assert "no language-model head" in capsys.readouterr().err
