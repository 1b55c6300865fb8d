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
from transformers import PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from models import FAMILIES, build_student, family_of, half_depth_config, load_language_model
from utils import InputError, logger

# DistilBERT's name of each part of a layer <- BERT's.
BERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model_name",
        "--bert_model",
        default="bert-base-uncased",
        help="the teacher: hub name or folder (%(default)s)",
    )
    parser.add_argument("--model_type", choices=FAMILIES, help="its family; only checked, the model itself tells it")
    parser.add_argument("--dump_checkpoint", default="serialization_dir/init.pth", help="file to write (%(default)s)")
    parser.add_argument(
        "--vocab_transform", action="store_true", help="take the layer before the vocabulary projection too (advised)"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="which layers, counted from 0, lowest first")
    parser.add_argument("--student_type", choices=FAMILIES, help="default: distilbert for a bert, else the teacher's")
    return parser.parse_args(argv)


def spread_layers(depth: int, n: int) -> list[int]:
    """`n` of `depth` layers, evenly spread from the first to the last: 0 2 4 7 9 11 for 6 of 12."""
    return [round(i * (depth - 1) / max(1, n - 1)) for i in range(n)]


def extract_to_distilbert(
    state: dict[str, torch.Tensor], layers: list[int], vocab_transform: bool
) -> dict[str, torch.Tensor]:
    """A BERT's state dict -> its DistilBERT's, by copy. Without `vocab_transform` that layer is left out."""
    source = "bert.embeddings"
    taken = {
        "distilbert.embeddings.word_embeddings.weight": state[f"{source}.word_embeddings.weight"],
        "distilbert.embeddings.position_embeddings.weight": (
            state[f"{source}.position_embeddings.weight"] + state[f"{source}.token_type_embeddings.weight"][0]
        ),
        "vocab_projector.weight": state["cls.predictions.decoder.weight"],
        "vocab_projector.bias": state["cls.predictions.bias"],
    }
    modules = {"distilbert.embeddings.LayerNorm": "bert.embeddings.LayerNorm"}
    for student, teacher in enumerate(layers):
        for ours, theirs in BERT_LAYER.items():
            modules[f"distilbert.transformer.layer.{student}.{ours}"] = f"bert.encoder.layer.{teacher}.{theirs}"
    if vocab_transform:
        modules["vocab_transform"] = "cls.predictions.transform.dense"
        modules["vocab_layer_norm"] = "cls.predictions.transform.LayerNorm"
    for ours, theirs in modules.items():
        for part in ("weight", "bias"):
            taken[f"{ours}.{part}"] = state[f"{theirs}.{part}"]
    return taken


def extract_same_family(state: dict[str, torch.Tensor], layers: list[int], prefix: str) -> dict[str, torch.Tensor]:
    """A state dict with only some of its layers, numbered anew."""
    taken = {}
    for name, value in state.items():
        if not name.startswith(f"{prefix}."):
            taken[name] = value
            continue
        number, rest = name[len(prefix) + 1 :].split(".", 1)
        for student in (i for i, layer in enumerate(layers) if layer == int(number)):
            taken[f"{prefix}.{student}.{rest}"] = value
    return taken


def extract(
    teacher: PreTrainedModel, layers: list[int] | None, vocab_transform: bool, student_type: str | None = None
) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """The student's shape and first weights. Raises: InputError if the teacher has no such layers."""
    depth = teacher.config.num_hidden_layers
    config = half_depth_config(teacher.config, student_type)
    layers = layers if layers is not None else spread_layers(depth, config.num_hidden_layers)
    if not all(0 <= layer < depth for layer in layers):
        raise InputError(f"--layers {' '.join(map(str, layers))}: the teacher's layers are 0 to {depth - 1}.")
    config.num_hidden_layers = len(layers)
    state = teacher.state_dict()
    if (teacher.config.model_type, config.model_type) == ("bert", "distilbert"):
        taken = extract_to_distilbert(state, layers, vocab_transform)
        if teacher.config.layer_norm_eps != 1e-12:
            logger.warning("the teacher's layer norms add %g, a DistilBERT's 1e-12", teacher.config.layer_norm_eps)
    else:
        taken = extract_same_family(state, layers, family_of(config).layers)
    logger.info("layers %s of %d become the student's %d", " ".join(map(str, layers)), depth, len(layers))
    return config, {name: value.clone() for name, value in taken.items()}


@utils.cli
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    utils.quiet_transformers()
    target = Path(args.dump_checkpoint)
    if target.is_dir():
        raise InputError(f"--dump_checkpoint {target} is a folder; give a file name, such as {target}/init.pth.")
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
    shape = target.with_suffix(".json")
    utils.write_json(shape, {**config.to_diff_dict(), "model_type": config.model_type})
    logger.info(
        "%s: %.1f M parameters; train.py --from_pretrained_weights %s --from_pretrained_config %s",
        target, sum(value.numel() for value in state.values()) / 1e6, target, shape,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
