"""Counts how often each token occurs in binarized files; masking prefers the rare ones.

    python scripts/token_counts.py --data_file data/binarized_text.bert-base-uncased.pickle \\
        --token_counts_dump data/token_counts.bert-base-uncased.pickle

The output is a pickle of a plain list of ints, one per entry of the vocabulary. All cores count, and the files'
checksums are verified on the way. Shards with their counts beside them (`.counts`) aren't read: the counts are added.
"""

import argparse
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import TokenCorpus, open_corpus
from corpus.parallel import map_ordered
from corpus.token_counts import count_tokens, sum_saved_counts
from files.atomic import atomic_write
from files.paths import check_output_file
from utils import InputError, integer, logger, n_cores, path

WORTH_A_POOL = 1 << 28  # tokens; fewer are counted sooner than the processes have started


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument(
        "--data_file", type=path, nargs="+", required=True, help="binarized files or globs (scripts/binarized_data.py)"
    )
    parser.add_argument("--token_counts_dump", type=path, required=True, help="file to write")
    parser.add_argument(
        "--vocab_size", type=integer(1, 1 << 24), help="size of the vocabulary (default: from the file)"
    )
    return parser


def count(corpus: TokenCorpus, vocab_size: int) -> np.ndarray:
    """(vocab_size,) int64 occurrences of each token. The checksum is verified beside, and on a large corpus all cores
    count."""
    saved, corpus = sum_saved_counts(corpus, vocab_size)
    worth_it = corpus.on_disk and corpus.n_tokens >= WORTH_A_POOL
    with map_ordered(n_cores() if worth_it else 0) as map_tasks, ThreadPoolExecutor(1) as thread:
        verification = thread.submit(corpus.verify)
        try:
            return saved + count_tokens(corpus, vocab_size, map_tasks)
        finally:
            verification.result()  # damage explains whatever error came of it


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_output_file(args.token_counts_dump, "--token_counts_dump")
    corpus = open_corpus(args.data_file)
    if args.vocab_size is None and corpus.made_by is None:
        raise InputError(f"{corpus} does not say its vocabulary's size; give --vocab_size.")
    vocab_size = args.vocab_size or corpus.made_by["vocab_size"]
    counts = count(corpus, vocab_size)
    with atomic_write(args.token_counts_dump) as out:
        pickle.dump(counts.tolist(), out, protocol=pickle.HIGHEST_PROTOCOL)
    logger.info(
        "%s: %s tokens, %s of %s entries occur",
        args.token_counts_dump,
        f"{counts.sum():,}",
        f"{(counts > 0).sum():,}",
        f"{vocab_size:,}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
