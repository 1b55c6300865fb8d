"""Counts the kernel launches, the memory traffic and the matrix work of a training step on a GPU, without one.

    python scripts/benchmark_launches.py

A step of train.py runs on fake tensors, which have shapes and no values, under the rules that autocast has on a GPU.
Each operation of PyTorch counts as one launch, and as the bytes that it reads and writes. The milliseconds are those
bytes over the bandwidth of an H100, and the work of the products over the rate that it reaches. benchmark_gpu.py
measures the same classes on a GPU.

Dimensions: bs sequences of seq_length tokens; n_heads heads of dim_head.
"""

import argparse
import contextlib
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from distiller import Distiller
from grouped_batch_sampler import GroupedBatchSampler
from models import packing
from models.families import FAMILIES
from models.language_model import LanguageModel, freeze
from models.packing import kernel_fault
from models.student import build_student, half_depth_config
from scripts.benchmark_training import PAD, Case, build_teacher, changed, draw_sequences, masking_of
from training import losses, relation_loss
from training.batches import MICRO_BATCH_PRICE, MicroBatch, Padding, RunData, StepCounts
from training.distributed import World
from training.recipe import Recipe

BANDWIDTH = 2.8e12  # bytes/s of an H100, for large tensors
PRODUCTS = 600e12  # FLOP/s of its bfloat16 products of these shapes
H100_TOKENS = 20378  # the micro-batch that train.py chooses for its 80 GB


# ---------------------------------------------------------------------------------------------------- the steps to take


@dataclass(frozen=True)
class Size:
    """How large the models and steps are.

    Attributes:
        batches: of 5 sequences, in a step of the recipe.
        tokens: of a batch with --tokens_per_batch, and rows where one part is timed alone.
        lengths: of the sequences that attention alone is timed with.
        n_sequences: that batches are drawn from.
        n_steps: that are timed and profiled.
        rounds: how often they are timed.
        seconds: how long one part alone is repeated.
        attention_dropout: of both models.
    """

    layers: int
    dim: int
    heads: int
    voc_size: int
    batches: int
    tokens: int
    lengths: tuple[int, ...]
    n_sequences: int
    n_steps: int
    rounds: int
    seconds: float
    attention_dropout: float = 0.1


FULL = Size(12, 768, 12, 30522, 50, 16384, (64, 128, 256, 512), 6000, 3, 5, 0.3)
TINY = Size(2, 16, 1, 1024, 2, 256, (16, 32), 24, 1, 1, 0.01)


class Setup:
    """Builds the Distiller of train.py for a recipe, on random text and with random weights.

    Args:
        tokens_per_micro_batch: see `Recipe`.
        dtype: what to compute in.

    Attributes:
        typed: the recipe as people type it.
        large: the same with one large batch a step.
        price: of a micro-batch, in positions (see `training.batches.Padding`).
    """

    price = MICRO_BATCH_PRICE["cuda"]

    def __init__(
        self, size: Size, world: World, tokens_per_micro_batch: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.size, self.world, self.device, self.dtype = size, world, world.device, dtype
        self.sequences = draw_sequences(size.n_sequences, np.random.default_rng(0), size.voc_size)
        self.typed = Recipe(
            gradient_accumulation_steps=size.batches,
            tokens_per_micro_batch=tokens_per_micro_batch,
            padding_free=self.device.type == "cuda"
            and kernel_fault(self.device, dtype, size.dim // size.heads) is None,
        )
        self.large = replace(self.typed, tokens_per_batch=size.tokens, gradient_accumulation_steps=1)

    def distiller(self, recipe: Recipe) -> Distiller:
        """The same weights every time."""
        size, lengths = self.size, np.array([len(sequence) for sequence in self.sequences])
        by_tokens = recipe.tokens_per_batch
        sampler = GroupedBatchSampler(lengths, None if by_tokens else recipe.batch_size, by_tokens)
        padding = Padding(PAD, None, self.price, recipe.padding_free, recipe.compares_sequences)
        data = RunData(self.sequences, sampler, masking_of(size.voc_size), padding, {})
        case = Case("", size.layers, size.dim, recipe.batch_size, size.batches, grouped=True)
        attention = {"num_attention_heads": size.heads, "attention_probs_dropout_prob": size.attention_dropout}
        teacher = build_teacher(case, self.device, size.voc_size, **attention)
        with self.device:
            student = build_student(half_depth_config(teacher.config), None)
        freeze(student, FAMILIES["distilbert"].positions)
        models = LanguageModel(student), LanguageModel(teacher)
        return Distiller(recipe, *models, data, self.world, self.dtype, None)


Step = tuple[list[MicroBatch], StepCounts]


def steps_of(distiller: Distiller, n: int) -> list[Step]:
    """The first steps of an epoch, as train.py loads them."""
    return list(itertools.islice(distiller.steps(), n))


# ------------------------------------------------------------------------------------------------------------- counting

# What a kernel or an operation does, judged by its name; the first match counts.
CLASSES = {
    "attention": r"flash|fmha|scaled_dot_product|attention",
    "softmax": r"softmax",
    "norm": r"layer_?norm|gammabeta",
    "product": r"gemm|cutlass|cublas|nvjet|xmma|splitk|\b(?:add|b)?mm\b|\blinear\b",
    "cast": r"copy_kernel|\b_?to_copy\b|\bcopy_\b|\bclone\b",
    "reduction": r"reduce_kernel|\b(?:sum|amax|vecdot|norm|linalg_vector_norm)\b",
    "elementwise": r"elementwise|triton_|dropout",
}


def class_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name.lower())), "rest")


