"""Compares sentence encoders without fine-tuning: a teacher, its student before training, and after.

    python scripts/compare_encoders.py --models all-MiniLM-L6-v2 serialization_dir/encoder \\
        --squad_file squad/dev-v1.1.json --data_dir glue

For each question of a file in SQuAD's format, all its paragraphs are ranked by the cosine of their vectors with the
question's. nDCG@10 and recall@10 say where the right one is; "mixed" is nDCG@10 if the model encodes the questions and
the first model the paragraphs, for indexes that exist already. STS-B is Spearman's correlation with how similar people
found two sentences. Texts/s are questions, one at a time and 32 at a time; the models take turns.
"""

import argparse
import statistics
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export_onnx import INT8, OnnxModel, export, require_packages

import utils
from evaluation.glue import TASKS, Example, read_task
from evaluation.text_vectors import (
    Collection,
    TextEncoder,
    ranking,
    read_collection,
    retrieval_scores,
    similarity_scores,
    vectors_of,
)
from files.atomic import atomic_write
from files.paths import check_output_file
from models.sentence_encoder import prompts_of
from training.distributed import describe_device, single_process
from utils import integer, logger, path

TIMED = {1: 64, 32: 256}  # texts at a time -> texts


class Int8Encoder:
    """An encoder exported to int8, with the methods of a TextEncoder.

    Args:
        encoder: whose export it is.
        folder: for the files.
    """

    def __init__(self, encoder: TextEncoder, folder: Path) -> None:
        self.batch = encoder.batch
        export(encoder.model, encoder.tokenizer, folder, pooling=encoder.pooling)
        self.exported = OnnxModel(folder / INT8, output="sentence_embedding")
        self.megabytes = (folder / INT8).stat().st_size / 1e6

    def __call__(self, batch: dict) -> np.ndarray:
        return self.exported(batch).astype(np.float64)


