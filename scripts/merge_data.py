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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import TokenCorpus, expand_globs, open_corpus
from corpus.tokenization import boundary_ids, describe_tokenizer, has_boundaries, load_tokenizer
from dataset import write_token_file
from files.paths import check_output_file
from utils import InputError, logger, path


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--data_file", type=path, nargs="+", required=True, help="binarized files or globs, in order")
    parser.add_argument("--dump_file", type=path, required=True, help="file to write")
    parser.add_argument(
        "--tokenizer_name",
        "--bert_tokenizer",
        type=path,
        help="hub name or folder (default: as the files say)",
    )
    return parser


def check_boundaries(corpus: TokenCorpus, first: int, offsets: np.ndarray, ids: np.ndarray, made_by: dict) -> None:
    """Raises InputError unless every sequence of a block begins and ends as this tokenizer's do."""
    right = has_boundaries(ids, offsets, made_by["special_ids"])
    if not right.all():
        begin, end = boundary_ids(made_by["special_ids"])
        raise InputError(
            f"{corpus}: sequence {first + int(np.argmin(right))} does not begin with id {begin} and end with {end}, as "
            f"those of the tokenizer {made_by['tokenizer']} do; name the one that made it with --tokenizer_name."
        )


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    paths = expand_globs(args.data_file)
    if any(os.path.realpath(name) == os.path.realpath(args.dump_file) for name in paths):
        raise InputError(f"--dump_file {args.dump_file} is also a --data_file; give it another name.")
    check_output_file(args.dump_file, "--dump_file")
    tokenizer = load_tokenizer(args.tokenizer_name) if args.tokenizer_name else None
    corpus = open_corpus(paths, tokenizer)
    if tokenizer is None and any(file.made_by is None for file in corpus.files):
        raise InputError(f"{corpus} does not say which tokenizer made it: give --tokenizer_name.")
    corpus.verify()
    made_by = corpus.made_by or describe_tokenizer(tokenizer)
    with (
        write_token_file(args.dump_file, made_by) as writer,
        utils.progress_bar(total=len(corpus), unit=" sequences", unit_scale=True) as progress,
    ):
        for first, offsets, ids in corpus.blocks():
            check_boundaries(corpus, first, offsets, ids, made_by)
            writer.append(ids, np.diff(offsets))
            progress.update(len(offsets) - 1)
    logger.info("%s: %s sequences, %s tokens", args.dump_file, f"{writer.n_sequences:,}", f"{writer.n_tokens:,}")


if __name__ == "__main__":
    raise SystemExit(main())
