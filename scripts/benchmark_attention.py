"""Times steps of train.py with and without cuDNN's attention, on a GPU: batches of a real text, none shaped as another.

    python scripts/benchmark_attention.py --data_file data/binarized_text.bert-base-uncased.pickle

On recent GPUs PyTorch prefers cuDNN's kernels for attention. These are planned anew for every shape of a batch, and
train.py turns them off (training/distributed.py). The models are a BERT-base and its student, of random weights, which
the time does not depend on. Each way goes through the same batches several times; the first time, all shapes are new.
On a CPU both ways are the same one.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

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
from training.batches import Batch, Batches, StepCounts, Steps
from training.distributed import World, describe_device, has_native_bf16, init_world, now
from training.memory import peak_memory
from training.recipe import Recipe
from utils import InputError, integer, path

WAYS = (("other kernels", 1), ("other kernels", 2), ("cuDNN", 1), ("cuDNN", 2), ("other kernels", 3))  # which time


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--data_file", type=path, nargs="+", required=True, help="binarized text")
    parser.add_argument("--tokenizer_name", type=path, default="bert-base-uncased", help="(%(default)s)")
    parser.add_argument("--tokens_per_batch", type=integer(512, 1 << 20), default=16384, help="(%(default)s)")
    parser.add_argument("--steps", type=integer(1, 1000), default=10, help="of each way (%(default)s)")
    parser.add_argument("--layers", type=integer(2, 100), default=12, help="of the teacher (%(default)s)")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer_name)
    text = open_corpus(args.data_file, tokenizer)
    text.verify()
    data = LmSeqsDataset(text, describe_tokenizer(tokenizer)["special_ids"], BertConfig().max_position_embeddings)
    print(measure(data, tokenizer, args, init_world(None)))


def measure(data: LmSeqsDataset, tokenizer, args: argparse.Namespace, world: World) -> str:
    """The table of what was measured."""
    dtype = torch.bfloat16 if has_native_bf16(world.device) else torch.float32
    config = BertConfig(num_hidden_layers=args.layers, vocab_size=len(tokenizer))
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


def times(ours: Ours, steps: list[list[Batch]], recipe: Recipe, world: World, dtype: torch.dtype) -> list[list[str]]:
    """A row for each time through the steps."""
    counts = [StepCounts.of(step) for step in steps]
    tokens = sum(count.tokens for count in counts)
    flops = sum(map(ours.distiller.objective.work.flops, counts))
    peak = peak_flops(world.device, dtype)
    where = "masked tokens" if recipe.restrict_ce_to_mask else "all tokens"
    rows = []
    for way, which_time in WAYS:
        torch.backends.cuda.enable_cudnn_sdp(way == "cuDNN")
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
