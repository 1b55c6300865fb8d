"""Compares models on the same held-out text in one table: size, loss, agreement with the teacher, speed; and how the
first one differs from each of the others, with standard errors. If the teacher has no vocabulary head, like a sentence
encoder, hidden states are compared instead, and no words are masked.

    python scripts/compare_models.py --data_file data/binarized_text.bert-base-uncased.pickle \\
        --teacher bert-base-uncased --models serialization_dir/my_first_training

The text is the share of --data_file that train.py holds out too, or all of --valid_data_file. Speed is that of the
forward pass, in the precision and on the device that train.py would choose; the models take turns, and the median of
the turns counts. Words are masked evenly, or with --token_counts as in training.
"""

import argparse
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import open_corpus
from corpus.token_counts import load_token_counts
from corpus.tokenization import load_tokenizer
from evaluation import held_out
from evaluation.breakdown import by_layer
from evaluation.glue import TASKS, read_task
from evaluation.text_vectors import TextEncoder, similarity_scores
from files.atomic import atomic_write
from files.paths import check_input_file, check_output_file
from models.families import max_length
from models.language_model import LanguageModel
from models.loading import load_with_or_without_head
from training.distributed import World, add_precision_flags, choose_dtype, describe_device, now, single_process
from training.masking import Masking
from training.recipe import Recipe
from utils import InputError, integer, logger, path, real


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=path, required=True, help="the teacher: hub name or folder")
    add("--models", type=path, nargs="+", required=True, help="the others: hub names or folders, such as a dump_path")
    add("--data_file", type=path, nargs="+", help="binarized text that they were trained on; a share of it is held out")
    add("--valid_data_file", type=path, nargs="+", help="binarized text to evaluate on instead")
    add("--valid_share", type=real(0, 1, low_allowed=False), default=0.01, help="share that was held out (%(default)s)")
    add("--token_counts", type=path, help="token counts, to mask rare words more often, as in training")
    add("--mlm_smoothing", type=real(0), default=Recipe.mlm_smoothing, help="see train.py (%(default)s)")
    add("--data_dir", type=path, help="folder with STS-B/dev.tsv, to see how well hidden states rank its pairs")
    add("--tokenizer_name", type=path, help="tokenizer (default: the teacher's)")
    add("--turns", type=integer(1, 1000), default=5, help="timings of each model; the median counts (%(default)s)")
    add_precision_flags(parser)
    add("--n_gpu", type=integer(0, 1 << 20), help="0 for the CPU (default: what there is)")
    add("--output", type=path, help="Markdown file to write the tables to as well")
    return parser


@torch.no_grad()
def seconds_of_forward(
    model: LanguageModel, micro_batches: list, world: World, dtype: torch.dtype, logits: bool
) -> float:
    """Forward through all of them, with logits for all tokens if `logits`, as a user of the model would run it."""
    model.eval()
    start = now(world.device)
    with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
        for micro_batch in micro_batches:
            hidden = model.hidden(micro_batch.input_ids, micro_batch.attention_mask)
            if logits:
                model.logits(hidden)
    return now(world.device) - start


def size_on_disk(name: str) -> int | None:
    """Bytes of the weights in a folder; None for a hub name."""
    files = [file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in Path(name).glob(pattern)]
    return sum(file.stat().st_size for file in files) or None


def table(results: list[dict]) -> str:
    """Markdown; the first result is the teacher's, which the others' ratios refer to."""
    columns: dict[str, Callable[[dict], str]] = {
        "model": lambda result: result["name"],
        "layers": lambda result: str(result["layers"]),
        "parameters": lambda result: (
            f"{result['parameters'] / 1e6:.1f} M ({100 * result['parameters'] / results[0]['parameters']:.0f} %)"
        ),
        "MB": lambda result: f"{result['bytes'] / 1e6:.1f}" if result["bytes"] else "?",
    }
    if "labels" in results[0]:
        columns["loss"] = lambda result: f"{result['labels']['loss'].mean():.3f}"
        columns["as teacher"] = lambda result: f"{100 * result['labels']['agreement'].mean():.1f} %"
    else:
        columns["cosine"] = lambda result: "" if result["cosine"] is None else f"{result['cosine']:.3f}"
    if "sts_b" in results[0]:
        columns["STS-B"] = lambda result: f"{result['sts_b']:.1f}"
    columns["tokens/s"] = lambda result: f"{result['speed']:,.0f}"
    columns["speed-up"] = lambda result: f"{result['speed'] / results[0]['speed']:.2f}x"
    return utils.markdown_table(list(columns), [[cell(result) for cell in columns.values()] for result in results])


def difference(a: dict, b: dict) -> str:
    """How much less loss and more agreement `a` has than `b`, each with its standard error.

    The error is that of the mean of differences at the same positions. It is far smaller than that of either mean,
    since a word that is hard to guess is hard for both.
    """
    parts = []
    for name, factor in (("loss", 1), ("agreement", 100)):
        apart = factor * (a["labels"][name] - b["labels"][name])  # (n labels,)
        parts.append(f"{apart.mean():+.3g} ± {apart.std() / len(apart) ** 0.5:.2g}")
    n = f"{len(a['labels']['loss']):,}"
    return (
        f"{a['name']} against {b['name']}, at the same {n} masked words: loss {parts[0]}, as teacher {parts[1]} points"
    )


