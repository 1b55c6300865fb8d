"""Times steps of train.py on a CPU that multiplies bfloat16, with attention in float32 and in bfloat16.

    python scripts/benchmark_attention.py

train.py computes the attention of short sequences in float32 there (training/attention.py says why). Both ways take
the same steps, with KL at all tokens and at masked ones; the first time also warms up. Attention alone is timed by
length. The models are a BERT and its student with random weights; sequence lengths are drawn like Wikipedia's.
(benchmark_kernels.py times attention on a GPU. A CPU without bfloat16 trains in float32, where both ways are the same.)

Dimensions: bs sequences of seq_length tokens, n_heads heads.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from models.attention import attend_on_cpu
from scripts.benchmark_gpu import take_steps
from scripts.benchmark_launches import FULL, Setup, steps_of
from training.configurations import default_tokens_per_micro_batch
from training.distributed import describe_device, single_process
from utils import InputError, integer, real

WAYS = {"float32": attend_on_cpu, "bfloat16": sdpa_attention_forward}
TIMES = (("float32", 1), ("bfloat16", 1), ("float32", 2), ("bfloat16", 2), ("float32", 3))
LENGTHS, TOKENS = (16, 32, 64, 128, 256, 512), 4096  # of attention alone


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--layers", type=integer(2, 100), default=12, help="of the teacher (%(default)s)")
    parser.add_argument("--dim", type=integer(12, 12288), default=384, help="(%(default)s)")
    parser.add_argument("--heads", type=integer(1, 192), default=12, help="(%(default)s)")
    parser.add_argument("--tokens_per_batch", type=integer(512, 1 << 20), default=4096, help="(%(default)s)")
    parser.add_argument("--steps", type=integer(1, 100), default=4, help="of each way (%(default)s)")
    parser.add_argument("--attention_dropout", type=real(0, 0.99), default=0.0, help="(%(default)s)")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if args.dim % args.heads:
        raise InputError(
            f"--dim {args.dim} can't be divided among {args.heads} heads; give a multiple of {args.heads}."
        )
    world = single_process(0)
    size = replace(
        FULL, layers=args.layers, dim=args.dim, heads=args.heads, tokens=args.tokens_per_batch,
        attention_dropout=args.attention_dropout,
    )  # fmt: skip
    setup = Setup(size, world, default_tokens_per_micro_batch(world.device))
    print(f"{describe_device(world.device)}, PyTorch {torch.__version__}\n\n{steps_table(setup, args.steps)}\n")
    print(alone_table(args.dim, args.heads))


def steps_table(setup: Setup, n_steps: int) -> str:
    rows = []
    for where, restricted in (("all tokens", False), ("masked tokens", True)):
        distiller = setup.distiller(replace(setup.large, restrict_ce_to_mask=restricted))
        steps = steps_of(distiller, n_steps)
        tokens = sum(counts.tokens for _, counts in steps)
        for way, which_time in TIMES:
            AttentionInterface.register("sdpa", WAYS[way])
            seconds = take_steps(distiller, steps)
            per_step, rate = f"{1000 * seconds / n_steps:,.1f}", f"{tokens / seconds:,.0f}"
            rows.append([where, way, str(which_time), per_step, rate])
    return utils.markdown_table(["KL at", "attention", "time", "ms a step", "tokens/s"], rows)


def alone_table(dim: int, heads: int) -> str:
    dtypes = torch.float32, torch.bfloat16
    rows = [
        [str(length), *(f"{attention_time(length, dim, heads, dtype):.1f}" for dtype in dtypes)] for length in LENGTHS
    ]
    table = utils.markdown_table(["tokens a sequence", "float32, ms", "bfloat16, ms"], rows)
    return f"attention alone, {heads} heads of {dim // heads}, {TOKENS:,} tokens, forward and backward\n\n{table}"


def attention_time(seq_length: int, dim: int, heads: int, dtype: torch.dtype) -> float:
    """Milliseconds of a forward and a backward pass of bfloat16 vectors, the best of five."""
    shape = max(TOKENS // seq_length, 1), seq_length, heads, dim // heads  # (bs, seq_length, n_heads, dim of a head)
    vectors = [torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        output = F.scaled_dot_product_attention(*(part.to(dtype) for part in vectors)).to(torch.bfloat16)
        output.backward(torch.ones_like(output))
        best = min(best, time.perf_counter() - start)
    return 1000 * best


if __name__ == "__main__":
    raise SystemExit(main())
