"""Trains a WordPiece vocabulary on a text and writes it as a tokenizer that `from_pretrained` loads.

    python scripts/train_vocabulary.py --file_path data/dump.txt --vocab_size 8192 --output my-tokenizer

Only for a teacher of your own: a student always shares its teacher's vocabulary. The same text gives the same
vocabulary, down to the numbers of its entries.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.tokenization import load_tokenizer
from files.atomic import replacing_files
from files.paths import check_input_file, check_output_folder
from utils import InputError, integer, logger, path, reason_of

MOST_LETTERS = 1000  # the rarer ones become [UNK]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--file_path", type=path, default="data/dump.txt", help="text, one sequence per line (%(default)s)")
    add("--vocab_size", type=integer(10, 1 << 24), default=30522, help="number of entries (%(default)s)")
    add("--output", type=path, required=True, help="folder to write")
    add("--max_length", type=integer(12, 1 << 20), default=512, help="longest sequence of its models (%(default)s)")
    add("--cased", action="store_true", help="keep capitals and accents")
    add("--force", action="store_true", help="replace another vocabulary in --output")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_input_file(args.file_path, "--file_path", "scripts/make_dump.py makes one")
    check_output_folder(args.output, "--output")

    from transformers import BertTokenizerFast

    try:
        vocabulary = train(args.file_path, args.vocab_size, not args.cased)
    except Exception as error:  # what the library written in Rust raises is no OSError
        raise InputError(f"--file_path {args.file_path} can't be read ({reason_of(error)}).") from None
    tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=not args.cased, model_max_length=args.max_length)
    is_there = not args.force and (Path(args.output) / "tokenizer.json").exists()
    if is_there and load_tokenizer(args.output).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"--output {args.output} holds another vocabulary, which texts may have been made with: give another "
            f"folder, or --force to replace it."
        )
    with replacing_files(Path(args.output)) as temporary:
        tokenizer.save_pretrained(temporary)
    logger.info("%s: %s entries", args.output, f"{len(tokenizer):,}")


def train(file: str, vocab_size: int, lowercase: bool) -> dict[str, int]:
    """Entry -> number.

    The library numbers the letters that continue a word ("##a") in an order that it draws anew each time, and decides
    between equally frequent pairs by these numbers. So they are found first, and then given to it in order.
    """
    from tokenizers import BertWordPieceTokenizer

    bars = sys.stderr.isatty() and not utils.LOG_FILE

    def trained(vocab_size: int, special: list[str], letters: list[str]) -> dict[str, int]:
        trainer = BertWordPieceTokenizer(lowercase=lowercase)
        limits = {"vocab_size": vocab_size, "limit_alphabet": len(letters), "initial_alphabet": letters}
        trainer.train([file], special_tokens=special, show_progress=bars, **limits)
        return trainer.get_vocab()

    normalizer, counts = BertWordPieceTokenizer(lowercase=lowercase).normalizer, Counter()
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            counts.update(normalizer.normalize_str(line))
    by_count = sorted(counts, key=lambda letter: (-counts[letter], letter))
    letters = sorted(letter for letter in by_count[:MOST_LETTERS] if not letter.isspace())
    continuing = sorted(entry for entry in trained(0, SPECIAL, letters) if entry.startswith("##"))
    return trained(vocab_size, [*SPECIAL, *continuing], letters)


if __name__ == "__main__":
    raise SystemExit(main())