def report(results: list[dict]) -> str:
    explained = (
        "loss: nats a masked word, on held-out text; as teacher: how often the first guess is the teacher's; ± is one "
        "standard error"
    )
    if "cosine" in results[0]:
        explained = "cosine: of the last hidden states with the teacher's, a mean over the tokens of held-out text"
    if "sts_b" in results[0]:
        explained += (
            "; STS-B: Spearman's correlation, in percent, of cosines of the texts' vectors, without fine-tuning"
        )
    lines = [table(results), "", *textwrap.wrap(explained, 98), ""]
    others = results[2:] if "labels" in results[0] else []
    for other in others:
        lines += [*textwrap.wrap(difference(results[1], other), 98), ""]
    return "\n".join(lines).rstrip()


def load_models(names: list[str], world: World) -> tuple[list[LanguageModel], bool]:
    """The models, the teacher first, and whether they guess words. Raises: InputError if they can't be compared."""
    loaded = [load_with_or_without_head(name, "model") for name in names]
    models = [LanguageModel(model).to(world.device) for model, _ in loaded]
    heads = [not missing for _, missing in loaded]
    if heads[0] and not all(heads):
        name = names[heads.index(False)]
        raise InputError(f"{name} has no language-model head, but the teacher has: they can't guess the same words.")
    for name, model in zip(names, models, strict=True):
        if model.model.config.vocab_size != models[0].model.config.vocab_size:
            raise InputError(f"{name} does not share the teacher's vocabulary.")
    return models, heads[0]


def measure(
    names: list[str], tokenizer_name: str | None, files: list[str], share: float | None, turns: int, world: World,
    dtype: torch.dtype, token_counts: str | None = None, smoothing: float = 0.0, data_dir: str | None = None,
    layers: bool = False,
) -> list[dict]:  # fmt: skip
    """What the table shows of each model, the teacher first.

    Args:
        files: of binarized text, of which the `share` is read that train.py holds out; None: all of it.
        turns: of the time measurement.
        token_counts: file of counts to mask by, with `smoothing`; None: evenly.
        data_dir: with STS-B; None: without that column.
        layers: whether to measure each model as if it ended after each layer.
    """
    tokenizer = load_tokenizer(tokenizer_name or names[0])
    pairs = read_task(TASKS["STS-B"], data_dir)[1][0] if data_dir else None
    models, on_words = load_models(names, world)
    corpus = open_corpus(files, tokenizer)
    corpus.verify()
    chosen = None if share is None else held_out.held_out_sequences(len(corpus), share)
    causal = models[0].family.causal
    length = min(tokenizer.model_max_length, *(max_length(model.model.config) for model in models))
    masking = None
    if token_counts and on_words and not causal:
        masking = Masking.of_tokenizer(tokenizer, load_token_counts(token_counts, len(tokenizer)), smoothing)
    text = held_out.held_out_batches(corpus, tokenizer, length, on_words and not causal, chosen, masking)

    logger.info("evaluating on %s in %s", describe_device(world.device), str(dtype).split(".")[1])
    results = []
    teacher = held_out.Remembered(models[0].model)
    bar = utils.progress_bar(total=len(models) * (1 + turns + 1), desc="comparing")
    for name, model in zip(names, models, strict=True):
        part = model.model if on_words else model.encoder
        result = {
            "name": Path(name).name,
            "layers": model.depth,
            "parameters": sum(p.numel() for p in part.parameters()),
            "bytes": size_on_disk(name),
        }
        compared = model, teacher, text, world.device, dtype
        if on_words:
            result["labels"] = held_out.evaluate_labels(*compared)
            if layers and model is not models[0]:
                result["by_layer"] = by_layer(model, teacher, text, world, dtype)
        else:
            result["cosine"] = held_out.evaluate_cosine(*compared)
        if pairs:
            result["sts_b"] = similarity_scores(TextEncoder(name, world.device, tokenizer), pairs)["score"]
        results.append(result)
        bar.update()
    prepared = [micro_batch.to(world.device) for micro_batch in text]
    times = [[] for _ in models]
    for _ in range(turns + 1):  # the first turn is the warm-up
        for model, seconds in zip(models, times, strict=True):
            seconds.append(seconds_of_forward(model, prepared, world, dtype, on_words))
            bar.update()
    bar.close()
    for result, seconds in zip(results, times, strict=True):
        result["speed"] = text.batches.dataset.n_tokens / statistics.median(seconds[1:])
    return results


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if bool(args.data_file) == bool(args.valid_data_file):
        raise InputError("give one of --data_file and --valid_data_file.")
    if args.output:
        check_output_file(args.output, "--output")
    if args.token_counts:
        check_input_file(args.token_counts, "--token_counts")
    world = single_process(args.n_gpu)
    results = measure(
        [args.teacher, *args.models], args.tokenizer_name, args.valid_data_file or args.data_file,
        None if args.valid_data_file else args.valid_share, args.turns, world, choose_dtype(args, world.device),
        args.token_counts, args.mlm_smoothing, args.data_dir,
    )  # fmt: skip
    print(report(results))
    if args.output:
        with atomic_write(args.output, "w") as out:
            out.write(report(results) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
