"""The command line of train.py, and what the flags alone can get wrong.

Names are those of both generations of the original scripts.
"""

import argparse
import dataclasses
from pathlib import Path

import utils
from models.families import FAMILIES
from models.loading import LIMITS
from training.distributed import add_precision_flags
from training.recipe import Recipe
from utils import InputError, integer, n_cores, path, real

DEFAULT_TEACHER = "bert-base-uncased"

FRACTION = real(0, 1)
SWITCH = argparse.BooleanOptionalAction

# Flag of the first generation -> attribute of a configuration, as most families and as DistilBERT call it.
ARCHITECTURE = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "max_position_embeddings": ("max_position_embeddings", "max_position_embeddings"),
    "n_layers": ("num_hidden_layers", "n_layers"),
    "n_heads": ("num_attention_heads", "n_heads"),
    "dim": ("hidden_size", "dim"),
    "hidden_dim": ("intermediate_size", "hidden_dim"),
    "activation": ("hidden_act", "activation"),
    "initializer_range": ("initializer_range", "initializer_range"),
    "sinusoidal_pos_embds": (None, "sinusoidal_pos_embds"),
    "tie_weights_": ("tie_word_embeddings", "tie_word_embeddings"),
}
# Numbers of the recipe whose defaults depend on the student or on the machine (see `configurations.with_defaults`).
RESOLVED_LATER = ("alpha_mlm", "alpha_clm", "tokens_per_micro_batch", "num_workers")


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = utils.make_parser(
        description, prog="train.py", usage="%(prog)s --dump_path FOLDER --data_file FILE [flags]"
    )
    for add in (
        _add_file_flags,
        _add_teacher_flags,
        _add_student_flags,
        _add_loss_flags,
        _add_masking_flags,
        _add_optimization_flags,
        _add_machine_flags,
        _add_interval_flags,
        _add_failure_flags,
    ):
        add(parser)
    given = {field.name: field.default for field in dataclasses.fields(Recipe)}
    parser.set_defaults(**{name: default for name, default in given.items() if name not in RESOLVED_LATER})
    return parser


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--dump_path", type=path, required=True, help="folder for all that the run writes")
    group.add_argument(
        "--data_file",
        type=path,
        nargs="+",
        required=True,
        help="binarized text to train on (scripts/binarized_data.py): files, or globs such as 'text-*.pickle'",
    )
    group.add_argument(
        "--token_counts", type=path, help="counts of that text (scripts/token_counts.py); default: the run counts"
    )
    group.add_argument(
        "--leave_out",
        type=path,
        help="list of sequences that evaluation sets share, which are not trained on (scripts/corpus_doctor.py "
        "--overlap_file)",
    )
    group.add_argument(
        "--valid_data_file",
        type=path,
        nargs="+",
        help="binarized text to evaluate on; default: --valid_share of --data_file",
    )
    group.add_argument(
        "--valid_share",
        type=FRACTION,
        default=0.01,
        help="share of the sequences held out for evaluation, 500 at most; 0: no evaluation (default: %(default)s)",
    )
    group.add_argument("--force", action="store_true", help="overwrite the run that --dump_path holds")
    group.add_argument(
        "--resume", action="store_true", help="continue from the state in --dump_path, or start if there is none"
    )


def _add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher and tokenizer (hub names or local folders)")
    group.add_argument("--teacher_name", "--bert_model", type=path, help=f"the teacher (default: {DEFAULT_TEACHER})")
    group.add_argument("--teacher_type", choices=FAMILIES, help="its family; only checked against the teacher")
    group.add_argument(
        "--tokenizer_name", "--bert_tokenizer", type=path, help="default: the teacher's, else the student's"
    )
    group.add_argument("--tokenizer_type", choices=FAMILIES, help="accepted for old command lines; not needed")


