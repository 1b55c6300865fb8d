"""Sequences without padding go through the models as padded ones do, and each attends to itself only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import CASES, losses_of, without_dropout
from small_models import SMALL
from workspace import train

from models import packing
from models.families import family_of
from models.language_model import LanguageModel
from models.loading import auto_class
from models.packing import Packing, flash, kernel_fault, one_by_one
from training.batches import Padding, StepCounts, cut_micro_batches, pack, pad, prepare_batch_mlm
from training.masking import Masking

PACKED = [name for name in SMALL if family_of(SMALL[name]).packs]
MASKING = Masking(np.ones(99), np.arange(99), 4)
LENGTHS = (20, 31, 12, 12, 25, 40)


def batch_of(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    return prepare_batch_mlm([generator.integers(5, 99, n) for n in lengths], MASKING, generator)


@pytest.mark.parametrize("name", PACKED)
def test_hidden_states_are_those_of_padded_sequences(name):
    model = LanguageModel(auto_class(SMALL[name]).from_config(without_dropout(SMALL[name])).eval())
    padded, packed = pad(batch_of(), Padding(0), True), pack(batch_of(), Padding(0), True)
    with torch.no_grad():
        expected = model.hidden(padded.input_ids, padded.attention_mask)[padded.token_positions]
        model.use_packed_attention()
        found = model.hidden(packed.input_ids, None, packed.packing)
        torch.testing.assert_close(found, expected)
        every = model.states(packed.input_ids, None, packed.packing)
        torch.testing.assert_close(every[-1], expected)
        # The same model still takes padded sequences, for evaluation, and so does the library's own call.
        again = model.hidden(padded.input_ids, padded.attention_mask)[padded.token_positions]
        torch.testing.assert_close(again, expected)
        whole = model.encoder(padded.input_ids, attention_mask=padded.attention_mask.long()).last_hidden_state
        torch.testing.assert_close(whole.flatten(0, 1)[padded.token_positions], expected)


@pytest.mark.parametrize("case", [name for name, (family, _, _) in CASES.items() if family in PACKED])
def test_steps_are_those_of_padded_sequences(case):
    family, recipe, changes = CASES[case]
    padded = losses_of(family, recipe, changes)
    packed = losses_of(family, replace(recipe, padding_free=True), changes)
    for step, expected in zip(packed, padded, strict=True):
        assert step == pytest.approx(expected, rel=1e-9)


def test_a_sequence_that_saw_its_neighbor_would_be_found(monkeypatch):
    whole = lambda query, key, value, packing, *more: one_by_one(
        query, key, value, Packing(None, packing.ends[[0, -1]], 0), *more
    )
    monkeypatch.setattr(packing, "one_by_one", whole)
    with pytest.raises(AssertionError, match="not close"):
        test_hidden_states_are_those_of_padded_sequences("bert")


def test_micro_batches_hold_everything_once_and_nothing_else():
    batches = [batch_of(LENGTHS[:2]), batch_of(LENGTHS[2:])]
    cut = cut_micro_batches(batches, Padding(0, free=True), tokens=90, head_on_all_tokens=True)
    assert [micro_batch.lengths.tolist() for micro_batch in cut] == [[20, 31], [12, 12, 25], [40]]
    ids = np.concatenate([batch.ids for batch in batches])
    assert torch.cat([micro_batch.input_ids[0] for micro_batch in cut]).tolist() == ids.tolist()
    assert all(micro_batch.attention_mask is None for micro_batch in cut)
    assert all(len(micro_batch.row_positions) == micro_batch.input_ids.numel() for micro_batch in cut)
    assert [micro_batch.packing.longest for micro_batch in cut] == [31, 25, 40]
    assert cut[1].packing.position_ids[0].tolist() == [*range(12), *range(12), *range(25)]
    padded = cut_micro_batches(batches, Padding(0), tokens=90, head_on_all_tokens=True)
    assert StepCounts.of(cut) == StepCounts.of(padded)
    labels = [micro_batch.input_ids.new_full((micro_batch.input_ids.numel(),), -100) for micro_batch in cut]
    for micro_batch, at in zip(cut, labels, strict=True):
        at[micro_batch.label_positions] = micro_batch.labels
    assert torch.cat(labels).tolist() == np.concatenate([batch.labels for batch in batches]).tolist()
    together = cut_micro_batches(batches, Padding(0, free=True), tokens=sum(LENGTHS))
    assert [micro_batch.n_sequences for micro_batch in together] == [len(LENGTHS)]
    longer = cut_micro_batches([batch_of((70, 12))], Padding(0, free=True), tokens=64)
    assert [micro_batch.lengths.tolist() for micro_batch in longer] == [[70], [12]]


def test_the_call_fits_the_kernel_of_a_gpu():
    """On a device without values, since the CPU has no such kernel."""
    query, key, value = (torch.empty(100, 2, 64, device="meta", requires_grad=True) for _ in range(3))
    ends = torch.empty(5, dtype=torch.int32, device="meta")
    output = flash(query, key, value, Packing(None, ends, 32), 0.1, None)
    assert output.shape == query.shape
    output.sum().backward()
    assert query.grad.shape == query.shape


def test_a_kernel_that_fails_or_errs_is_told(monkeypatch):
    gpu = torch.device("cuda")
    assert kernel_fault(torch.device("cpu"), torch.float32, 64) is None
    assert "half precision" in kernel_fault(gpu, torch.float32, 64)
    real, ends = torch.randn, torch.tensor
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **more: real(*shape, **more))
    monkeypatch.setattr(torch, "tensor", lambda *values, device, **more: ends(*values, **more))
    forms = {
        32: (one_by_one, None),
        40: (lambda *_: torch.ops.aten.no_such_kernel(), "fails here"),
        48: (lambda query, *_: query * 2, "other results"),
    }
    for dim_head, (form, told) in forms.items():
        monkeypatch.setattr(packing, "flash", form)
        fault = kernel_fault(gpu, torch.bfloat16, dim_head)
        assert fault is None if told is None else told in fault


def test_a_run_without_padding_repeats_and_is_not_continued_with_it(workspace, tmp_path, capsys):
    dropout = ["--dropout", 0.1, "--attention_dropout", 0.1, "--n_epoch", 1]
    train(workspace, tmp_path / "run", "--padding_free", *dropout)
    first = (tmp_path / "run" / "model_epoch_0.pth").read_bytes()
    train(workspace, tmp_path / "run", "--padding_free", *dropout, "--force")
    assert (tmp_path / "run" / "model_epoch_0.pth").read_bytes() == first
    train(workspace, tmp_path / "run", "--no-padding_free", *dropout, "--resume", expect=2)
    assert "--padding_free (True then, False now)" in capsys.readouterr().err


def test_what_needs_padding_says_so(workspace, tmp_path, capsys):
    train(workspace, tmp_path / "run", "--padding_free", "--compile", expect=2)
    assert "--padding_free: --compile takes padded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
