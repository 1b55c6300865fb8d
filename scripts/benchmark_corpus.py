"""Times the preparation of text against the usual ways, side by side in one run:

    python scripts/benchmark_corpus.py --file_path data/dump.txt --bert_tokenizer bert-base-uncased

Tokenizing (MB of text a second) and its peak memory, making the text in the first place, opening a binarized file,
counting its tokens, looking for an evaluation set in it, and setting up the training sequences and their order. For
realistic sizes, some GB and minutes, add `--growth_megabytes 200 2000 --set_up_sequences 50000000`. Every memory figure
comes from a separate process (Linux only). Everything is written below --work_dir, and removed.
"""

import argparse
import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import utils
from corpus.files import TokenCorpus, open_corpus
from corpus.overlap import NGRAM, find_overlaps
from corpus.tokenization import describe_tokenizer, load_tokenizer, tokenizer_short_name
from corpus.word_ngrams import WORD
from dataset import open_token_file, token_dtype, write_token_file
from files.paths import check_input_file, check_output_folder
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError, integer, n_cores, path

BATCH = 1024  # lines given to the library's batch encoding
SAMPLE_BYTES = 40_000_000  # of the text, for the rates
N_TOUCHED = 1000
N_SHARDS = 1000
PARAGRAPHS = 5  # of a document


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--file_path", type=path, default="data/dump.txt", help="text, one sequence per line (%(default)s)")
    add("--tokenizer_name", "--bert_tokenizer", type=path, default="bert-base-uncased", help="tokenizer (%(default)s)")
    add("--turns", type=integer(1, 1000), default=3, help="measurements of each rate; the median counts (%(default)s)")
    add(
        "--growth_megabytes",
        type=integer(1, 1 << 20),
        nargs="*",
        default=[20],
        help="sizes of text, in MB, to prepare step by step (%(default)s)",
    )
    add("--open_sequences", type=integer(1), default=300_000, help="sequences of the file to open (%(default)s)")
    add("--set_up_sequences", type=integer(1), default=1_000_000, help="sequences of the file to index (%(default)s)")
    add(
        "--set_up_tokens",
        type=integer(12, 512),
        default=108,
        help="their greatest length; the least is 12 (%(default)s)",
    )
    add("--work_dir", type=path, default="work", help="folder for temporary files (%(default)s)")
    return parser


# ------------------------------------------------------------------------------------------------------------ measuring


