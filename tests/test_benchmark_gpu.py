"""The benchmark of GPUs: every part on the CPU at a tiny size, so that it runs the first time on a GPU; and what it
counts without one, against figures known otherwise."""

import time
from dataclasses import replace

import benchmark_gpu
import benchmark_kernels
import pytest
import torch
from benchmark_gpu import kernels_of
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from workspace import run

from scripts import benchmark_launches
from scripts.benchmark_launches import TINY, Counter, Setup, as_on_a_gpu, class_of
from training.distributed import World

CPU = World(torch.device("cpu"))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Wherever the tests run. Compiling would take most of the time; test_train.py has it."""
    monkeypatch.setattr(benchmark_kernels, "single_process", lambda _: CPU)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def table_rows(text):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---")}


def test_every_part_works(tmp_path, capsys, monkeypatch):
    known = []

    def profiled_once(*arguments):  # PyTorch's profiler takes a second and a half
        known.append(known[0] if known else kernels_of(*arguments))
        return known[0]

    monkeypatch.setattr(benchmark_gpu, "kernels_of", profiled_once)
    run(benchmark_gpu, "--tiny", "--output", tmp_path / "new" / "card.md")
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "card.md").read_text() == printed.rstrip("\n") + "\n"
    assert printed.startswith("# CPU") and f"PyTorch {torch.__version__}" in printed
    assert "failed" not in printed
    rows = table_rows(printed)
    assert float(rows["gradient of the last by its matrix"][0]) > 0
    for step in ("as typed", "as typed, padded, price 0", "--tokens_per_batch 256", "as typed, compiled"):
        micro_batches, tokens, ms, *_, launches, rate, _mfu, _gib = rows[step][:10]
        assert float(micro_batches) >= 1 and float(launches.replace(",", "")) > 100
        assert float(rate.replace(",", "")) == pytest.approx(
            1000 * float(tokens.replace(",", "")) / float(ms), rel=0.01
        )
    assert rows["as typed, compiled"][-2:] == ["0", "0"]  # graphs
    for chunks in ("without it, chunks of 16", "compiled, chunks of 256"):
        assert all(float(error) < 0.01 for error in rows[chunks][-2:])
    assert rows["embeddings.word_embeddings"][0] == rows["embeddings.word_embeddings"][1]  # a CPU repeats itself


def test_compiled_graphs_are_counted(monkeypatch):
    monkeypatch.undo()
    counters.clear()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    for length in (3, 4, 3):
        compiled(torch.ones(length))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_part_that_fails_says_so_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    def broken(setup):
        yield "before"
        raise RuntimeError("no kernel\nfor this")

    def endless(setup):
        while True:
            time.sleep(0.01)
        yield

    parts = {"broken": (broken, 5), "endless": (endless, 0.2), "good": (lambda setup: iter(["good works"]), 5)}
    for part, _ in parts.values():
        part.__doc__ = "A part."
    monkeypatch.setattr(benchmark_gpu, "PARTS", parts)
    run(benchmark_gpu, "--tiny", "--output", tmp_path / "card.md", expect=1)
    printed = capsys.readouterr()
    assert (tmp_path / "card.md").read_text().splitlines()[4:] == [
        "before", "", "broken failed: RuntimeError, no kernel for this", "",
        "endless failed: OutOfTime, longer than 0.2 s", "", "good works",
    ]  # fmt: skip
    assert printed.err.splitlines()[-1] == f"error: {tmp_path}/card.md lacks what failed: broken, endless."


def test_without_a_gpu_the_way_out_is_named(capsys):
    run(benchmark_gpu, expect=2)
    assert "--tiny" in (error := capsys.readouterr().err) and "--count" in error
    run(benchmark_kernels, expect=2)


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "product"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "product"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_dropout_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass>", "attention"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "cast"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>", "cast"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "norm"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForwardGmem<8, float>", "softmax"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reduction"),
        ("triton_per_fused__to_copy_native_layer_norm_5", "norm"),
        ("triton_poi_fused_gelu_1", "elementwise"),
        ("Memset (Device)", "rest"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert class_of(kernel) == kind


# ------------------------------------------------------------------------------------------------------------- counting


def test_what_is_counted_of_a_product_by_hand():
    n, width, out = 32, 16, 48
    with FakeTensorMode():
        x, weight = torch.randn(n, width), torch.randn(out, width, requires_grad=True)
        with Counter() as counter, torch.autocast("cpu", torch.bfloat16):
            torch.nn.functional.linear(x, weight).sum().backward()
    assert counter.flops["product"] == 2 * 2 * n * width * out  # forward, and the gradient of the weight
    product = 2 * (n * width + width * out + n * out)  # bytes in bfloat16: read and written
    gradient = product - 2 * n * out + 2  # what comes from a sum is one number, expanded
    assert counter.read_or_written["product"] == product + gradient
    to_bfloat16 = 6 * (n * width + width * out)
    to_float32 = 6 * width * out  # the gradient of the weight
    assert counter.read_or_written["cast"] >= to_bfloat16 + to_float32
    assert counter.launches["product"] == 2


def test_a_counted_step_does_the_work_that_the_mfu_counts():
    """Padding makes it more."""
    setup = Setup(TINY, CPU, benchmark_launches.H100_TOKENS)
    counter, (micro_batches, counts) = benchmark_launches.count_step(setup, setup.large)
    work = setup.distiller(setup.large).objective.work.flops(counts)
    positions = sum(batch.input_ids.numel() for batch in micro_batches)
    assert work <= sum(counter.flops.values()) <= 1.2 * work * positions / counts.tokens
    assert len(micro_batches) == 1


def test_masked_steps_count_less():
    setup = Setup(TINY, CPU, benchmark_launches.H100_TOKENS)
    whole, masked = (
        benchmark_launches.count_step(setup, replace(setup.typed, restrict_ce_to_mask=restricted))[0]
        for restricted in (False, True)
    )
    assert masked.read_or_written["softmax"] < 0.3 * whole.read_or_written["softmax"]
    assert masked.launches["attention"] == whole.launches["attention"]


def test_counting_leaves_pytorch_as_it_was():
    before = torch.nn.functional.layer_norm, torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), as_on_a_gpu():
        1 / 0  # noqa: B018
    assert before == (torch.nn.functional.layer_norm, torch.nn.functional.scaled_dot_product_attention)


def test_both_commands_print_what_is_counted(capsys):
    run(benchmark_gpu, "--count", "--tiny")
    counted = capsys.readouterr().out
    run(benchmark_launches, "--tiny")
    assert capsys.readouterr().out == counted
    assert (
        counted.startswith("The recipe as typed:")
        and counted.count("The same, padded:") == 2
        and "With --alpha_relation 1:" in counted
        and "One large micro-batch:" in counted
    )
    launches = [int(row.split("|")[2].replace(",", "")) for row in counted.splitlines() if row.startswith("| the step")]
    free, padded, free_related, padded_related, large = launches
    assert padded >= free and padded >= large > 100
    assert padded_related > padded and free_related > free
