"""A step on a device that is not the CPU and has no values: what would copy to the CPU, or wait for a result, fails.

PyTorch's `meta` device stands for a GPU here. It knows no autocast, not even a disabled one, and no fused optimizer.
"""

import contextlib

import numpy as np
import pytest
import torch
from small_models import SMALL

from distiller import Distiller
from grouped_batch_sampler import GroupedBatchSampler
from models.families import family_of
from models.language_model import LanguageModel
from models.loading import auto_class
from models.student import half_depth_config
from training.batches import Padding, RunData, StepCounts, cut_micro_batches, pad, prepare_batch_clm, prepare_batch_mlm
from training.distributed import World
from training.masking import Masking
from training.recipe import Recipe

LOSSES = {
    "all": {"alpha_mse": 0.1},
    "at masks": {"alpha_mse": 0.1, "restrict_ce_to_mask": True},
    "ce": {"alpha_mlm": 0.0, "alpha_clm": 0.0, "alpha_cos": 0.0},
    "labels": {"alpha_ce": 0.0, "alpha_cos": 0.0},
    "cos": {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_clm": 0.0},
    "relation": {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_clm": 0.0, "alpha_cos": 0.0, "alpha_relation": 1.0},
    "layers": {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_clm": 0.0, "alpha_cos": 0.0, "alpha_layers": 1.0},
}


@pytest.fixture
def meta(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, **flags: plain(*given, **flags, foreach=True))

    class NoScaler:
        def __init__(self, *_, **__): ...

        def scale(self, loss):
            return loss

        def unscale_(self, optimizer): ...

        def update(self): ...

        def is_enabled(self):
            return False

        def step(self, optimizer):
            del optimizer.found_inf  # which only the fused optimizer reads
            optimizer.step()

    monkeypatch.setattr(torch.amp, "GradScaler", NoScaler)
    return torch.device("meta")


# Each loss with a model that guesses masked words and one that guesses the next; each family with their sum.
CASES = [(family, losses) for family in SMALL for losses in LOSSES if family in ("bert", "gpt2") or losses == "all"]


@pytest.mark.parametrize("family, losses", CASES)
def test_a_step_leaves_the_device_alone(meta, family, losses):
    config = SMALL[family]
    causal = family_of(config).causal
    labels = {"alpha_mlm": 0.0, "alpha_clm": 2.0} if causal else {}
    recipe = Recipe(**{**labels, **LOSSES[losses]}, padding_free=losses == "all" and family_of(config).packs)
    with meta:
        teacher = LanguageModel(auto_class(config).from_config(config).eval())
        shape = half_depth_config(config, family)
        student = LanguageModel(auto_class(shape).from_config(shape))
    generator = np.random.default_rng(0)
    sequences = [generator.integers(5, 99, n) for n in (20, 31, 12, 12)]
    if causal:
        batch = prepare_batch_clm(sequences)
    else:
        masking = Masking(np.ones(99), np.arange(99), 4)
        batch = prepare_batch_mlm(sequences, masking, generator)
    micro_batches = cut_micro_batches(
        [batch],
        Padding(0, free=recipe.padding_free, grouped=recipe.compares_sequences),
        40,
        causal or recipe.head_on_all_tokens,
    )
    data = RunData(None, GroupedBatchSampler(np.full(8, 16), batch_size=1), None, Padding(0), {})
    distiller = Distiller(recipe, student, teacher, data, World(meta), torch.float32, None)
    for _ in range(2):
        assert distiller.step(micro_batches, StepCounts.of(micro_batches))
    assert all(parameter.device.type == "meta" for parameter in student.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        distiller.meter.read(2, 0.0)  # only here are values asked for


def test_a_wait_in_a_step_would_be_found(meta, monkeypatch):
    config = SMALL["bert"]
    with meta:
        teacher = LanguageModel(auto_class(config).from_config(config).eval())
        student = LanguageModel(auto_class(config).from_config(config))
    data = RunData(None, GroupedBatchSampler(np.full(8, 16), batch_size=1), None, Padding(0), {})
    distiller = Distiller(Recipe(), student, teacher, data, World(meta), torch.float32, None)
    masking = Masking(np.ones(99), np.arange(99), 4)
    batch = pad(prepare_batch_mlm([np.arange(5, 30)], masking, np.random.default_rng(0)), Padding(0), True)
    read = distiller.objective.read_as_student

    def ask(micro_batch):
        s = read(micro_batch)
        s.hidden.sum().item()
        return s

    monkeypatch.setattr(distiller.objective, "read_as_student", ask)
    with pytest.raises((RuntimeError, NotImplementedError)):
        distiller.step([batch], StepCounts.of([batch]))
