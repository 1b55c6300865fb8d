"""What ten steps of training give, to the digits that every machine agrees on; written by

    python tests/golden.py

into tests/golden.json. `test_golden.py` compares; a change of the program that is not meant to change results leaves
that file as it is, and one that is shows in its difference.

A step runs in float64 on the CPU, without dropout, from weights that NumPy draws. Each line of "losses" holds the terms
of the loss and the norm of all gradients, step by step. "order" and "masks" are digests.
"""

import copy
import hashlib
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from small_models import SMALL

from distiller import Distiller
from grouped_batch_sampler import GroupedBatchSampler
from models.families import DROPOUT, family_of
from models.language_model import LanguageModel
from models.loading import auto_class
from models.student import half_depth_config
from training.batches import Batches, MicroBatches, Padding, RunData
from training.distributed import World
from training.masking import Masking
from training.recipe import Recipe

torch.set_num_threads(1)  # sums depend on how many there are
FILE = Path(__file__).with_suffix(".json")
VOC_SIZE, PAD, MASK = 99, 0, 4
N_STEPS = 10
TYPED = Recipe(n_epoch=1, batch_size=3, gradient_accumulation_steps=2, max_grad_norm=1e9, tokens_per_micro_batch=64)
NEXT_WORDS = replace(TYPED, alpha_mlm=0.0, alpha_clm=2.0)
CASES = {name: (name, NEXT_WORDS if family_of(config).causal else TYPED, {}) for name, config in SMALL.items()} | {
    "short runs": ("bert", replace(TYPED, mlm_smoothing=0.0, mlm_mask_prop=0.3, restrict_ce_to_mask=True), {}),
    "whole words, squared error": ("bert", replace(TYPED, whole_word_mask=True, alpha_mse=0.1), {}),
    "relations": ("bert", replace(TYPED, alpha_relation=1.0, relation_layer=1), {}),
    "relations of next words": ("gpt2", replace(NEXT_WORDS, alpha_relation=1.0), {}),
    "another width": ("bert", TYPED, {"hidden_size": 24, "num_attention_heads": 3}),
    "layers of another width": (
        "bert",
        replace(TYPED, alpha_layers=1.0, teacher_layers=[1, 2]),
        {"hidden_size": 24, "num_attention_heads": 3},
    ),
    "layers alone": ("modernbert", replace(TYPED, alpha_ce=0.0, alpha_mlm=0.0, alpha_cos=0.0, alpha_layers=1.0), {}),
    "encoder": ("bert", replace(TYPED, alpha_ce=0.0, alpha_mlm=0.0, alpha_relation=1.0), {}),
    "pooled vectors": ("bert", replace(TYPED, alpha_ce=0.0, alpha_mlm=0.0, alpha_pooled=1.0), {}),
    "without a teacher": ("bert", replace(TYPED, alpha_ce=0.0, alpha_cos=0.0), {}),
    "a batch by tokens": ("bert", replace(TYPED, tokens_per_batch=96), {}),
}


def golden() -> dict:
    return {"losses": {name: losses_of(*case) for name, case in CASES.items()}} | digests()


def digests() -> dict:
    return {
        "order": {f"seed {seed}, epoch {epoch}": order(seed, epoch) for seed in (0, 56) for epoch in (0, 1)},
        "masks": {f"seed {seed}, epoch {epoch}": masks(seed, epoch) for seed in (0, 56) for epoch in (0, 1)},
    }


