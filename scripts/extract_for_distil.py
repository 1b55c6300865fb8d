"""Takes some of a teacher's layers as the first weights of its student.

    python scripts/extract_for_distil.py --bert_model bert-base-uncased \\
        --dump_checkpoint serialization_dir/init.pth --vocab_transform

writes init.pth, for train.py --from_pretrained_weights, and beside it init.json, the student's shape, for
--from_pretrained_config where that is not half the teacher's depth.

Of twelve layers 0 2 4 7 9 11 are taken, of another number every second, evenly spread. A DistilBERT has no token types:
BERT's row 0, which is added to every position, is folded into the table of positions, so nothing is lost.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from models.families import FAMILIES
from models.loading import load_language_model
from models.student import build_student, extract
from utils import InputError, integer, logger, path


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument(
        "--model_name",
        "--bert_model",
        type=path,
        default="bert-base-uncased",
        help="the teacher: hub name or folder (%(default)s)",
    )
    parser.add_argument("--model_type", choices=FAMILIES, help="its family; only checked, the model itself tells it")
    parser.add_argument(
        "--dump_checkpoint", type=path, default="serialization_dir/init.pth", help="file to write (%(default)s)"
    )
    parser.add_argument(
        "--vocab_transform", action="store_true", help="take the layer before the vocabulary projection too (advised)"
    )
    parser.add_argument("--layers", type=integer(0, 1000), nargs="+", help="which layers, counted from 0, lowest first")
    parser.add_argument("--student_type", choices=FAMILIES, help="default: distilbert for a bert, else the teacher's")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    target = Path(args.dump_checkpoint)
    utils.check_output_file(target, "--dump_checkpoint")
    shape = target.with_suffix(".json")
    utils.check_output_file(shape, "--dump_checkpoint, the student's shape beside it:")
    if shape == target:
        raise InputError(f"--dump_checkpoint {target}: that is the name of the shape beside the weights; give a .pth.")
    teacher = load_language_model(args.model_name, "teacher", head_required=True)
    if args.model_type and teacher.config.model_type != args.model_type:
        raise InputError(f"--model_type {args.model_type}: {args.model_name} is a {teacher.config.model_type}.")
    config, state = extract(teacher, args.layers, args.vocab_transform, args.student_type)
    if teacher.config.model_type == "bert" and config.model_type == "distilbert":
        logger.info("token type 0 is folded into the positions; the other token types and the pooler are left out")
        if not args.vocab_transform:
            logger.info("without --vocab_transform the layer before the vocabulary projection starts at random")
    with utils.atomic_write(target) as file:
        torch.save(state, file)
    build_student(config, str(target))  # reads it back and checks that every tensor fits
    utils.write_json(shape, {**config.to_diff_dict(), "model_type": config.model_type})
    logger.info(
        "%s: %.1f M parameters; train.py --from_pretrained_weights %s --from_pretrained_config %s",
        target, sum(value.numel() for value in state.values()) / 1e6, target, shape,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
