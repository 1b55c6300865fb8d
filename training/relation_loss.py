"""MiniLMv2's loss (Wang et al., 2021, arXiv 2012.15828): the relations between the tokens of a sequence.

The queries of a layer, cut into relation heads, give a softmax of scaled products with one another for each head and
token: to which tokens this one is related. The student's should match the teacher's, and the same for keys and values.
Widths and numbers of attention heads of the two may differ, since both are cut into the same number of relation heads.

The maps of relations, 3 * n_heads * seq_length floats for each token of both models, are far larger than anything else
of a layer. They need not be kept for a backward pass, since the gradient is known in closed form: with x the vectors of
a head (seq_length, d), s = x x' / sqrt(d), p = softmax(s), and q the same of the teacher,

    KL(q || p), summed over tokens       d/ds = p - q = G        d/dx = (G + G') x / sqrt(d)

So a part of the heads at a time gives its share of loss and gradient, and its maps are overwritten by the next.

Dimensions: bs sequences, padded to seq_length; width of the vectors, dim in most models.
"""

from collections.abc import Sequence

import torch

from training.losses import at_least_float32

KINDS = ("queries", "keys", "values")
PAPERS_HEADS = 48  # of the paper's students of BERT-base
MAP_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 26}  # of the maps that are alive at once
# Added to the products of tokens that are not related, whose shares become 0. With -inf, the difference of two
# logarithms would be NaN; so it is finite, and times 0.
UNRELATED = -1e30


def usual_heads(widths: Sequence[int]) -> int:
    """As many relation heads as in the paper, or the next smaller number that divides all widths into 8 or more."""
    return next(n for n in range(PAPERS_HEADS, 0, -1) if n == 1 or all(w % n == 0 and w >= 8 * n for w in widths))


def relation_loss(
    s_vectors: Sequence[torch.Tensor],
    t_vectors: Sequence[torch.Tensor],
    n_heads: int,
    attended: torch.Tensor | None = None,
    causal: bool = False,
    map_entries: int | None = None,
) -> torch.Tensor:
    """KL from the student's relations to the teacher's: summed over the tokens and over queries, keys and values, a
    mean over heads.

    Args:
        s_vectors: the student's queries, keys and values, (bs, seq_length, width) each; widths may differ.
        t_vectors: the teacher's.
        n_heads: relation heads; divides all widths.
        attended: (bs, seq_length) bool, False for padding, which is not part of any relation; None: all.
        causal: a token is related only to itself and those before it.
        map_entries: floats of a map at once; None for what suits the device.

    Returns: scalar, float32 or float64, with its gradient by `s_vectors`; `backward` may be called on it once.
    """
    device = s_vectors[0].device.type
    map_entries = map_entries or MAP_ENTRIES.get(device, max(MAP_ENTRIES.values()))
    return _RelationLoss.apply(tuple(t_vectors), n_heads, attended, causal, map_entries, *s_vectors)


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t_vectors, n_heads, attended, causal, map_entries, *s_vectors):
        total, gradients = 0.0, []
        for s, t in zip(s_vectors, t_vectors, strict=True):
            kl, gradient = _loss_and_gradient(s.detach(), t, n_heads, attended, causal, map_entries)
            total += kl
            gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [s.dtype for s in s_vectors]
        return total.to(gradients[0].dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        scaled = ((grad * grad_loss).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *[None] * 5, *scaled


def _loss_and_gradient(
    s: torch.Tensor, t: torch.Tensor, n_heads: int, attended: torch.Tensor | None, causal: bool, map_entries: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries, keys or values: the loss, float64, and its gradient by `s`, (bs, seq_length, width) float32."""
    bs, seq_length, width = s.shape
    s, t = (_heads(x, n_heads, attended) for x in (s, t))  # (bs * n_heads, seq_length, width of a head)
    # What is added to products: by column at padding, (bs * n_heads, 1, seq_length), and at later tokens,
    # (1, seq_length, seq_length). Padded tokens need nothing: its vectors are 0, so both models agree there.
    padding = None if attended is None else (UNRELATED * ~attended).to(s.dtype).repeat_interleave(n_heads, 0)[:, None]
    later = (
        torch.full((1, seq_length, seq_length), UNRELATED, dtype=s.dtype, device=s.device).triu(1) if causal else None
    )
    gradient = torch.empty_like(s)
    loss = torch.zeros((), dtype=torch.float64, device=s.device)
    at_once = max(1, map_entries // seq_length**2)
    for part in (slice(start, start + at_once) for start in range(0, len(s), at_once)):
        unrelated = None if padding is None else padding[part]
        if causal:
            unrelated = later if unrelated is None else unrelated + later
        log_p, log_q = (_log_relations(x[part], unrelated) for x in (s, t))
        q = log_q.exp()
        log_q -= log_p
        loss += torch.dot(q.flatten(), log_q.flatten()) / n_heads
        p = log_p.exp_()
        p -= q
        torch.bmm(p, s[part], out=gradient[part]).baddbmm_(p.mT, s[part])
    gradient *= s.shape[-1] ** -0.25 / n_heads  # s holds the other half of 1 / sqrt(d)
    return loss, gradient.view(bs, n_heads, seq_length, -1).transpose(1, 2).reshape(bs, seq_length, width)


def _heads(x: torch.Tensor, n_heads: int, attended: torch.Tensor | None) -> torch.Tensor:
    """(bs, seq_length, width) -> (bs * n_heads, seq_length, d = width / n_heads), float32, 0 at padding, and divided by
    d ** 0.25: then the product of two is divided by sqrt(d)."""
    bs, seq_length, width = x.shape
    x = at_least_float32(x) * (width // n_heads) ** -0.25
    if attended is not None:
        x.masked_fill_(~attended[:, :, None], 0)
    return x.view(bs, seq_length, n_heads, -1).transpose(1, 2).flatten(0, 1).contiguous()


def _log_relations(x: torch.Tensor, unrelated: torch.Tensor | None) -> torch.Tensor:
    """(n, seq_length, d) -> (n, seq_length, seq_length), the logarithms of each row's relations."""
    products = torch.bmm(x, x.mT) if unrelated is None else torch.baddbmm(unrelated, x, x.mT)
    return torch.log_softmax(products, -1)
