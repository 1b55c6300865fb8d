"""The kernel of the vocabulary loss, which runs on GPUs: its values in Triton's interpreter, which needs none, and
whether the compiler takes it. `bash scripts/test.sh --clients`."""

import os
import subprocess
import sys

import pytest
import torch
from workspace import ROOT

pytest.importorskip("triton")  # it exists for Linux only

from training import losses
from training.losses import Projection, chunk_gradient, vocabulary_loss
from training.vocabulary_kernel import fused_gradient

TEMPERATURE = 2.0
WEIGHTS = [{"ce": 5.0, "mlm": 2.0}, {"ce": 1.0, "mse": 0.3, "clm": 1.0}, {"mlm": 1.0}, {"mse": 1.0}]
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from training.vocabulary_kernel import COLUMNS, _row_gradient

counts = ["n_rows", "n_labels", "voc_size", "voc_padded"]
numbers = ["ce", "mse", "of_label", "temperature"]
flags = ["HAS_CE", "HAS_MSE", "HAS_LABELS", "COLUMNS"]
for dtype in ("bf16", "fp32"):
    types = {"s_logits": "*" + dtype, "t_logits": "*" + dtype, "labels": "*i64", "losses": "*fp32"}
    types |= dict.fromkeys(counts, "i32") | dict.fromkeys(numbers, "fp32") | dict.fromkeys(flags, "constexpr")
    for given in ((True, True, True), (False, False, True), (True, False, False)):
        constants = dict(zip(flags, (*given, COLUMNS), strict=True))
        source = ASTSource(fn=_row_gradient, signature=types, constexprs=constants)
        for capability in (80, 90):
            kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            print(len(kernel.asm["cubin"]))
"""


def logits(n: int, voc_size: int, generator: torch.Generator) -> torch.Tensor:
    """As the padded projection makes them."""
    found = 4 * torch.randn(n, -(-voc_size // 16) * 16, generator=generator)
    found[:, voc_size:] = -torch.inf
    return found


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("n_labels", [0, 2, 5])
@pytest.mark.parametrize("voc_size", [997, 3000])  # less than what a program holds at a time, and more
@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])  # the interpreter truncates
def test_the_kernel_computes_what_the_plain_form_does(weights, n_labels, voc_size, dtype, error):
    generator = torch.Generator().manual_seed(0)
    s, t = (logits(5, voc_size, generator).to(dtype) for _ in range(2))
    labels = torch.randint(voc_size, (n_labels,), generator=generator)
    exact = s.double()
    expected_parts, expected_bias = chunk_gradient(exact, t.double(), labels, weights, TEMPERATURE, voc_size)
    parts, of_bias = fused_gradient(s, t, labels, weights, TEMPERATURE, voc_size)
    assert s.dtype == dtype
    for found, expected in ((s, exact), (of_bias, expected_bias)):
        largest = expected.abs().max().clamp_min(1e-9)
        assert ((found.double() - expected).abs().max() / largest).item() < error
    torch.testing.assert_close(parts, expected_parts, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_the_loss_takes_the_kernel_in_place_of_the_plain_form(chunk_rows, monkeypatch):
    torch.manual_seed(0)
    s_linear, t_linear = torch.nn.Linear(16, 500), torch.nn.Linear(24, 500)
    projections = [Projection.of(linear, torch.bfloat16) for linear in (s_linear, t_linear)]
    s_rows, t_rows, labels = torch.randn(20, 16, requires_grad=True), torch.randn(20, 24), torch.randint(500, (9,))
    found = []
    for kernel in (None, fused_gradient):
        monkeypatch.setattr(losses, "gradient_kernel", lambda device, kernel=kernel: kernel)
        s_rows.grad = s_linear.weight.grad = s_linear.bias.grad = None
        loss, parts = vocabulary_loss(
            s_rows, s_linear, projections[0], t_rows, projections[1], labels, {"ce": 1e-6, "mlm": 2e-6}, 2.0, chunk_rows
        )
        loss.backward()
        found.append([loss.double(), *parts, s_rows.grad, s_linear.weight.grad, s_linear.bias.grad])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0.01, atol=0.01 * plain.abs().max().item())
        assert plain.abs().max() > 0


def test_the_compiler_takes_the_kernel(tmp_path):
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, script], env=environment, timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len([size for size in done.stdout.split() if int(size) > 10_000]) == 12
