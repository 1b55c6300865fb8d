"""Counts how often each token occurs in a binarized file; masking prefers the rare ones.

    python scripts/token_counts.py --data_file data/binarized_text.bert-base-uncased.pickle \\
        --token_counts_dump data/token_counts.bert-base-uncased.pickle

The output is a pickle of a plain list of ints, one per entry of the vocabulary.
"""

import argparse
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from dataset import count_tokens, open_token_file
from utils import InputError, logger


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_file", required=True, help="binarized text (scripts/binarized_data.py)")
    parser.add_argument("--token_counts_dump", required=True, help="file to write")
    parser.add_argument("--vocab_size", type=int, help="entries of the vocabulary (default: as the data file says)")
    return parser.parse_args(argv)


@utils.cli
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    file = open_token_file(args.data_file)
    if args.vocab_size is None and file.tokenizer is None:
        raise InputError(f"{args.data_file} does not say its vocabulary's size; give --vocab_size.")
    vocab_size = args.vocab_size or file.tokenizer["vocab_size"]
    counts = count_tokens(file, vocab_size)
    with utils.atomic_write(args.token_counts_dump) as out:
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
