"""Times a step of train.py against the straightforward computation, side by side in one process.

    python scripts/benchmark_training.py --cases batch_5 large small --rounds 3

The straightforward way: one padded batch at a time, logits of every position from both models, those of real tokens
picked out of them, a mean per batch, every metric read at once. It takes the same sequences through the same models.
Lengths are log-normal, 116 tokens on average as in Wikipedia, and at most 512; weights are random, which the time does
not depend on. Tokens are real ones: padding does not count. Memory is the peak of a step above what is held
before it (weights and optimizer state).

With --techniques, also a step without each of the techniques that make ours fast.

Dimensions: n_tokens real tokens of a batch; voc_size; dim.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from distiller import Distiller
from grouped_batch_sampler import GroupedBatchSampler
from models.language_model import LanguageModel
from models.memory import PeakAbove
from models.student import build_student, half_depth_config
from training import losses
from training.batches import Batches, MicroBatch, MicroBatches, Padding, RunData, StepCounts, pad, prepare_batch_mlm
from training.configurations import default_tokens_per_micro_batch
from training.distributed import World, describe_device, has_native_bf16, now, single_process
from training.masking import Masking
from training.recipe import Recipe
from utils import integer

MASK, PAD, FIRST_WORD = 103, 0, 1000  # ids of BERT's vocabulary
UNLIMITED = {"cpu": 1 << 40, "cuda": 1 << 40}
VOC_SIZE = 30522


@dataclass(frozen=True)
class Case:
    """How large the models are, and how many sequences a step takes.

    Attributes:
        batch_size: sequences a batch of the straightforward way, and of ours before they are cut into micro-batches.
        batches: of a step.
        grouped: whether the sequences of a batch are of similar length.
        tokens_per_batch: ours are cut by this budget instead, from the same sequences.
    """

    title: str
    layers: int
    dim: int
    batch_size: int
    batches: int
    grouped: bool
    tokens_per_batch: int | None = None


CASES = {
    "batch_5": Case("BERT-base to 6 layers, 4 batches of 5, length-grouped", 12, 768, 5, 4, True),
    "large": Case("BERT-base to 6 layers, one batch of 24, mixed lengths", 12, 768, 24, 1, False, 2048),
    "small": Case("4 layers of 128 to 2 layers, 10 batches of 5, length-grouped", 4, 128, 5, 10, True),
    "tiny": Case("2 layers of 64 to 1 layer, one batch of 2, to see that it works", 2, 64, 2, 1, True),
    "gpu_batch_5": Case("BERT-base to 6 layers, 50 batches of 5, length-grouped", 12, 768, 5, 50, True),
    "gpu_large": Case("BERT-base to 6 layers, 4 batches of 64, length-grouped", 12, 768, 64, 4, True, 32768),
}


# ----------------------------------------------------------------------------------------------------- the two ways


class Straightforward:
    """A step as one would write it down first."""

    def __init__(self, student, teacher, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
        self.student, self.teacher, self.recipe = student, teacher, recipe
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-6)

    def step(self, batches: list[MicroBatch]) -> None:
        self.student.train()
        for batch in batches:
            (self.losses(batch.to(self.device)) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def losses(self, batch: MicroBatch) -> torch.Tensor:
        recipe, ids, temperature = self.recipe, batch.input_ids, self.recipe.temperature
        mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask.long()
        labels = torch.full_like(ids, -100).flatten()
        labels[batch.label_positions] = batch.labels
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            s = self.student(ids, attention_mask=mask, output_hidden_states=True)
            with torch.no_grad():
                t = self.teacher(ids, attention_mask=mask, output_hidden_states=True)
        chosen = mask.bool()[:, :, None]
        s_logits = s.logits.masked_select(chosen).view(-1, VOC_SIZE)  # (n_tokens, voc_size)
        t_logits = t.logits.masked_select(chosen).view(-1, VOC_SIZE)  # (n_tokens, voc_size)
        ce = F.kl_div(
            F.log_softmax(s_logits / temperature, dim=-1, dtype=torch.float32),
            F.softmax(t_logits / temperature, dim=-1, dtype=torch.float32),
            reduction="batchmean",
        )
        ce = ce * temperature**2
        mlm = F.cross_entropy(s.logits.flatten(0, 1).float(), labels, ignore_index=-100)
        dim = s.hidden_states[-1].shape[-1]
        s_hidden = s.hidden_states[-1].masked_select(chosen).view(-1, dim).float()  # (n_tokens, dim)
        t_hidden = t.hidden_states[-1].masked_select(chosen).view(-1, dim).float()  # (n_tokens, dim)
        cos = F.cosine_embedding_loss(s_hidden, t_hidden, s_hidden.new_ones(len(s_hidden)))
        loss = recipe.alpha_ce * ce + recipe.alpha_mlm * mlm + recipe.alpha_cos * cos
        self.shown = {"loss": loss.item(), "ce": ce.item(), "mlm": mlm.item(), "cos": cos.item()}
        return loss


class Ours:
    """The very Distiller of train.py."""

    def __init__(self, student, teacher, recipe: Recipe, world: World, dtype: torch.dtype) -> None:
        data = RunData(None, GroupedBatchSampler(np.full(8, 16), batch_size=1), None, Padding(PAD), {})
        student, teacher = LanguageModel(student), LanguageModel(teacher)
        self.distiller = Distiller(recipe, student, teacher, data, world, dtype, None)

    def step(self, micro_batches: list[MicroBatch]) -> None:
        self.distiller.step(micro_batches, StepCounts.of(micro_batches))


# ------------------------------------------------------------------------------------------------------------ the data


def draw_sequences(n: int, generator: np.random.Generator, voc_size: int) -> list[np.ndarray]:
    """(n,) sequences of random ids, with the lengths of paragraphs."""
    lengths = np.clip(generator.lognormal(np.log(116) - 0.6**2 / 2, 0.6, n), 12, 512).astype(int)
    return [generator.integers(FIRST_WORD, voc_size, length) for length in lengths]


def masking_of(voc_size: int) -> Masking:
    """Every word is masked with the same probability."""
    return Masking(np.arange(voc_size) >= FIRST_WORD, np.arange(FIRST_WORD, voc_size), MASK)


def straightforward_batches(case: Case, sequences: list[np.ndarray], masking: Masking) -> list[MicroBatch]:
    if case.grouped:
        sequences = sorted(sequences, key=len)
    parts = [sequences[start : start + case.batch_size] for start in range(0, len(sequences), case.batch_size)]
    generator = np.random.default_rng(0)
    batches = [prepare_batch_mlm(part, masking, generator) for part in parts]
    return [pad(batch, Padding(PAD), head_on_all_tokens=True) for batch in batches]


def our_micro_batches(case: Case, sequences: list[np.ndarray], masking: Masking, tokens: int) -> list[MicroBatch]:
    lengths = np.array([len(sequence) for sequence in sequences])
    size = None if case.tokens_per_batch else case.batch_size
    sampler = GroupedBatchSampler(lengths, size, case.tokens_per_batch)
    batches = Batches(sequences, sampler, (0, 0), masking)
    return MicroBatches(batches, Padding(PAD), tokens, head_on_all_tokens=True)[range(len(sampler))]


# ----------------------------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def changed(owner, **values) -> Iterator[None]:
    """Constants of a module, or attributes of an object, at other values."""
    old = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)


@dataclass
class Variant:
    """One way to compute a step: what makes it ready, and what is timed."""

    name: str
    make: Callable[[], object]
    batches: Callable[[], list[MicroBatch]]
    constants: dict


def measure(variants: list[Variant], rounds: int, device: torch.device) -> dict[str, tuple[list[float], int]]:
    """Seconds of each round and bytes of memory of each variant. Rounds alternate between the variants."""
    ways = {}
    for variant in variants:
        with changed(losses, **variant.constants):
            way = ways[variant.name] = variant.make()
            way.step(variant.batches())  # the optimizer's state, and warm-up
            way.step(variant.batches())
    seconds = {variant.name: [] for variant in variants}
    memory = dict.fromkeys(seconds, 0)
    for done in range(rounds + 1):
        for variant in variants:
            batches = variant.batches
            with changed(losses, **variant.constants):
                if done == rounds:
                    with PeakAbove(device) as peak:
                        ways[variant.name].step(batches())
                    memory[variant.name] = peak.bytes
                    continue
                start = now(device)
                ways[variant.name].step(batches())
                seconds[variant.name].append(now(device) - start)
    return {name: (seconds[name], memory[name]) for name in seconds}


def build_teacher(case: Case, device: torch.device, voc_size: int, **more) -> BertForMaskedLM:
    """A BERT of random weights; `more` goes into its configuration."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": voc_size,
        "num_hidden_layers": case.layers,
        "hidden_size": case.dim,
        "num_attention_heads": case.dim // 64,
        "intermediate_size": 4 * case.dim,
    }
    config = BertConfig(**shape | more)
    with device:
        return BertForMaskedLM(config).eval().requires_grad_(False)