def _add_student_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("student (default: the teacher's shape at half the depth, random weights)")
    group.add_argument("--student_type", choices=FAMILIES, help="default: distilbert for a bert, else the teacher's")
    group.add_argument(
        "--student_config", "--from_pretrained_config", type=path, help="its shape: a JSON file, folder or hub name"
    )
    group.add_argument(
        "--student_pretrained_weights",
        "--from_pretrained_weights",
        type=path,
        help="its first weights: a .pth file (scripts/extract_for_distil.py), or a folder or hub name to train on",
    )
    shape = {key: integer(*limits) for key, limits in LIMITS.items()}
    for flag, kind, text in (
        ("--n_layers", shape["num_hidden_layers"], "layers"),
        ("--n_heads", shape["num_attention_heads"], "attention heads"),
        ("--dim", shape["hidden_size"], "width of the hidden states"),
        ("--hidden_dim", shape["intermediate_size"], "width of the feed-forward layers"),
        ("--dropout", real(0, 0.99), "dropout of layers and embeddings"),
        ("--attention_dropout", real(0, 0.99), "dropout of attention weights"),
        ("--activation", str, "activation of the feed-forward layers, such as gelu"),
        ("--vocab_size", shape["vocab_size"], "entries of the vocabulary (default: the tokenizer's)"),
        ("--max_position_embeddings", shape["max_position_embeddings"], "longest sequence"),
        ("--initializer_range", real(*LIMITS["initializer_range"]), "standard deviation of random initial weights"),
    ):
        group.add_argument(flag, type=kind, help=text)
    group.add_argument("--sinusoidal_pos_embds", action=SWITCH, help="positions start as sinusoids (distilbert only)")
    group.add_argument("--tie_weights_", action=SWITCH, help="one matrix as embedding and vocabulary projection")
    group.add_argument(
        "--freeze_pos_embs",
        action=SWITCH,
        help="keep the position embeddings as they start (default: where a teacher's losses train a distilbert)",
    )
    group.add_argument("--freeze_token_type_embds", action=SWITCH, default=False, help="same for token types")


def _add_loss_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss: the weights of its terms, 0 to leave one out")
    group.add_argument("--alpha_ce", type=real(0, 1e6), help="KL to the teacher's predictions (%(default)s)")
    group.add_argument(
        "--alpha_mlm", type=real(0, 1e6), help=f"masked words (default: {Recipe.alpha_mlm}; 0 for causal models)"
    )
    group.add_argument(
        "--alpha_clm", type=real(0, 1e6), help=f"next words (default: {Recipe.alpha_mlm} for causal models, else 0)"
    )
    group.add_argument("--alpha_mse", type=real(0, 1e6), help="squared error of the logits (%(default)s)")
    group.add_argument("--alpha_cos", type=real(0, 1e6), help="direction of the last hidden states (%(default)s)")
    group.add_argument(
        "--alpha_relation",
        type=real(0, 1e6),
        help="relations between tokens, MiniLMv2's loss: how queries, keys and values of the last layer go with one "
        "another (%(default)s)",
    )
    group.add_argument(
        "--relation_layer",
        type=integer(0, 1000),
        help="of the teacher, counted from 0, whose relations the student learns (default: the last; for deep teachers "
        "the paper found one below better, 20 of BERT-large's 24)",
    )
    group.add_argument(
        "--relation_heads",
        type=integer(1, 1 << 12),
        help="parts that queries, keys and values are cut into; must divide their widths (default: 48, or the next "
        "smaller number that does)",
    )
    group.add_argument("--temperature", type=real(0.01, 1000), help="of both softmaxes in the KL (%(default)s)")
    group.add_argument(
        "--restrict_ce_to_mask",
        action="store_true",
        help="KL and MSE at masked positions only: faster, and better in short runs (docs/recipe.md)",
    )


def _add_masking_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("masking")
    group.add_argument(
        "--mlm", action=SWITCH, help="masked (--no-mlm: causal) language model (default: what the student is)"
    )
    group.add_argument(
        "--mlm_mask_prop", type=real(0, 1, low_allowed=False), help="share of tokens chosen (%(default)s)"
    )
    group.add_argument("--word_mask", type=FRACTION, help="of those, share masked (%(default)s)")
    group.add_argument("--word_keep", type=FRACTION, help="of those, share kept (%(default)s)")
    group.add_argument("--word_rand", type=FRACTION, help="of those, share replaced at random (%(default)s)")
    group.add_argument(
        "--mlm_smoothing", type=real(0, 10), help="chosen in proportion to count^-smoothing; 0: evenly (%(default)s)"
    )
    group.add_argument(
        "--whole_word_mask", action=SWITCH, help="choose whole words, and not pieces of them (default: off)"
    )


