"""The loss of relations and its gradients against the formula in float64."""

import pytest
import torch

from training.relation_loss import relation_loss, usual_heads

WIDTHS = ((12, 12, 12), (24, 24, 24)), ((12, 6, 6), (24, 24, 18))  # of student's and teacher's queries, keys, values
LENGTHS = (7, 4, 1)


def draw(widths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(LENGTHS), max(LENGTHS), width, generator=generator) * 2 for width in widths]


def formula(s_vectors, t_vectors, n_heads, causal, lengths=LENGTHS):
    """Sequence by sequence, without padding, as it is written in the paper."""
    loss = 0.0
    for s, t in zip(s_vectors, t_vectors, strict=True):
        for i, length in enumerate(lengths):
            maps = []
            for x in (s[i, :length], t[i, :length]):
                heads = torch.stack(x.chunk(n_heads, -1))  # (n_heads, length, d)
                scores = heads @ heads.mT / heads.shape[-1] ** 0.5
                if causal:
                    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e9)
                maps.append(scores.softmax(-1))
            p, q = maps
            loss = loss + torch.xlogy(q, q / p.clamp_min(1e-300)).sum() / n_heads
    return loss


@pytest.mark.parametrize("map_entries", [1, 150, None])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_value_and_gradient(widths, causal, map_entries):
    s, t = draw(widths[0], 1), draw(widths[1], 2)
    exact = [x.double().requires_grad_() for x in s]
    expected = formula(exact, [x.double() for x in t], 3, causal)
    (5 * expected).backward()

    attended = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    s = [x.requires_grad_() for x in s]
    loss = relation_loss(s, t, 3, attended, causal, map_entries)
    (5 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and expected > 1
    for ours, theirs in zip(s, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_without_padding():
    s, t = draw((12,) * 3, 1), draw((12,) * 3, 2)
    attended = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    assert relation_loss(s, t, 4) == relation_loss(s, t, 4, attended)
    assert relation_loss(s, s, 4) == 0


def test_gradients_come_in_the_dtype_of_the_vectors():
    s = [x.half().requires_grad_() for x in draw((12,) * 3, 1)]
    (relation_loss(s, draw((12,) * 3, 2), 2) * 1e-4).backward()  # as a mean over some thousand tokens, without scaling
    assert all(x.grad.dtype == torch.float16 and x.grad.abs().max() > 1e-6 for x in s)


def test_usual_heads():
    assert usual_heads((768,) * 6) == 48
    assert usual_heads((384, 384, 384, 768, 768, 768)) == 48
    assert usual_heads((1024,) * 3) == 32
    assert usual_heads((768, 256, 256)) == 32
    assert usual_heads((32, 48)) == 4
    assert usual_heads((7, 13)) == 1
