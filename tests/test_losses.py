"""The chunked loss and its gradients against the formula in float64, and what it may hold in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from training.losses import Projection, usual_chunk, usual_strip, vocabulary_loss

N, DIM, T_DIM = 70, 24, 32


def formula(x, s_linear, t_rows, t_linear, labels, weights, temperature):
    """What each term adds to the loss, as it is written in a paper."""
    s, t = s_linear(x), t_linear(t_rows)
    p_t = (t / temperature).softmax(-1)
    kl = (p_t * (p_t.log() - (s / temperature).softmax(-1).log())).sum() * temperature**2
    of_labels = F.cross_entropy(s[: len(labels)], labels, reduction="sum")
    sums = {"ce": kl, "mse": ((s - t) ** 2).sum(), "mlm": of_labels, "clm": of_labels}
    parts = torch.stack([weight * sums[term] for term, weight in weights.items()])
    return parts.sum(), parts.tolist()


def make(voc_size, n_labels, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    s_linear, t_linear = nn.Linear(DIM, voc_size, bias=bias), nn.Linear(T_DIM, voc_size, bias=bias)
    for linear in (s_linear, t_linear):
        linear.weight.data = draw(*linear.weight.shape) * 0.4
        if bias:
            linear.bias.data = draw(voc_size)
    labels = torch.randint(voc_size, (n_labels,), generator=generator)
    return draw(N, DIM).requires_grad_(), s_linear, draw(N, T_DIM), t_linear, labels


def gradients(loss, x, linear):
    loss.backward()
    found = [x.grad, linear.weight.grad, *([] if linear.bias is None else [linear.bias.grad])]
    x.grad, linear.weight.grad = None, None
    if linear.bias is not None:
        linear.bias.grad = None
    return found


def exact(x, s_linear, t_rows, t_linear, labels, weights, temperature):
    x64, s64, t64 = x.detach().double().requires_grad_(), in_double(s_linear), in_double(t_linear)
    loss, parts = formula(x64, s64, t_rows.double(), t64, labels, weights, temperature)
    return loss.item(), parts, gradients(loss, x64, s64)


def in_double(linear):
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=torch.float64)
    copy.load_state_dict(linear.state_dict())
    return copy


def ours(x, s_linear, t_rows, t_linear, labels, weights, temperature, dtype, chunk_rows):
    s_projection, t_projection = Projection.of(s_linear, dtype), Projection.of(t_linear, dtype)
    if not {"ce", "mse"} & set(weights):
        t_rows = t_projection = None
    loss, parts = vocabulary_loss(
        x, s_linear, s_projection, t_rows, t_projection, labels, weights, temperature, chunk_rows
    )
    return loss.item(), parts.tolist(), gradients(loss, x, s_linear)


def error(found, true):
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("voc_size", [97, 104])  # a multiple of 8, and not
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "weights, n_labels",
    [
        ({"ce": 0.07}, 11),
        ({"mse": 0.002}, 11),
        ({"mlm": 0.2}, N),
        ({"ce": 0.07, "mlm": 0.2}, 11),
        ({"ce": 0.07, "mse": 0.002, "mlm": 0.2}, N),
        ({"ce": 0.07, "mse": 0.002, "mlm": 0.2}, 0),
        ({"mse": 0.002, "clm": 0.2}, 33),
    ],
)
def test_it_equals_the_formula(voc_size, bias, weights, n_labels):
    given = make(voc_size, n_labels, bias)
    for temperature, chunk_rows in ((1.0, 16), (2.0, 32), (3.5, 1000)):
        true_loss, true_parts, true_gradients = exact(*given, weights, temperature)
        loss, parts, found = ours(*given, weights, temperature, torch.float32, chunk_rows)
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert parts == pytest.approx(true_parts, rel=1e-5)
        assert all(error(a, b) < 1e-5 for a, b in zip(found, true_gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_autocast(dtype):
    weights = {"ce": 5 / N, "mse": 0.01 / N, "mlm": 2 / 11}
    for seed in range(3):
        given = x, s_linear, t_rows, t_linear, labels = make(2003, 11, seed=seed)
        true_loss, _, true_gradients = exact(*given, weights, 2.0)
        with torch.autocast("cpu", dtype):
            s, t = s_linear(x), t_linear(t_rows).detach()
        s, t = s.float(), t.float()
        loss = (
            weights["ce"]
            * 4
            * F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="sum", log_target=True)
        )
        loss = loss + weights["mse"] * F.mse_loss(s, t, reduction="sum")
        loss = loss + weights["mlm"] * F.cross_entropy(s[:11], labels, reduction="sum")
        autocast_loss = loss.item()
        autocast = gradients(loss, x, s_linear)
        loss, _, found = ours(*given, weights, 2.0, dtype, 16)
        assert abs(loss - true_loss) < 1.1 * abs(autocast_loss - true_loss) + 1e-5 * true_loss
        for a, plain, true in zip(found, autocast, true_gradients, strict=True):
            assert error(a, true) < 1.1 * error(plain, true)


def test_the_gradient_is_that_of_the_weighted_loss():
    """What comes after, such as a float16 scaler, multiplies the loss: so must the gradients be."""
    given = x, s_linear, t_rows, t_linear, labels = make(97, 11)
    weights = {"ce": 0.07, "mlm": 0.2}
    _, _, once = ours(*given, weights, 2.0, torch.float32, 16)
    loss, _ = vocabulary_loss(
        x, s_linear, Projection.of(s_linear, torch.float32), t_rows, Projection.of(t_linear, torch.float32), labels,
        weights, 2.0, 16,
    )  # fmt: skip
    for a, b in zip(gradients(1024 * loss, x, s_linear), once, strict=True):
        torch.testing.assert_close(a, 1024 * b)


class LargestTensor(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_nothing_of_tokens_by_vocabulary_is_ever_alive():
    voc_size, chunk_rows = 2000, 4
    given = make(voc_size, 11)
    with LargestTensor() as largest:
        ours(*given, {"ce": 0.07, "mse": 0.002, "mlm": 0.2}, 2.0, torch.float32, chunk_rows)
    assert largest.entries < N * voc_size
    assert largest.entries <= max(4 * chunk_rows, T_DIM) * voc_size  # the scratch space; the projection itself


def test_a_gpu_takes_fewer_rows_of_a_large_vocabulary_at_once():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for rows, bert, large in ((usual_chunk, 17_586, 2_147), (lambda *given: usual_strip(*given[:2]), 4_396, 536)):
        assert rows(gpu, 30_528, torch.bfloat16) == bert
        assert rows(gpu, 250_008, torch.bfloat16) == large
        assert rows(gpu, 1 << 40, torch.bfloat16) == 1
    assert [usual_chunk(cpu, 30_528, dtype) for dtype in (torch.float32, torch.bfloat16)] == [274, 549]


def test_on_a_cpu_each_thread_has_a_strip_of_logits_that_fits_into_its_cache():
    assert usual_strip(torch.device("cpu"), 30_528) == 8 * torch.get_num_threads()
    assert usual_strip(torch.device("cpu"), 1 << 40) == torch.get_num_threads()