def alone(function: Callable, *arguments):
    """Calls it in a fresh process, so that its memory is measured alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Silences the scripts that are called, except for warnings."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class Table:
    """Rows of a Markdown table, printed as they come."""

    def __init__(self) -> None:
        print(utils.markdown_table(["what", "before", "here", "ratio"], []))

    def row(self, what: str, before: str, here: str, ratio: str) -> None:
        print(f"| {what} | {before} | {here} | {ratio} |", flush=True)


# ----------------------------------------------------------------------------------------------------------- tokenizing


def sample_of(text: str, target: Path) -> list[str]:
    """The first lines of the text, also written to a file."""
    with open(text, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file.readlines(SAMPLE_BYTES)]
    lines = [line for line in lines if line]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def benchmark_tokenizing(table: Table, args: argparse.Namespace, folder: Path) -> None:
    import binarized_data

    tokenizer = load_tokenizer(args.tokenizer_name)
    plain = load_tokenizer(args.tokenizer_name).backend_tokenizer
    plain.no_truncation()
    plain.no_padding()
    text = folder / "sample.txt"
    lines = sample_of(args.file_path, text)
    batches = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]
    few = lines[: max(1, len(lines) // 8)]  # the slow way needs no more
    flags = ["--file_path", str(text), "--bert_tokenizer", args.tokenizer_name, "--dump_file", str(folder / "sample")]
    ways = {
        "one call a line": (lambda: [tokenizer.encode(line) for line in few], few),
        "encode_batch": (lambda: [[e.ids for e in plain.encode_batch(batch)] for batch in batches], lines),
        "encode_batch_fast": (lambda: [[e.ids for e in plain.encode_batch_fast(batch)] for batch in batches], lines),
        "ours": (lambda: binarized_data.main(flags), lines),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, (way, given) in ways.items():
            gc.collect()
            n_bytes = sum(len(line.encode()) + 1 for line in given)
            rates[name].append(n_bytes / 1e6 / seconds(way))
    rate = {name: statistics.median(of_turns) for name, of_turns in rates.items()}
    for name, what in (
        ("one call a line", "tokenizing, against one `encode` a line"),
        ("encode_batch", "tokenizing, against the library's `encode_batch`"),
        ("encode_batch_fast", "tokenizing, against `encode_batch_fast`"),
    ):
        ratio = rate["ours"] / rate[name]
        table.row(what, f"{rate[name]:.2f} MB/s", f"{rate['ours']:.2f} MB/s", f"{ratio:.2f}x")


def as_documents(text: Path) -> str:
    """The lines of a text with a blank line after some of them each."""
    lines = text.read_text().splitlines()
    parts = ["\n".join(lines[i : i + PARAGRAPHS]) for i in range(0, len(lines), PARAGRAPHS)]
    return "\n\n".join([*parts, ""])


def benchmark_dump(table: Table, args: argparse.Namespace, folder: Path) -> None:
    import make_dump

    text = folder / "documents.txt"
    text.write_text(as_documents(folder / "sample.txt"))
    flags = ["--source", str(text), "--dump_file", str(folder / "dump.txt"), "--num_workers"]
    rates: dict[int, list[float]] = {0: [], n_cores(): []}
    for _ in range(args.turns):
        for n, of_turns in rates.items():
            of_turns.append(text.stat().st_size / 1e6 / seconds(lambda n=n: make_dump.main([*flags, str(n)])))
    one, all_of_them = map(statistics.median, rates.values())
    what = f"making the text, on {n_cores()} cores instead of one"
    table.row(what, f"{one:.1f} MB/s", f"{all_of_them:.1f} MB/s", f"{all_of_them / one:.2f}x")


def run_script_alone(module: str, flags: list[str]) -> tuple[float, int]:
    """Seconds that a script takes, and the peak memory of its largest process."""
    script = importlib.import_module(module)
    with contextlib.redirect_stdout(None), only_warnings():
        took = seconds(lambda: script.main(flags))
    return took, max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ) * 1024


def benchmark_growth(table: Table, args: argparse.Namespace, folder: Path) -> None:
    """Every step of a text's preparation, at several sizes."""
    documents, text, tokenizer = folder / "documents.txt", folder / "grown.txt", args.tokenizer_name
    binarized = folder / f"grown.{tokenizer_short_name(tokenizer)}.pickle"
    evaluation = folder / "evaluation.txt"
    evaluation.write_text("\n".join((folder / "sample.txt").read_text().splitlines()[::1000]))
    content = as_documents(folder / "sample.txt").encode()
    for megabytes in args.growth_megabytes:
        with open(documents, "wb") as file:
            while file.tell() < megabytes * 1e6:
                file.write(content)
        size = f"{documents.stat().st_size / 1e6:,.0f} MB"
        corpus = ["--data_file", str(binarized)]
        for what, script, flags in (
            ("making a text of", "make_dump", ["--source", str(documents), "--dump_file", str(text)]),
            ("binarizing", "binarized_data",
             ["--file_path", str(text), "--bert_tokenizer", tokenizer, "--dump_file", str(folder / "grown")]),
            ("counting", "token_counts", [*corpus, "--token_counts_dump", str(folder / "counts.pickle")]),
            ("examining, with --against,", "corpus_doctor",
             [*corpus, "--tokenizer_name", tokenizer, "--against", str(evaluation), "--n_examples", "0"]),
        ):  # fmt: skip
            took, peak = alone(run_script_alone, script, flags)
            table.row(f"{what} {size}", "", f"{took:,.1f} s, {peak / 1e6:,.0f} MB", "")
            documents.unlink(missing_ok=True)
        text.unlink()
        binarized.unlink()


# ------------------------------------------------------------------------------------------------- opening and counting