def losses_of(family: str, recipe: Recipe, changes: dict) -> list[dict[str, float]]:
    teacher, student = make_models(family, changes)
    masks = masking(recipe, family_of(SMALL[family]).causal)
    data = RunData(
        sequences(recipe.whole_word_mask),
        sampler(recipe, recipe.seed),
        masks,
        Padding(PAD, free=recipe.padding_free, grouped=recipe.compares_sequences),
        {},
    )
    distiller = Distiller(recipe, student, teacher, data, World(torch.device("cpu")), torch.float64, None)
    draw_weights(distiller.objective.widening.double(), 2)
    if recipe.alpha_pooled:
        distiller.objective.find_center(data.some(5, recipe))
    norms = []

    def note_norm(*_) -> None:
        gradients = [p.grad for p in distiller.optimization.parameters if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])).item())

    distiller.optimization.optimizer.register_step_pre_hook(note_norm)
    rows = []
    for micro_batches, counts in itertools.islice(distiller.steps(), N_STEPS):
        distiller.step(micro_batches, counts)
        metrics, _ = distiller.meter.read(distiller.n_done, 0.0)
        rows.append({name: value for name, value in metrics.items() if name.startswith("loss")} | {"norm": norms[-1]})
    return rows


def make_models(family: str, changes: dict) -> tuple[LanguageModel, LanguageModel]:
    config = without_dropout(SMALL[family])
    shape = without_dropout(half_depth_config(config, None))
    for name, value in changes.items():
        setattr(shape, name, value)
    models = [LanguageModel(auto_class(c).from_config(c, dtype=torch.float64)) for c in (config, shape)]
    for seed, model in enumerate(models):
        draw_weights(model, seed)
    return models[0].eval().requires_grad_(False), models[1]


def without_dropout(config):
    config = copy.deepcopy(config)
    for names in DROPOUT.values():
        for name in names:
            if hasattr(config, name):
                setattr(config, name, 0.0)
    return config


def draw_weights(module: torch.nn.Module, seed: int) -> None:
    """Norms stay near 1, everything else is small."""
    generator = np.random.default_rng(seed)
    for name, parameter in sorted(module.named_parameters()):
        values = torch.from_numpy(generator.normal(scale=0.1, size=tuple(parameter.shape)))
        with torch.no_grad():
            parameter.copy_(values + ("norm" in name.lower() and name.endswith("weight")))


def sequences(bounded: bool = False) -> list[np.ndarray]:
    """With `bounded`, special tokens stand around each: whole words end there."""
    generator = np.random.default_rng(7)
    drawn = [generator.integers(5, VOC_SIZE, n) for n in generator.integers(12, 40, 2 * 3 * N_STEPS)]
    return [np.concatenate([[1], ids[1:-1], [2]]) for ids in drawn] if bounded else drawn


def sampler(recipe: Recipe, seed: int) -> GroupedBatchSampler:
    lengths = np.array([len(sequence) for sequence in sequences()])
    by_tokens = recipe.tokens_per_batch
    return GroupedBatchSampler(lengths, None if by_tokens else recipe.batch_size, by_tokens, seed=seed)


def masking(recipe: Recipe, causal: bool) -> Masking | None:
    if causal or recipe.encoder_only:
        return None
    counts = np.bincount(np.concatenate(sequences()), minlength=VOC_SIZE)
    probs = np.maximum(counts, 1).astype(np.float64) ** -recipe.mlm_smoothing
    probs[:5] = 0
    begins = np.arange(VOC_SIZE) % 3 > 0 if recipe.whole_word_mask else None
    return Masking(probs, np.flatnonzero(probs), MASK, recipe.mlm_mask_prop, begins_word=begins)


def order(seed: int, epoch: int) -> str:
    batches = sampler(TYPED, seed)
    batches.set_epoch(epoch)
    return digest(np.concatenate([batches.batch(j) for j in range(len(batches))]))


def masks(seed: int, epoch: int) -> str:
    batches = Batches(sequences(), sampler(TYPED, seed), (seed, epoch), masking(TYPED, causal=False))
    padded = MicroBatches(batches, Padding(PAD))
    return digest(*(part.numpy().ravel() for batch in padded for part in (batch.input_ids, batch.labels)))


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(np.concatenate(arrays).astype("<i8").tobytes()).hexdigest()[:16]


def as_text(numbers: dict) -> str:
    """JSON with a line for each step, so that a difference is easy to read."""
    whole = json.dumps(numbers, indent=1)
    return re.sub(r"\{\n {4}([^{}]*?)\n {3}\}", lambda step: "{" + " ".join(step[1].split()) + "}", whole) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_text(golden()))
