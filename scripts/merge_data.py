"""Joins binarized files into one, and turns the pickles of other tools into files that open in milliseconds.

The shards of a text, in their order:

    python scripts/merge_data.py --data_file 'data/binarized_text.bert-base-uncased-*-of-00004.pickle' \\
        --dump_file data/binarized_text.bert-base-uncased.pickle

An old pickled list, which does not say which tokenizer made it (it is loaded whole, once):

    python scripts/merge_data.py --data_file old.pickle --tokenizer_name bert-base-uncased --dump_file new.pickle
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus import TokenCorpus, open_corpus
from dataset import write_token_file
from lm_seqs_dataset import has_boundaries
from tokenization import boundary_ids, describe_tokenizer, load_tokenizer
from utils import InputError, logger


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_file", nargs="+", required=True, help="binarized files or globs, in their order")
    parser.add_argument("--dump_file", required=True, help="file to write")
    parser.add_argument("--tokenizer_name", "--bert_tokenizer", help="hub name or folder (default: as the files say)")
    return parser.parse_args(argv)


def check_boundaries(corpus: TokenCorpus, first: int, offsets: np.ndarray, ids: np.ndarray, tokenizer: dict) -> None:
    """Raises InputError unless every sequence of a block begins and ends as this tokenizer's do."""
    right = has_boundaries(ids, offsets, tokenizer["special_ids"])
    if not right.all():
        begin, end = boundary_ids(tokenizer["special_ids"])
        raise InputError(
            f"{corpus}: sequence {first + int(np.argmin(right))} does not begin with id {begin} and end with {end}, as "
            f"those of the tokenizer {tokenizer['tokenizer']} do; name the one that made it with --tokenizer_name."
        )


@utils.cli
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    utils.quiet_transformers()
    paths = utils.expand_globs(args.data_file)
    if any(os.path.realpath(path) == os.path.realpath(args.dump_file) for path in paths):
        raise InputError(f"--dump_file {args.dump_file} is also a --data_file; give it another name.")
    tokenizer = load_tokenizer(args.tokenizer_name) if args.tokenizer_name else None
    corpus = open_corpus(paths, tokenizer)
    if tokenizer is None and any(file.tokenizer is None for file in corpus.files):
        raise InputError(f"{corpus} does not say which tokenizer made it: give --tokenizer_name.")
    corpus.verify()
    description = corpus.tokenizer or describe_tokenizer(tokenizer)
    with (
        write_token_file(args.dump_file, description) as writer,
        tqdm(total=len(corpus), unit=" sequences", unit_scale=True, dynamic_ncols=True, disable=None) as progress,
    ):
        for first, offsets, ids in corpus.blocks():
            check_boundaries(corpus, first, offsets, ids, description)
            writer.append(ids, np.diff(offsets))
            progress.update(len(offsets) - 1)
    logger.info("%s: %s sequences, %s tokens", args.dump_file, f"{writer.n_sequences:,}", f"{writer.n_tokens:,}")


if __name__ == "__main__":
    raise SystemExit(main())
