"""Rewrites a DistilBERT as a BERT with the same outputs, for servers and libraries that know only BERT.

    python scripts/to_bert.py --model serialization_dir/my_first_training --output_dir serialization_dir/as_bert

A DistilBERT is a BERT whose token types are zero. The head stays: for masked words, answers, or labels of tokens. A
classifier of whole texts has another head in BERT, so rewrite a student before you fine-tune it.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export_onnx import TEXTS, FirstOutputs, deviation, encode_batch, first_of, load_with_its_head

import utils
from corpus.tokenization import load_tokenizer
from files.atomic import atomic_folder, write_json
from files.paths import check_new_folder
from models.as_bert import as_bert
from models.families import max_length
from models.loading import save_model
from models.sentence_encoder import sentence_transformers_files
from utils import RunError, logger, path

LARGEST_DEVIATION = 1e-3


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--model", type=path, required=True, help="DistilBERT: hub name or folder")
    parser.add_argument("--tokenizer_name", type=path, help="tokenizer (default: the model's)")
    parser.add_argument("--output_dir", type=path, required=True, help="new folder for the BERT")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_new_folder(args.output_dir, "--output_dir")
    tokenizer = load_tokenizer(args.tokenizer_name or args.model)
    model = load_with_its_head(args.model, tokenizer)
    bert = as_bert(model)
    with torch.no_grad():
        expected, found = (
            first_of(FirstOutputs(each)(**encode_batch(tokenizer, each, TEXTS[:1]))).numpy() for each in (model, bert)
        )
    apart = deviation(found, expected)
    if apart > LARGEST_DEVIATION:
        raise RunError(f"as a BERT, {args.model} has other outputs ({100 * apart:.2g} % apart), so nothing is written.")
    length = max_length(bert.config)
    with atomic_folder(Path(args.output_dir)) as folder:
        save_model(bert, tokenizer, folder)
        for name, contents in sentence_transformers_files(args.model, model.config.dim, length).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, contents)
    logger.info("%s: a %s, whose outputs are %.1g %% apart", args.output_dir, type(bert).__name__, 100 * apart)


if __name__ == "__main__":
    raise SystemExit(main())