class Counter(TorchDispatchMode):
    """Counts operations on fake tensors by class: `launches`, `read_or_written` bytes, and `flops` of products."""

    WITHOUT_KERNEL = re.compile(r"empty|_unsafe_view|lift_fresh|detach")
    ONLY_WRITES = re.compile(r"zero|ones|full|fill")
    READS_WHAT_IT_WRITES = re.compile(r"index|embedding$|gather")

    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[str, int] = defaultdict(int)
        self.read_or_written: dict[str, int] = defaultdict(int)
        self.flops: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs = _fake_tensors([args, {key: value for key, value in kwargs.items() if key != "out"}])
        outputs = _fake_tensors(result) or inputs  # what works on lists in place returns nothing
        no_kernel = func.namespace not in ("aten", "benchmark") or func.is_view or self.WITHOUT_KERNEL.search(name)
        if no_kernel or not outputs:
            return result
        kind = class_of(name)
        if kind == "rest" and torch.Tag.pointwise in func.tags:
            kind = "elementwise"
        self.launches[kind] += 1
        self.read_or_written[kind] += self._bytes(name, inputs, outputs)
        if flops := flop_registry.get(func._overloadpacket):
            with unset_fake_temporarily():  # packed attention reads the lengths of the sequences, which are real
                self.flops[kind] += flops(*args, **kwargs, out_val=result)
        return result

    def _bytes(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
        written = sum(map(_size, outputs))
        if self.ONLY_WRITES.search(name):
            return written
        if name == "vocabulary_softmax":  # reads both twice, and writes over the first
            return sum(2 * _size(logits) for logits in inputs) + _size(inputs[0])
        if name == "copy_":
            return _size(inputs[1]) + written
        if self.READS_WHAT_IT_WRITES.search(name):
            return 2 * written + sum(map(_size, inputs[1:]))
        return sum(map(_size, inputs)) + written


def _fake_tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, FakeTensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes in memory: what is only expanded counts once."""
    lengths = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return int(np.prod([*lengths, tensor.element_size()], dtype=np.int64))


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Where operations on a CPU differ from those on a GPU, those of the GPU: norms compute in float32 under autocast,
    attention with a mask takes the memory-efficient kernel and without one the flash kernel, dropout is one kernel,
    gradients are clipped together, chunks of logits are large, and one kernel makes their gradient."""
    norm, clip = torch.nn.functional.layer_norm, torch.nn.utils.clip_grad_norm_
    dropout = lambda x, p, training, *_: torch.native_dropout(x, p, True)[0] if training and p else x  # noqa: E731
    with (
        mock.patch("torch.nn.functional.dropout", dropout),
        mock.patch("torch.nn.functional.layer_norm", lambda x, *more, **options: norm(x.float(), *more, **options)),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attend),
        mock.patch("torch.nn.utils.clip_grad_norm_", lambda *given: clip(*given, foreach=True)),
        changed(packing, one_by_one=packing.flash),
        changed(relation_loss, MAP_ENTRIES={"cpu": relation_loss.MAP_ENTRIES["cuda"]}),
        changed(
            losses,
            CHUNK_BYTES={"cpu": losses.CHUNK_BYTES["cuda"]},
            STRIP_LOGITS={"cpu": losses.STRIP_LOGITS["cuda"]},
            gradient_kernel=lambda device: fused_gradient,
        ),
    ):
        yield