def run_case(case: Case, args: argparse.Namespace, world: World, dtype: torch.dtype) -> None:
    device = world.device
    teacher = build_teacher(case, device, VOC_SIZE)
    student_config = half_depth_config(teacher.config)
    generator = np.random.default_rng(0)
    sequences = draw_sequences(case.batch_size * case.batches, generator, VOC_SIZE)
    tokens = sum(map(len, sequences))
    masking = masking_of(VOC_SIZE)
    recipe = Recipe()

    def student():
        return build_student(student_config, None).to(device)

    def ours(recipe: Recipe = recipe) -> Ours:
        return Ours(student(), teacher, recipe, world, dtype)

    def micro_batches(tokens: int = default_tokens_per_micro_batch(device)) -> list[MicroBatch]:
        return our_micro_batches(case, sequences, masking, tokens)

    variants = [
        Variant(
            "straightforward",
            lambda: Straightforward(student(), teacher, recipe, device, dtype),
            lambda: straightforward_batches(case, sequences, masking),
            {},
        ),
        Variant("ours", ours, micro_batches, {}),
    ]
    if args.techniques:
        variants += [
            Variant("ours, a batch at a time", ours, lambda: micro_batches(0), {}),
            Variant("ours, vocabulary not padded to 16", ours, micro_batches, {"ALIGNMENT": 1}),
            Variant("ours, loss of a whole chunk at once", ours, micro_batches, {"STRIP_LOGITS": UNLIMITED}),
            Variant(
                "ours, logits in one chunk", ours, micro_batches, {"STRIP_LOGITS": UNLIMITED, "CHUNK_BYTES": UNLIMITED}
            ),
        ]
    if args.relations:
        with_relations = replace(recipe, alpha_relation=1.0)
        variants.append(Variant("ours, with relations", lambda: ours(with_relations), micro_batches, {}))
    if args.compile:
        variants.append(Variant("ours, compiled", lambda: ours(replace(recipe, compile=True)), micro_batches, {}))
    results = measure(variants, args.rounds, device)
    work = Ours(student(), teacher, recipe, world, dtype).distiller.objective.work
    flops = work.flops(StepCounts.of(micro_batches()))
    print(f"\n{case.title}; {tokens:,} tokens a step, {str(dtype).split('.')[1]}, {describe_device(device)}\n")
    print(table(results, tokens, flops), flush=True)