def write_both(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The text's sequences, repeated up to the number asked for, as an old pickled list and as ours."""
    sample = open_token_file(folder / f"sample.{tokenizer_short_name(args.tokenizer_name)}.pickle")
    old, ours = folder / "old.pickle", folder / "ours.pickle"
    sequences = [sample[i % len(sample)].copy() for i in range(args.open_sequences)]
    with open(old, "wb") as file:
        pickle.dump(sequences, file, protocol=pickle.HIGHEST_PROTOCOL)
    with write_token_file(ours, sample.made_by) as writer:
        writer.append(np.concatenate(sequences), np.array([len(sequence) for sequence in sequences]))
    return old, ours


def forget(path: Path) -> None:
    """Makes the next read of a file come from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_old(path: Path) -> tuple[float, int]:
    forget(path)
    before, start = memory("VmRSS"), time.perf_counter()
    with open(path, "rb") as file:
        sequences = pickle.load(file)
    opened = time.perf_counter() - start
    assert sequences
    return opened, memory("VmRSS") - before


def touch_ours(path: Path) -> tuple[float, int]:
    forget(path)
    before, start = memory("VmRSS"), time.perf_counter()
    file = open_token_file(path)
    opened = time.perf_counter() - start
    for i in np.random.default_rng(0).integers(len(file), size=N_TOUCHED):
        assert len(file[i])
    return opened, memory("VmRSS") - before


def count_with_counter(path: Path) -> float:
    with open(path, "rb") as file:
        sequences = pickle.load(file)
    counter: Counter = Counter()
    start = time.perf_counter()
    for sequence in sequences:
        counter.update(sequence)
    return time.perf_counter() - start


def benchmark_opening_and_counting(table: Table, args: argparse.Namespace, folder: Path) -> None:
    import token_counts

    old, ours = write_both(args, folder)
    (before, before_bytes), (here, here_bytes) = alone(touch_old, old), alone(touch_ours, ours)
    n = f"{args.open_sequences:,} sequences"
    table.row(
        f"opening {n}, from the disk", f"{before * 1e3:,.0f} ms", f"{here * 1e3:.1f} ms", f"{before / here:,.0f}x"
    )
    share = f"{100 * here_bytes / before_bytes:.2f} %"
    touched = f"memory after reading {N_TOUCHED:,} of them"
    table.row(touched, f"{before_bytes / 1e6:,.0f} MB", f"{here_bytes / 1e6:.2f} MB", share)
    for k in range(N_SHARDS):
        os.link(folder / f"sample.{tokenizer_short_name(args.tokenizer_name)}.pickle", folder / f"shard-{k}.pickle")
    took = statistics.median(seconds(lambda: open_corpus([str(folder / "shard-*")])) for _ in range(args.turns))
    table.row(f"opening {N_SHARDS:,} shards", "", f"{took:.2f} s", "")
    flags = ["--data_file", str(ours), "--token_counts_dump", str(folder / "counts.pickle")]
    before = alone(count_with_counter, old)
    here = statistics.median(seconds(lambda: token_counts.main(flags)) for _ in range(args.turns))
    rates = [open_token_file(ours).n_tokens / 1e6 / took for took in (before, here)]
    what = "counting, against a Counter, which verifies nothing"
    table.row(what, f"{rates[0]:,.1f} M tokens/s", f"{rates[1]:,.0f} M tokens/s", f"{rates[1] / rates[0]:,.0f}x")


# -------------------------------------------------------------------------------------------------------------- overlap


def find_by_decoding(corpus: TokenCorpus, tokenizer, texts: list[str]) -> set[int]:
    """Numbers of the sequences with an n-gram of the texts, by turning tokens into words and comparing these."""
    words = lambda text: WORD.findall(text.lower())  # noqa: E731
    ngrams = lambda words: {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}  # noqa: E731
    wanted = set().union(*(ngrams(words(text)) for text in texts))
    sequences = [corpus[i].tolist() for i in range(len(corpus))]
    decoded = tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=True)
    return {i for i, text in enumerate(decoded) if not wanted.isdisjoint(ngrams(words(text)))}


def benchmark_overlap(table: Table, args: argparse.Namespace, folder: Path) -> None:
    tokenizer = load_tokenizer(args.tokenizer_name)
    corpus = open_corpus([str(folder / f"sample.{tokenizer_short_name(args.tokenizer_name)}.pickle")])
    few = corpus.take(np.arange(max(1, len(corpus) // 16)))  # the slow way needs no more
    many = TokenCorpus(corpus.files * 8)  # what has to be done once, for the vocabulary, takes a third of a second
    texts = (folder / "sample.txt").read_text().splitlines()[::1000]
    (folder / "evaluation.txt").write_text("\n".join(texts))
    ways = {
        "before": (few, lambda: find_by_decoding(few, tokenizer, texts)),
        "here": (many, lambda: find_overlaps(many, tokenizer, [str(folder / "evaluation.txt")])),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, (searched, way) in ways.items():
            rates[name].append(searched.n_tokens / 1e6 / seconds(way))
    before, here = (statistics.median(of_turns) for of_turns in rates.values())
    what = "looking for an evaluation set's words, against decoding the text"
    table.row(what, f"{before:.2f} M tokens/s", f"{here:.1f} M tokens/s", f"{here / before:.0f}x")


# --------------------------------------------------------------------------------------------------------------- set-up


def write_synthetic(path: Path, n_sequences: int, made_by: dict, longest: int) -> None:
    """Sequences of random ids, from 12 to `longest` of them."""
    generator = np.random.default_rng(0)
    ids, voc_size = made_by["special_ids"], made_by["vocab_size"]
    with write_token_file(path, made_by) as writer:
        while writer.n_sequences < n_sequences:
            lengths = generator.integers(12, longest + 1, min(1 << 18, n_sequences - writer.n_sequences))
            tokens = generator.integers(voc_size // 2, voc_size, lengths.sum(), dtype=token_dtype(voc_size))
            stops = np.cumsum(lengths)
            tokens[stops - lengths], tokens[stops - 1] = ids["cls"], ids["sep"]
            writer.append(tokens, lengths)


def set_up(path: Path) -> dict[str, float]:
    corpus = open_corpus([path])
    before, start = memory("VmRSS"), time.perf_counter()
    dataset = LmSeqsDataset(corpus, corpus.made_by["special_ids"], 512)
    indexed = time.perf_counter()
    sampler = GroupedBatchSampler(dataset.lengths, batch_size=5)
    ready = time.perf_counter()
    sampler.set_epoch(1)
    return {
        "index": indexed - start,
        "order": ready - indexed,
        "epoch": time.perf_counter() - ready,
        "peak": (memory("VmHWM") - before) / len(dataset),
        "kept": (memory("VmRSS") - before) / len(dataset),
    }


def benchmark_set_up(table: Table, args: argparse.Namespace, folder: Path) -> None:
    path = folder / "synthetic.pickle"
    write_synthetic(
        path, args.set_up_sequences, describe_tokenizer(load_tokenizer(args.tokenizer_name)), args.set_up_tokens
    )
    taken = alone(set_up, path)
    n = f"{args.set_up_sequences:,} sequences"
    table.row(f"indexing {n}, {path.stat().st_size / 1e9:.1f} GB", "", f"{taken['index']:.1f} s", "")
    table.row("their first order, and that of another epoch", "", f"{taken['order']:.1f} s, {taken['epoch']:.1f} s", "")
    table.row("memory a sequence: peak, kept", "", f"{taken['peak']:.1f} B, {taken['kept']:.1f} B", "")
    path.unlink()


def check_disk(args: argparse.Namespace) -> None:
    """Raises InputError if what was asked for does not fit."""
    nearest = next(p for p in (Path(args.work_dir), *Path(args.work_dir).absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    # text and its ids, at most 4 bytes a byte; an old pickle and ours; some 60 tokens a synthetic sequence
    needed = max(5e6 * max(args.growth_megabytes, default=0), 1000 * args.open_sequences, 150 * args.set_up_sequences)
    if needed > free:
        raise InputError(
            f"this takes about {needed / 1e9:,.1f} GB of disk, but {free / 1e9:,.1f} are free in {nearest}: lower "
            f"--growth_megabytes, --open_sequences and --set_up_sequences, or give another --work_dir."
        )


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_input_file(args.file_path, "--file_path", "scripts/make_dump.py makes a text")
    check_output_folder(args.work_dir, "--work_dir")
    check_disk(args)
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name, only_warnings():
        folder, table = Path(name), Table()
        benchmark_tokenizing(table, args, folder)
        benchmark_dump(table, args, folder)
        benchmark_growth(table, args, folder)
        benchmark_opening_and_counting(table, args, folder)
        benchmark_overlap(table, args, folder)
        benchmark_set_up(table, args, folder)


if __name__ == "__main__":
    raise SystemExit(main())