class Entry:
    """What is measured of one encoder.

    Args:
        encoder: a TextEncoder, or what has its methods.
        prompts: what it expects before a query and before a document.

    Attributes:
        rates: texts a second by batch size, turn by turn.
    """

    def __init__(self, name: str, encoder, prompts: dict[str, str], layers: int, megabytes: float) -> None:
        self.name, self.encoder, self.prompts = name, encoder, prompts
        self.layers, self.megabytes = layers, megabytes
        self.rates: dict[int, list[float]] = {n: [] for n in TIMED}

    def read(self, collection: Collection, pairs: list[Example] | None) -> None:
        """Leaves the vectors of the collection in `questions` and `paragraphs`, and the score of the pairs in `sts`."""
        of = lambda kind, texts: vectors_of(self.encoder, [self.prompts.get(kind, "") + text for text in texts])  # noqa: E731
        self.questions, self.paragraphs = of("query", collection.questions), of("document", collection.paragraphs)
        self.sts = similarity_scores(self.encoder, pairs)["score"] if pairs else None

    def time(self, texts: list[str]) -> None:
        """One turn."""
        for n, total in TIMED.items():
            some = (texts * -(-total // len(texts)))[:total]
            start = time.perf_counter()
            for i in range(0, total, n):
                self.encoder(self.encoder.batch(some[i : i + n]))
            self.rates[n].append(total / (time.perf_counter() - start))


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=path, nargs="+", required=True, help="hub names or folders, the teacher first")
    add("--squad_file", type=path, required=True, help="questions and paragraphs in the format of SQuAD 1.1")
    add("--data_dir", type=path, help="folder with STS-B/dev.tsv (default: without STS-B)")
    add("--int8", action="store_true", help="also compare each model exported to int8")
    add("--widths", type=integer(1, 1 << 16), nargs="+", default=[], help="also nDCG@10 of only the first entries")
    add("--max_length", type=integer(8, 1 << 20), default=512, help="tokens to read of a text, at most (%(default)s)")
    add("--show", type=integer(0, 1000), default=0, metavar="N", help="also show what the models find for N questions")
    add("--turns", type=integer(1, 1000), default=3, help="timings of each model; the median counts (%(default)s)")
    add("--n_gpu", type=integer(0, 1), help="0 for the CPU (default: what there is)")
    add("--output", type=path, help="Markdown file to write the table to as well")
    return parser


def entries_of(args: argparse.Namespace, device, folder: Path) -> list[Entry]:
    found = []
    for i, name in enumerate(args.models):
        encoder, title = TextEncoder(name, device, length=args.max_length), Path(name).name
        layers, size = encoder.model.config.num_hidden_layers, 4 * encoder.model.num_parameters() / 1e6
        found.append(Entry(title, encoder, prompts_of(name), layers, size))
        if args.int8:
            on_cpu = encoder if device.type == "cpu" else TextEncoder(name, "cpu", length=args.max_length)
            int8 = Int8Encoder(on_cpu, folder / str(i))
            found.append(Entry(f"{title}, int8", int8, prompts_of(name), layers, int8.megabytes))
    return found


def table_of(entries: list[Entry], collection: Collection, widths: list[int]) -> str:
    first, lines = entries[0], []
    for entry in entries:
        scores = retrieval_scores(ranking(entry.questions, entry.paragraphs), collection.right)
        mixed = "-"
        if entry.questions.shape[1] == first.paragraphs.shape[1]:
            ranked = ranking(entry.questions, first.paragraphs)
            mixed = f"{retrieval_scores(ranked, collection.right)['ndcg']:.1f}"
        cells = [entry.name, str(entry.layers), f"{entry.megabytes:.3g}"]
        cells += [f"{scores['ndcg']:.1f}", f"{scores['recall']:.1f}", mixed]
        cells += [f"{entry.sts:.1f}"] if entry.sts is not None else []
        for width in widths:
            ranked = ranking(entry.questions[:, :width], entry.paragraphs[:, :width])
            cells.append(f"{retrieval_scores(ranked, collection.right)['ndcg']:.1f}")
        lines.append([*cells, *(f"{statistics.median(rates):.0f}" for rates in entry.rates.values())])
    header = ["", "layers", "MB", "nDCG@10", "recall@10", "mixed", *(["STS-B"] if first.sts is not None else [])]
    header += [f"nDCG@10, first {width}" for width in widths] + [f"texts/s, {n} at a time" for n in TIMED]
    return utils.markdown_table(header, lines)


def examples_of(entries: list[Entry], collection: Collection, n: int) -> str:
    """The first three paragraphs that each model finds for some questions; * marks the right one."""
    lines = []
    for i in np.linspace(0, len(collection.questions) - 1, n).astype(int):
        lines.append(f"\n{collection.questions[i]}")
        for entry in entries:
            lines.append(f"  {entry.name}")
            for j in ranking(entry.questions[i : i + 1], entry.paragraphs)[0, :3]:
                mark = "*" if j == collection.right[i] else " "
                lines.append(f"  {mark} {textwrap.shorten(collection.paragraphs[j], 100, placeholder=' ...')}")
    return "\n".join(lines)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    utils.distinct_names(args.models, "--models")
    if args.output:
        check_output_file(args.output, "--output")
    if args.int8:
        require_packages()
    collection = read_collection(args.squad_file, "--squad_file")
    pairs = read_task(TASKS["STS-B"], args.data_dir)[1][0] if args.data_dir else None
    device = single_process(args.n_gpu).device
    with tempfile.TemporaryDirectory() as folder:
        entries = entries_of(args, device, Path(folder))
        for entry in entries:
            logger.info("%s", entry.name)
            entry.read(collection, pairs)
        for _ in range(args.turns):
            for entry in entries:
                entry.time(collection.questions)
    n_texts = f"{len(collection.questions):,} questions, {len(collection.paragraphs):,} paragraphs"
    text = f"{table_of(entries, collection, args.widths)}\n\n{n_texts}; on {describe_device(device)}."
    print(text + examples_of(entries, collection, args.show))
    if args.output:
        with atomic_write(args.output, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
