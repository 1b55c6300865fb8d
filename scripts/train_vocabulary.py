"""Trains a WordPiece vocabulary on a text and writes it as a tokenizer that `from_pretrained` loads.

    python scripts/train_vocabulary.py --file_path data/dump.txt --vocab_size 8192 --output my-tokenizer

Only for a teacher of one's own: a student always shares its teacher's vocabulary.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from training.folders import replacing_files
from utils import InputError, integer, logger, path, reason_of


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument(
        "--file_path", type=path, default="data/dump.txt", help="text, one sequence a line (%(default)s)"
    )
    parser.add_argument("--vocab_size", type=integer(10, 1 << 24), default=30522, help="entries (%(default)s)")
    parser.add_argument("--output", type=path, required=True, help="folder to write")
    parser.add_argument(
        "--max_length", type=integer(12, 1 << 20), default=512, help="longest sequence of its models (%(default)s)"
    )
    parser.add_argument("--cased", action="store_true", help="keep capitals and accents")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    utils.check_input_file(args.file_path, "--file_path", "scripts/make_dump.py makes one")
    utils.check_output_folder(args.output, "--output")

    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trainer = BertWordPieceTokenizer(lowercase=not args.cased)
    bars = sys.stderr.isatty() and not utils.LOG_FILE
    try:
        trainer.train([args.file_path], vocab_size=args.vocab_size, show_progress=bars)
    except Exception as error:  # what the library written in Rust raises is no OSError
        raise InputError(f"--file_path {args.file_path} can't be read ({reason_of(error)}).") from None
    tokenizer = BertTokenizerFast(
        vocab=trainer.get_vocab(), do_lower_case=not args.cased, model_max_length=args.max_length
    )
    with replacing_files(Path(args.output)) as temporary:
        tokenizer.save_pretrained(temporary)
    logger.info("%s: %s entries", args.output, f"{len(tokenizer):,}")


if __name__ == "__main__":
    raise SystemExit(main())
