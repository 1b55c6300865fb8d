"""Turns a text, one sequence a line, into the binarized file that train.py reads.

    python scripts/binarized_data.py --file_path data/dump.txt --bert_tokenizer bert-base-uncased \\
        --dump_file data/binarized_text

writes data/binarized_text.bert-base-uncased.pickle. The text streams through: memory does not grow with it.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from dataset import TokenFileWriter, boundary_ids, describe_tokenizer, load_tokenizer, tokenizer_short_name
from utils import InputError, logger

LINES_AT_ONCE = 4096
SHOWN_WARNINGS = 5


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--file_path", default="data/dump.txt", help="text file, also .gz .bz2 .xz (%(default)s)")
    parser.add_argument(
        "--tokenizer_name", "--bert_tokenizer", default="bert-base-uncased", help="hub name or folder (%(default)s)"
    )
    parser.add_argument("--tokenizer_type", help="accepted for old command lines; the tokenizer itself tells it")
    parser.add_argument(
        "--dump_file", default="data/binarized_text", help="beginning of the output's name (%(default)s)"
    )
    return parser.parse_args(argv)


def read_batches(path: Path) -> Iterator[tuple[list[str], int]]:
    """Batches of the lines of a UTF-8 text that aren't empty, each with the bytes read for it."""
    n_bad = 0
    numbered = enumerate(utils.read_lines(path), 1)
    while batch := list(itertools.islice(numbered, LINES_AT_ONCE)):
        lines = []
        for number, raw in batch:
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                line = raw.decode("utf-8", "replace")
                n_bad += 1
                if n_bad <= SHOWN_WARNINGS:
                    logger.warning("%s, line %d: not UTF-8 (%s); replaced by U+FFFD", path, number, error.reason)
            if line := line.strip():
                lines.append(line)
        yield lines, sum(len(raw) for _, raw in batch)
    if n_bad > SHOWN_WARNINGS:
        logger.warning("%s: %d lines in all are not UTF-8", path, n_bad)


class Encoder:
    """Text lines -> flat ids with boundary tokens, with all cores. Special tokens in the text are text like any other:
    a line that says "[SEP]" does not end there."""

    def __init__(self, tokenizer) -> None:
        if not tokenizer.is_fast:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has no fast version (tokenizer.json).")
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.begin, self.end = boundary_ids(describe_tokenizer(tokenizer)["special_ids"])

    def __call__(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (sum of lengths,) int32 ids and (n lines,) int64 lengths."""
        ids = [encoding.ids for encoding in self.backend.encode_batch_fast(lines, add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids)) + 2
        stops = np.cumsum(lengths)
        flat = np.empty(lengths.sum(), np.int32)
        is_text = np.ones(flat.size, bool)
        is_text[stops - 1] = is_text[stops - lengths] = False
        flat[stops - lengths], flat[stops - 1] = self.begin, self.end
        flat[is_text] = np.fromiter(itertools.chain.from_iterable(ids), np.int32, is_text.sum())
        return flat, lengths


@utils.cli
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    utils.quiet_transformers()
    source = Path(args.file_path)
    if not source.is_file():
        raise InputError(f"--file_path {source} does not exist; scripts/make_dump.py makes one from text you have.")
    target = f"{args.dump_file}.{tokenizer_short_name(args.tokenizer_name)}.pickle"

    tokenizer = load_tokenizer(args.tokenizer_name)
    encode = Encoder(tokenizer)
    compressed = source.suffix in (".gz", ".bz2", ".xz")
    size = None if compressed else source.stat().st_size
    with (
        TokenFileWriter(target, describe_tokenizer(tokenizer)) as writer,
        tqdm(total=size, unit="B", unit_scale=True, desc=source.name, dynamic_ncols=True, disable=None) as progress,
    ):
        for lines, n_bytes in read_batches(source):
            if lines:
                writer.append(*encode(lines))
            progress.update(n_bytes)
    logger.info(
        "%s: %s sequences, %s tokens, %.1f on average",
        target,
        f"{writer.n_sequences:,}",
        f"{writer.n_tokens:,}",
        writer.n_tokens / writer.n_sequences,
    )


if __name__ == "__main__":
    raise SystemExit(main())