def _add_optimization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument("--n_epoch", type=integer(1), help="times through the text (%(default)s)")
    group.add_argument("--batch_size", type=integer(1), help="sequences a batch (%(default)s)")
    group.add_argument("--tokens_per_batch", type=integer(1), help="a batch by tokens, padding included, instead")
    group.add_argument(
        "--gradient_accumulation_steps", type=integer(1), help="batches that a step takes on each process (%(default)s)"
    )
    group.add_argument("--shuffle", action=SWITCH, help="draw a new order each epoch (default: on)")
    group.add_argument("--group_by_size", action=SWITCH, help="sequences of similar length together (default: on)")
    group.add_argument("--learning_rate", type=real(0, 100, low_allowed=False), help="peak (%(default)s)")
    group.add_argument("--warmup_prop", type=FRACTION, help="share of the steps up to the peak (%(default)s)")
    group.add_argument("--weight_decay", type=real(0, 10), help="not of biases and layer norms (%(default)s)")
    group.add_argument("--adam_epsilon", type=real(0, 1, low_allowed=False), help="(%(default)s)")
    group.add_argument(
        "--max_grad_norm", type=real(0, 1e9, low_allowed=False), help="gradients are clipped to it (%(default)s)"
    )
    group.add_argument("--seed", type=integer(0, 2**63 - 1), help="of order, masks, dropout, weights (%(default)s)")


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add_precision_flags(group)
    group.add_argument("--fp16_opt_level", help="accepted for old command lines; there is one level now")
    group.add_argument(
        "--tokens_per_micro_batch",
        type=integer(0),
        help="the sequences of a step go through the models sorted by length, in micro-batches of so many tokens; this "
        "changes no more than rounding and the draw of dropout (default: by the GPU's memory, 512 on a CPU; 0: a batch "
        "is a micro-batch)",
    )
    group.add_argument(
        "--compile", action=SWITCH, default=False, help="torch.compile the models: minutes at the start (default: off)"
    )
    group.add_argument(
        "--n_gpu", type=integer(0, 1 << 20), help="GPUs over all machines, 0 for the CPU (default: what there is)"
    )
    group.add_argument("--local_rank", "--local-rank", type=integer(-1, 1 << 20), default=-1, help="set by launchers")
    group.add_argument(
        "--num_workers",
        type=integer(0, 4 * n_cores()),
        help="processes that prepare batches (default: 4 with a GPU, else 0)",
    )
    group.add_argument(
        "--peak_tflops",
        type=real(0, 1e6, low_allowed=False),
        help="of the device, for the MFU (default: see models/flops.py)",
    )
    group.add_argument(
        "--dry_run",
        type=integer(1),
        metavar="N",
        help="only time N steps of this run, and say what the whole takes; writes nothing to --dump_path",
    )


def _add_interval_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("intervals, in steps")
    group.add_argument("--log_interval", type=integer(1), help="default: 100 lines a run, but at least one every 500")
    group.add_argument(
        "--eval_interval",
        type=integer(1),
        help="default: 20 evaluations a run, or down to 4, to read at most a quarter as much text as training does",
    )
    group.add_argument(
        "--checkpoint_interval", type=integer(1), help="default: every 15 minutes; always after an epoch"
    )
    group.add_argument("--keep_checkpoints", type=integer(1, 1000), help="how many of the newest (%(default)s)")


def _add_failure_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("failures")
    group.add_argument(
        "--max_bad_steps",
        type=integer(0),
        help="steps whose loss or gradient is not finite are left out; this many are allowed between two log lines "
        "(%(default)s; some are usual with --fp16)",
    )
    group.add_argument(
        "--on_full_disk",
        choices=("stop", "continue"),
        help="when a checkpoint can't be written: stop, or continue without until there is room (%(default)s)",
    )


def sanity_checks(args: argparse.Namespace) -> None:
    """Raises InputError if flags contradict each other; each one's own range is checked where it is defined."""
    total = args.word_mask + args.word_keep + args.word_rand
    if abs(total - 1) > 1e-6:
        raise InputError(f"--word_mask, --word_keep and --word_rand must add up to 1, not to {total:g}.")
    if args.force and args.resume:
        raise InputError("--force starts over and --resume continues: give one of them.")
    utils.check_needed(args, make_parser(""), "alpha_relation", "relation_layer", "relation_heads")
    if args.tokens_per_batch and not args.group_by_size:
        raise InputError("--tokens_per_batch needs sequences grouped by length: leave out --no-group_by_size.")
    given = [f"--{name}" for name in ARCHITECTURE if getattr(args, name) is not None]
    student = whole_model(args.student_pretrained_weights)
    shape = args.student_config or student
    if given and shape:
        raise InputError(f"{given[0]} contradicts {shape}, which says the student's shape: give one of them.")
    if args.student_config and student:
        raise InputError(
            f"--student_config contradicts --student_pretrained_weights {student}, a whole model with a shape of "
            f"its own: give one of them."
        )


def whole_model(weights: str | None) -> str | None:
    """`--student_pretrained_weights` if it names a whole model with its own shape; None for a file of tensors."""
    if weights is None or Path(weights).is_file() or weights.endswith((".pth", ".pt", ".bin")):
        return None
    return weights
