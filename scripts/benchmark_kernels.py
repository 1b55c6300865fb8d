"""Times the parts of a training step alone on a GPU: what bounds it, the vocabulary loss, and attention.

    python scripts/benchmark_kernels.py

benchmark_gpu.py runs these beside whole steps and writes the tables to a file. Sizes are those of a BERT-base with a
vocabulary of 30,522, in bfloat16; the values are random. --tiny runs everything in seconds, also on a CPU, to see that
it works.

Dimensions: n rows; bs sequences of seq_length tokens, n_tokens in all; n_heads heads of dim_head; voc_size; dim.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from models.memory import peak_memory
from models.packing import Packing, flash
from scripts.benchmark_launches import FULL, TINY, Setup
from scripts.benchmark_training import changed
from training import losses
from training.configurations import default_tokens_per_micro_batch
from training.distributed import now, single_process
from training.losses import ALIGNMENT, Projection
from training.recipe import Recipe
from utils import InputError, reason_of


def setup_for(tiny: bool) -> Setup:
    """On the GPU, or for a try on the CPU. Raises: InputError if there is no GPU and the sizes are not tiny."""
    world = single_process(None)
    if world.device.type == "cpu" and not tiny:
        raise InputError(
            "no GPU can be used here: --tiny tries every part on the CPU, and benchmark_gpu.py --count needs no GPU."
        )
    return Setup(TINY if tiny else FULL, world, default_tokens_per_micro_batch(world.device))


def milliseconds(setup: Setup, work: Callable[[], object]) -> float:
    """The median time of a call, after one that warms up."""
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=setup.size.seconds).median


def random_vectors(setup: Setup, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=setup.device, dtype=torch.bfloat16)


def forget_peak(device: torch.device) -> None:
    """Peak memory counts from here. (On a CPU it is that of the whole process.)"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def ceilings(setup: Setup) -> Iterator[str]:
    """What bounds everything else: products of the models' shapes, and copies."""
    n, dim = setup.size.tokens, setup.size.dim
    voc_size = -(-setup.size.voc_size // ALIGNMENT) * ALIGNMENT  # as the vocabulary loss pads it
    x = random_vectors(setup, n, dim)
    shapes = []
    for width in (dim, 4 * dim, voc_size):
        weight = random_vectors(setup, width, dim)
        shapes.append((f"{n:,} x {dim} by {width:,}", lambda weight=weight: F.linear(x, weight), width))
    grad = random_vectors(setup, n, voc_size)
    shapes.append(("gradient of the last by its rows", lambda: grad @ weight, voc_size))
    shapes.append(("gradient of the last by its matrix", lambda: grad.T @ x, voc_size))
    rows = []
    for title, product, width in shapes:
        ms = milliseconds(setup, product)
        rows.append([title, f"{ms:.3f}", f"{2 * n * dim * width / ms / 1e9:,.0f} TFLOP/s"])
    large = random_vectors(setup, n, 4 * voc_size)
    target = torch.empty_like(large)
    ms = milliseconds(setup, lambda: target.copy_(large))
    n_bytes = 2 * large.numel() * large.element_size()  # read and written
    rows.append([f"a copy of {n_bytes / 2e9:.1f} GB", f"{ms:.3f}", f"{n_bytes / ms / 1e9:.2f} TB/s"])
    yield utils.markdown_table(["ceiling", "ms", "rate"], rows)


def vocabulary(setup: Setup) -> Iterator[str]:
    """The vocabulary loss alone, with KL at all rows and labels at 15 % of them."""
    size, n = setup.size, setup.size.tokens
    linear = torch.nn.Linear(size.dim, size.voc_size, device=setup.device)
    projection = Projection.of(linear, torch.bfloat16)
    teachers = Projection.of(torch.nn.Linear(size.dim, size.voc_size, device=setup.device), torch.bfloat16)
    labels = torch.randint(size.voc_size, (int(0.15 * n),), device=setup.device)
    weights = {"ce": 5 / n, "mlm": 2 / len(labels)}
    s_rows, t_rows = random_vectors(setup, n, size.dim).requires_grad_(), random_vectors(setup, n, size.dim)

    def gradients(chunk_rows: int | None = None, n: int = n) -> tuple[torch.Tensor, torch.Tensor]:
        s_rows.grad = linear.weight.grad = linear.bias.grad = None
        some = (s_rows[:n], linear, projection, t_rows[:n], teachers, labels[:n], weights, Recipe.temperature)
        losses.vocabulary_loss(*some, chunk_rows)[0].backward()
        return s_rows.grad[:n], linear.weight.grad

    checked = min(n, 2048)  # float64 logits of all rows would not fit everywhere
    exact = exact_gradients(s_rows[:checked], projection, t_rows[:checked], teachers, labels[:checked], weights)

    def row(title: str, chunk_rows: int) -> list[str]:
        errors = [relative_error(*pair) for pair in zip(gradients(chunk_rows, checked), exact, strict=True)]
        forget_peak(setup.device)
        ms = milliseconds(setup, lambda: gradients(chunk_rows))
        gib = peak_memory(setup.device) / 2**30
        return [f"{title}{chunk_rows:,}", f"{ms:.2f}", f"{gib:.1f}", *(f"{error:.1e}" for error in errors)]

    header = [f"vocabulary loss, {n:,} rows", "ms", "GiB", "error by rows", "error by matrix"]
    chunks = (n // 16, n // 4, n)
    if losses.gradient_kernel(setup.device):
        yield utils.markdown_table(header, [row("one kernel, chunks of ", rows) for rows in chunks])
    with changed(losses, gradient_kernel=lambda device: None):
        yield utils.markdown_table(header, [row("without it, chunks of ", rows) for rows in chunks])
        with changed(losses, strip_gradient=torch.compile(strip_gradient_of_copies, dynamic=True)):
            yield utils.markdown_table(header, [row("compiled, chunks of ", rows) for rows in chunks[1:]])


def strip_gradient_of_copies(s, t, scratch, *more, plain=losses.strip_gradient):
    """What compiles: PyTorch 2.13 fails on logits that are overwritten. Compiling does away with the copies."""
    return plain(s.clone(), t.clone(), [part.clone() for part in scratch], *more)


def exact_gradients(s_rows, s_projection, t_rows, t_projection, labels, weights) -> list[torch.Tensor]:
    """In float64, of the weighted vocabulary loss by the rows and by the projection's matrix."""
    x = s_rows.detach().double().requires_grad_()
    matrix = s_projection.matrix[: s_projection.voc_size].double().requires_grad_()
    s = F.linear(x, matrix, s_projection.bias[: s_projection.voc_size].double())  # (n, voc_size)
    t = F.linear(t_rows.double(), *(part[: t_projection.voc_size].double() for part in t_projection[:2]))
    logs = [F.log_softmax(logits / Recipe.temperature, -1) for logits in (s, t)]
    kl = F.kl_div(*logs, reduction="sum", log_target=True) * Recipe.temperature**2
    loss = weights["ce"] * kl + weights["mlm"] * F.cross_entropy(s[: len(labels)], labels, reduction="sum")
    return list(torch.autograd.grad(loss, (x, matrix)))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def attention(setup: Setup) -> Iterator[str]:
    """Forward and backward passes of attention alone, with dropout, in every form that a layer could call."""
    rows, reasons = [], {}
    for seq_length in setup.size.lengths:
        forms, cells = attention_forms(setup, seq_length), []
        for name, form in forms.items():
            try:
                start = now(setup.device)
                back_and_forth(form)
                first = 1000 * (now(setup.device) - start)
                ms = milliseconds(setup, lambda form=form: back_and_forth(form))
                cells.append(f"{ms:.3f} ({first:,.0f})")
            except RuntimeError as error:  # this device has no such kernel
                reasons[name] = reason_of(error)
                cells.append("fails")
        rows.append([str(seq_length), *cells])
    yield utils.markdown_table([f"{setup.size.tokens:,} tokens, ms (first call) at length", *forms], rows)
    if reasons:
        yield "\n".join(f"{name} fails: {reason}" for name, reason in reasons.items())


def attention_forms(setup: Setup, seq_length: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Sequences of almost the same length, padded or packed."""
    size, dropout = setup.size, setup.size.attention_dropout
    bs, n_heads, dim_head = size.tokens // seq_length, size.heads, size.dim // size.heads
    lengths = torch.randint(seq_length - 7, seq_length + 1, (bs,), device=setup.device)
    mask = (torch.arange(seq_length, device=setup.device) < lengths[:, None])[:, None, None]  # (bs, 1, 1, seq_length)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()  # (bs + 1,)
    padded = [random_vectors(setup, bs, n_heads, seq_length, dim_head).requires_grad_() for _ in range(3)]
    flat = [random_vectors(setup, int(ends[-1]), n_heads, dim_head).requires_grad_() for _ in range(3)]
    return {
        "with a mask": lambda: F.scaled_dot_product_attention(*padded, mask, dropout),
        "without": lambda: F.scaled_dot_product_attention(*padded, None, dropout),
        "packed": lambda: flash(*flat, Packing(None, ends, seq_length), dropout, None),
        "cuDNN": lambda: cudnn_attention(*padded, dropout),
    }


def cudnn_attention(query, key, value, dropout: float) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, None, dropout)


def back_and_forth(form: Callable[[], torch.Tensor]) -> None:
    output = form()
    output.backward(torch.ones_like(output))


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small size, to try it, also on a CPU")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    setup = setup_for(args.tiny)
    for part in (ceilings, vocabulary, attention):
        for section in part(setup):
            print(f"{section}\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
