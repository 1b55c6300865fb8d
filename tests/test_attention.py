"""Attention in bfloat16 on a CPU: which sequences are taken in float32, and that nothing else changes."""

import copy

import pytest
import torch
from small_models import SMALL
from transformers import BertForMaskedLM

from models import attention
from models.attention import SHORT, attend_on_cpu, take_short_sequences_in_float32
from models.families import LanguageModel
from models.loading import auto_class


@pytest.fixture
def dtypes(monkeypatch):
    """Of the vectors that reach `transformers`' own function, one a call."""
    seen = []

    def watched(module, query, *rest, **options):
        seen.append(query.dtype)
        return original(module, query, *rest, **options)

    original = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    return seen


def vectors(seq_length=8, dtype=torch.bfloat16, differentiated=True):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, 3, seq_length, 4, generator=generator).to(dtype).requires_grad_(differentiated) for _ in "qkv"
    ]


@pytest.mark.parametrize(
    "given, options, expected",
    [
        ({}, {}, torch.float32),
        ({"seq_length": SHORT}, {}, torch.float32),
        ({"seq_length": SHORT + 1}, {}, torch.bfloat16),
        ({"differentiated": False}, {}, torch.bfloat16),
        ({}, {"dropout": 0.1}, torch.bfloat16),
        ({"dtype": torch.float16}, {}, torch.float16),
        ({"dtype": torch.float64}, {}, torch.float64),
    ],
)
def test_short_sequences_with_a_backward_pass_are_taken_in_float32(dtypes, given, options, expected):
    output, maps = attend_on_cpu(torch.nn.Identity(), *vectors(**given), None, is_causal=False, **options)
    assert dtypes == [expected] and maps is None
    assert output.dtype == given.get("dtype", torch.bfloat16)


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_output_and_gradients_are_those_of_float64(mask):
    keep = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    keep[1, :, :, 5:] = False
    added = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))
    given, exact = vectors(), vectors()
    exact = [part.detach().double().requires_grad_() for part in exact]
    scores = exact[0] @ exact[1].transpose(-1, -2) / 2 + (0 if mask == "none" else added.double())
    expected = (scores.softmax(-1) @ exact[2]).transpose(1, 2)
    masks = {"none": None, "boolean": keep, "additive": added.to(torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attend_on_cpu(torch.nn.Identity(), *given, masks[mask], is_causal=False)
    (output.float() ** 2).sum().backward()
    (expected**2).sum().backward()
    assert torch.allclose(output.double(), expected, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16
    for ours, theirs in zip(given, exact, strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=0.02, atol=0.02)


def test_only_a_model_that_asks_for_it_attends_so(dtypes, tmp_path):
    model, other = (BertForMaskedLM(copy.deepcopy(SMALL["bert"])) for _ in range(2))
    take_short_sequences_in_float32(model)
    assert other.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert BertForMaskedLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    ids = torch.randint(1, 99, (2, 8))
    for training, expected in ((True, torch.bfloat16), (False, torch.float32)):  # in training, there is dropout
        dtypes.clear()
        model.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        assert dtypes == [expected] * 4


@pytest.mark.parametrize("family", SMALL)
def test_every_family_gives_the_same_either_way(family):
    torch.manual_seed(0)
    model = LanguageModel(auto_class(SMALL[family]).from_config(copy.deepcopy(SMALL[family])).eval())
    ids, attended = torch.randint(5, 99, (2, 9)), torch.arange(9) < torch.tensor([[9], [6]])
    for mask in (None, attended):
        expected = model.hidden(ids, mask)
        take_short_sequences_in_float32(model.model)
        torch.testing.assert_close(model.hidden(ids, mask), expected)
        model.model.set_attn_implementation("sdpa")
