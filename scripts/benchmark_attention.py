"""Times steps of train.py with the attention it chooses and with PyTorch's own choice, on batches of a real text.

    python scripts/benchmark_attention.py --data_file data/binarized_text.bert-base-uncased.pickle

Why train.py chooses is told in training/attention.py: on a GPU against cuDNN's kernels, which are planned anew for
every shape of a batch; on a CPU against those for bfloat16, where sequences are short and there is a backward pass. The
models are a BERT-base and its student, of random weights, which the time does not depend on. Each way goes through the
same batches several times; the first time, all shapes are new. On a CPU, attention alone is timed too, by length. (A
CPU that does not multiply bfloat16 computes the steps in float32, where both ways are the same one.)

Dimensions: bs sequences of seq_length tokens, n_heads heads.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, BertConfig, BertForMaskedLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import open_corpus
from corpus.tokenization import describe_tokenizer, load_tokenizer
from evaluation import held_out
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset
from models.flops import peak_flops
from models.student import build_student, half_depth_config
from scripts.benchmark_training import Ours
from training.attention import attend_on_cpu
from training.batches import Batch, Batches, StepCounts, Steps
from training.distributed import World, describe_device, has_native_bf16, now, single_process
from training.memory import peak_memory
from training.recipe import Recipe
from utils import InputError, integer, path, real

WAYS = {  # and which time
    "cuda": (("other kernels", 1), ("other kernels", 2), ("cuDNN", 1), ("cuDNN", 2), ("other kernels", 3)),
    "cpu": (("float32", 1), ("bfloat16", 1), ("float32", 2), ("bfloat16", 2), ("float32", 3)),
}
HEADS, LENGTHS, TOKENS = 12, (16, 32, 64, 128, 256, 512), 4096  # of attention alone


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--data_file", type=path, nargs="+", required=True, help="binarized text")
    parser.add_argument("--tokenizer_name", type=path, default="bert-base-uncased", help="(%(default)s)")
    parser.add_argument("--tokens_per_batch", type=integer(512, 1 << 20), default=16384, help="(%(default)s)")
    parser.add_argument("--steps", type=integer(1, 1000), default=10, help="of each way (%(default)s)")
    parser.add_argument("--layers", type=integer(2, 100), default=12, help="of the teacher (%(default)s)")
    parser.add_argument("--attention_dropout", type=real(0, 0.99), default=0.1, help="(%(default)s)")
    parser.add_argument("--dim", type=integer(12, 12288), default=768, help="in 12 heads (%(default)s)")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer_name)
    text = open_corpus(args.data_file, tokenizer)
    text.verify()
    data = LmSeqsDataset(text, describe_tokenizer(tokenizer)["special_ids"], BertConfig().max_position_embeddings)
    world = single_process(None)
    print(measure(data, tokenizer, args, world))
    if world.device.type == "cpu":
        print(f"\n{measure_alone(args.dim)}")


def measure(data: LmSeqsDataset, tokenizer, args: argparse.Namespace, world: World) -> str:
    """The table of what was measured."""
    dtype = torch.bfloat16 if has_native_bf16(world.device) else torch.float32
    if args.dim % HEADS:
        raise InputError(f"--dim {args.dim} can't be divided among {HEADS} heads; give a multiple of {HEADS}.")
    config = BertConfig(
        num_hidden_layers=args.layers, vocab_size=len(tokenizer), hidden_size=args.dim, intermediate_size=4 * args.dim,
        num_attention_heads=HEADS, attention_probs_dropout_prob=args.attention_dropout,
    )  # fmt: skip
    with world.device:
        teacher = BertForMaskedLM(config).eval().requires_grad_(False)
    rows = []
    for recipe in (Recipe(), Recipe(restrict_ce_to_mask=True)):
        steps = make_steps(data, tokenizer, args, recipe, world.device)
        with world.device:
            student = build_student(half_depth_config(config), None)
        rows += times(Ours(student.to(world.device), teacher, recipe, world, dtype), steps, recipe, world, dtype)
    table = utils.markdown_table(["KL at", "attention", "time", "ms a step", "tokens/s", "MFU"], rows)
    title = f"{describe_device(world.device)}, {str(dtype).removeprefix('torch.')}"
    return f"{title}\n\n{table}\n\npeak memory {peak_memory(world.device) / 2**30:.1f} GiB"


def make_steps(data: LmSeqsDataset, tokenizer, args, recipe: Recipe, device: torch.device) -> list[list[Batch]]:
    """The micro-batches of each step. Raises: InputError if the text is too short."""
    sampler = GroupedBatchSampler(data.lengths, None, args.tokens_per_batch)
    if len(sampler) < args.steps:
        raise InputError(f"--data_file: there are only {len(sampler)} batches of this size in it; lower --steps.")
    masking, pad_id = held_out.even_masking(tokenizer), held_out.padding_id(tokenizer)
    batches = Batches(data, sampler, (0, 0), masking, pad_id, recipe.head_on_all_tokens)
    steps = Steps(batches, args.tokens_per_batch)
    made = [steps[range(i, i + 1)] for i in range(args.steps)]
    return [[batch.pin_memory() for batch in step] for step in made] if device.type == "cuda" else made


def choose(way: str) -> None:
    """The attention of all models, by its name in WAYS."""
    torch.backends.cuda.enable_cudnn_sdp(way == "cuDNN")
    AttentionInterface.register("sdpa", attend_on_cpu if way == "float32" else sdpa_attention_forward)


def measure_alone(dim: int) -> str:
    """The table of attention alone, by length."""
    dtypes = torch.float32, torch.bfloat16
    rows = [[str(length), *(f"{attention_time(length, dim, dtype):.1f}" for dtype in dtypes)] for length in LENGTHS]
    table = utils.markdown_table(["tokens a sequence", "float32, ms", "bfloat16, ms"], rows)
    return f"attention alone, {HEADS} heads of {dim // HEADS}, {TOKENS:,} tokens, forward and backward\n\n{table}"


def attention_time(seq_length: int, dim: int, dtype: torch.dtype) -> float:
    """Milliseconds of a forward and a backward pass of bfloat16 vectors, the best of five."""
    shape = max(TOKENS // seq_length, 1), seq_length, HEADS, dim // HEADS  # (bs, seq_length, n_heads, dim of a head)
    vectors = [torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        output = F.scaled_dot_product_attention(*(part.to(dtype) for part in vectors)).to(torch.bfloat16)
        output.backward(torch.ones_like(output))
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def times(ours: Ours, steps: list[list[Batch]], recipe: Recipe, world: World, dtype: torch.dtype) -> list[list[str]]:
    """A row for each time through the steps."""
    counts = [StepCounts.of(step) for step in steps]
    tokens = sum(count.tokens for count in counts)
    flops = sum(map(ours.distiller.objective.work.flops, counts))
    peak = peak_flops(world.device, dtype)
    where = "masked tokens" if recipe.restrict_ce_to_mask else "all tokens"
    rows = []
    for way, which_time in WAYS[world.device.type]:
        choose(way)
        start = now(world.device)
        for step in steps:
            ours.step(step)
        seconds = now(world.device) - start
        mfu = f"{flops / seconds / peak:.1%}" if peak else "-"
        per_step = f"{1000 * seconds / len(steps):.1f}"
        rows.append([where, way, str(which_time), per_step, f"{tokens / seconds:,.0f}", mfu])
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