def table(results: dict[str, tuple[list[float], int]], tokens: int, flops: float) -> str:
    """Markdown; the first row is the one that the others' ratios refer to.

    Args:
        results: as `measure` returns them.
        tokens, flops: of a step.
    """
    base_seconds, base_memory = next(iter(results.values()))
    rows = []
    for name, (seconds, memory) in results.items():
        middle = statistics.median(seconds)
        faster = statistics.median(b / s for b, s in zip(base_seconds, seconds, strict=True))
        rows.append(
            [
                name,
                f"{middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f})",
                f"{tokens / middle:,.0f}",
                f"{flops / middle / 1e12:.3f}",
                f"{faster:.2f}x",
                f"{memory / 2**20:,.0f} MiB",
                f"{base_memory / memory:.2f}x",
            ]
        )
    return utils.markdown_table(["", "s a step", "tokens/s", "TFLOP/s", "faster", "memory", "less"], rows)


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, help="cases to time (default: batch_5, large, small; on a GPU gpu_...)")
    add("--rounds", type=integer(1, 10_000), default=3, help="steps to time, in turns (%(default)s)")
    add("--techniques", action="store_true", help="also time our step without each of its techniques")
    add("--relations", action="store_true", help="also time our step with --alpha_relation 1")
    add("--compile", action="store_true", help="also time our step with torch.compile")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="compute in bfloat16 (default where it is native)")
    precision.add_argument("--fp32", action="store_true", help="compute in float32 (default elsewhere)")
    add("--n_gpu", type=integer(0, 1), help="0 for the CPU (default: what there is)")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    world = single_process(args.n_gpu)
    bf16 = args.bf16 or (not args.fp32 and has_native_bf16(world.device))
    default = ["batch_5", "large", "small"] if world.device.type == "cpu" else ["gpu_batch_5", "gpu_large", "small"]
    for name in args.cases or default:
        run_case(CASES[name], args, world, torch.bfloat16 if bf16 else torch.float32)


if __name__ == "__main__":
    raise SystemExit(main())