def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> torch.Tensor:
    """The kernels that PyTorch chooses on a GPU.

    Args:
        query, key, value: (bs, n_heads, seq_length, dim_head).
        attn_mask: (bs, 1, 1 or seq_length, seq_length), added to the scores; in half precision under autocast.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        vectors = [part.to(dtype) for part in (query, key, value)]
        if attn_mask is None:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*vectors, dropout_p, is_causal, False, scale=scale)[0]
        shape = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output = efficient(
            *vectors, attn_mask.expand(shape), torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )
        return output[0]


@torch.library.custom_op("benchmark::vocabulary_softmax", mutates_args=("s",))
def vocabulary_softmax(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Stands for the kernel of `training.vocabulary_kernel`, to be counted."""
    raise NotImplementedError


@vocabulary_softmax.register_fake
def _(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return s.new_empty(3, len(s), dtype=torch.float32)


def fused_gradient(s, t, labels, weights, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """As `training.vocabulary_kernel.fused_gradient`, without values."""
    return vocabulary_softmax(s, t).double().sum(1)[: len(weights)], s.sum(0, dtype=torch.float32)


def count_step(setup: Setup, recipe: Recipe) -> tuple[Counter, Step]:
    """What the second step of a run does (the first also creates the optimizer's state), and that step."""
    counter = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        distiller = setup.distiller(recipe)
    first, second = steps_of(distiller, 2)  # masks are drawn in real arrays
    with as_on_a_gpu(), fake:
        distiller.step(*first)
        with counter:
            distiller.step(*second)
    return counter, second


def report(size: Size) -> str:
    """Tables for the recipe as typed, with relations, both without padding and with it, and for a large micro-batch."""
    setup = Setup(size, World(torch.device("cpu")), H100_TOKENS)
    parts, free, relations = [], {"padding_free": True}, {"alpha_relation": 1.0}
    for title, recipe in (
        ("The recipe as typed", replace(setup.typed, **free)),
        ("The same, padded", setup.typed),
        ("With --alpha_relation 1", replace(setup.typed, **free, **relations)),
        ("The same, padded", replace(setup.typed, **relations)),
        ("One large micro-batch", replace(setup.large, **free)),
    ):
        counter, (micro_batches, counts) = count_step(setup, recipe)
        n = len(micro_batches)
        parts.append(f"{title}: {counts.tokens:,.0f} tokens, micro-batches: {n}\n\n{table(counter)}")
    return "\n\n".join(parts)


def table(counter: Counter) -> str:
    rows, total = [], np.zeros(4)
    for kind in [*CLASSES, "rest"]:
        n_bytes, flops = counter.read_or_written[kind], counter.flops[kind]
        ms = 1000 * max(n_bytes / BANDWIDTH, flops / PRODUCTS)
        amounts = np.array([counter.launches[kind], n_bytes / 1e9, flops / 1e12, ms])
        total += amounts
        rows.append([kind, *cells(*amounts)])
    rows.append(["the step", *cells(*total)])
    return utils.markdown_table(["class", "launches", "GB", "TFLOP", "ms"], rows)


def cells(launches: float, gigabytes: float, teraflop: float, ms: float) -> list[str]:
    return [f"{launches:,.0f}", f"{gigabytes:.2f}", f"{teraflop:.2f}", f"{ms:.2f}"]


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="small models and steps, to see that it works")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    print(report(TINY if args.tiny else FULL))


if __name__ == "__main__":
    raise SystemExit(main())
