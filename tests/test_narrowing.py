"""A narrower student has those channels, heads, and neurons of its teacher that matter most, with their weights."""

import json
from types import SimpleNamespace

import extract_for_distil
import pytest
import torch
from small_models import SMALL
from workspace import load_tokenizer, run, train

from models.families import family_of
from models.loading import auto_class, load_config
from models.narrowing import NARROWABLE, narrow_config, narrowed
from models.student import BERT_LAYER, build_student
from training.metrics_files import read_metrics
from utils import InputError

CHANNELS = [1, 2, 3, 8, 9, 14, 15, 16, 20, 21, 22, 25, 27, 28, 30, 31]
HEADS, NEURONS = [1, 3], [0, *range(3, 63, 2), 62]
OF_HEADS = [8 * head + i for head in HEADS for i in range(8)]
ROWS_AND_COLUMNS = {
    "attention.q_lin": (OF_HEADS, CHANNELS), "attention.k_lin": (OF_HEADS, CHANNELS),
    "attention.v_lin": (OF_HEADS, CHANNELS), "attention.out_lin": (CHANNELS, OF_HEADS),
    "ffn.lin1": (NEURONS, CHANNELS), "ffn.lin2": (CHANNELS, NEURONS),
}  # fmt: skip


def one_batch() -> SimpleNamespace:
    """Five sequences, two of them padded."""
    ids = torch.randint(5, 99, (5, 9))
    attended = torch.ones(5, 9, dtype=torch.bool)
    attended[3:, 4:] = False
    return SimpleNamespace(
        input_ids=ids, attention_mask=attended, token_positions=attended.flatten().nonzero()[:, 0]
    )  # fmt: skip


def product_of(model, layer: int, name: str) -> torch.nn.Linear:
    """A product of a layer, by DistilBERT's name."""
    own = name if model.config.model_type == "distilbert" else BERT_LAYER[name]
    return model.get_submodule(f"{family_of(model.config).layers}.{layer}.{own}")


def quieten_all_but(places: list[int], weight: torch.Tensor) -> None:
    """Makes the other columns of a matrix, or the other entries of a vector, small."""
    others = torch.ones(weight.shape[-1], dtype=torch.bool)
    others[places] = False
    weight.data[..., others] *= 1e-3


@pytest.mark.parametrize("name", NARROWABLE)
def test_what_matters_stays_with_its_weights(name):
    torch.manual_seed(0)
    model = auto_class(SMALL[name]).from_config(SMALL[name])
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            quieten_all_but(CHANNELS, module.weight)
    for layer in range(4):
        quieten_all_but(OF_HEADS, product_of(model, layer, "attention.out_lin").weight)
        quieten_all_but(NEURONS, product_of(model, layer, "ffn.lin2").weight)
    config, state = narrowed(model, 16, [one_batch(), one_batch()])
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (16, 2, 4)
    narrow = auto_class(config).from_config(config)
    narrow.load_state_dict(state)
    for layer in range(4):
        for product, (rows, columns) in ROWS_AND_COLUMNS.items():
            wide, found = (product_of(each, layer, product) for each in (model, narrow))
            assert torch.equal(found.weight, wide.weight[rows][:, columns])
            assert torch.equal(found.bias, wide.bias[rows])
    assert torch.equal(narrow.get_input_embeddings().weight, model.get_input_embeddings().weight[:, CHANNELS])
    assert narrow(one_batch().input_ids).logits.shape == (5, 9, 99)


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = auto_class(SMALL["bert"]).from_config(SMALL["bert"])
    batch = one_batch()
    _, expected = narrowed(model, 8, [batch])
    batch.input_ids = batch.input_ids.masked_fill(~batch.attention_mask, 77)
    _, found = narrowed(model, 8, [batch])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_widths_that_can_not_be():
    for dim in (12, 32, 64):
        with pytest.raises(InputError, match="heads are 8 wide, so give a multiple of 8 below 32"):
            narrow_config(SMALL["bert"], dim)
    with pytest.raises(InputError, match="a gpt2 can't be made narrower"):
        narrow_config(SMALL["gpt2"], 16)


@pytest.mark.parametrize("family", ["distilbert", "bert"])
def test_the_student_starts_closer_to_its_teacher_than_a_random_one(workspace, tmp_path, family, capsys):
    init, shape = tmp_path / "init.pth", tmp_path / "init.json"
    run(
        extract_for_distil, "--bert_model", workspace / "bert-base-uncased", "--dump_checkpoint", init,
        "--vocab_transform", "--student_type", family, "--dim", 16,
        "--data_file", workspace / "text.bert-base-uncased.pickle", "--n_gpu", 0,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "16 of 32 channels stay, and in each layer 2 of 4 heads" in said
    config = load_config(shape)
    assert (config.hidden_size, config.num_hidden_layers, config.teacher_layers) == (16, 2, [0, 3])
    build_student(config, init)
    first = {}
    for name, weights in {"narrow": ["--from_pretrained_weights", init], "random": []}.items():
        train(
            workspace, tmp_path / name, "--from_pretrained_config", shape, *weights, "--student_type", family,
            "--gradient_accumulation_steps", 40, "--valid_share", 0.1,
        )  # fmt: skip
        first[name] = read_metrics(tmp_path / name / "metrics.jsonl")[0]["kl"]
    assert first["narrow"] < first["random"]
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["hidden_size"] == 16
    load_tokenizer(tmp_path / "narrow")


def test_without_the_transform_it_is_left_out(workspace, tmp_path):
    run(
        extract_for_distil, "--bert_model", workspace / "bert-base-uncased", "--dump_checkpoint", tmp_path / "init.pth",
        "--dim", 8, "--data_file", workspace / "text.bert-base-uncased.pickle", "--n_gpu", 0,
    )  # fmt: skip
    state = torch.load(tmp_path / "init.pth", weights_only=True)
    assert state["vocab_projector.weight"].shape[1] == 8
    assert not any(name.startswith("vocab_transform") for name in state)
