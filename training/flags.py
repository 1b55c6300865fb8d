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
from utils import InputError, integer, n_cores, path, real, words

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
RESOLVED_LATER = ("alpha_mlm", "alpha_clm", "tokens_per_micro_batch", "padding_free", "num_workers")


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = utils.make_parser(
        description, prog="train.py", usage="%(prog)s --dump_path FOLDER --data_file FILE [flags]"
    )
    for add_group in (
        _add_file_flags, _add_teacher_flags, _add_student_flags, _add_loss_flags, _add_masking_flags,
        _add_optimization_flags, _add_machine_flags, _add_interval_flags, _add_failure_flags,
        _add_card_flags,
    ):  # fmt: skip
        add_group(parser)
    given = {field.name: field.default for field in dataclasses.fields(Recipe)}
    parser.set_defaults(**{name: default for name, default in given.items() if name not in RESOLVED_LATER})
    return parser


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("--dump_path", type=path, required=True, help="folder that the run writes to")
    add("--data_file", type=path, nargs="+", required=True, help="binarized text to train on: files or globs")
    add(
        "--data_weights",
        type=real(0, 1e4, low_allowed=False),
        nargs="+",
        help="how many times an epoch draws the sequences of each --data_file, such as 2 0.5 (default: once each)",
    )
    add(
        "--source_exponent",
        type=real(0, 1),
        help="draw from each --data_file in proportion to its tokens to this power, as XLM does with 0.7",
    )
    add("--token_counts", type=path, help="token counts of this text, from token_counts.py (default: count now)")
    add("--leave_out", type=path, help="file of sequences not to train on, from corpus_doctor.py --overlap_file")
    add("--valid_data_file", type=path, nargs="+", help="text to evaluate on (default: a share of --data_file)")
    add(
        "--valid_share",
        type=FRACTION,
        default=0.01,
        help="share of --data_file to evaluate on, 500 sequences at most; 0 for none (%(default)s)",
    )
    add("--force", action="store_true", help="overwrite the run in --dump_path")
    add("--resume", action="store_true", help="continue the run in --dump_path, or start one if there is none")


def _add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("teacher and tokenizer (hub names or local folders)").add_argument
    add("--teacher_name", "--bert_model", type=path, help=f"the teacher (default: {DEFAULT_TEACHER})")
    add("--teacher_type", choices=FAMILIES, help="family of the teacher; only checked")
    add("--tokenizer_name", "--bert_tokenizer", type=path, help="default: the teacher's, else the student's")
    add("--tokenizer_type", choices=FAMILIES, help="ignored; accepted for old command lines")


def _add_student_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("student (default: half the teacher's depth, random weights)").add_argument
    add("--student_type", choices=FAMILIES, help="family (default: the teacher's, but distilbert for a bert)")
    add("--student_config", "--from_pretrained_config", type=path, help="shape: a JSON file, folder, or hub name")
    add(
        "--student_pretrained_weights",
        "--from_pretrained_weights",
        type=path,
        help="initial weights: a .pth file, or the folder or hub name of a model to train further",
    )
    shape = {key: integer(*limits) for key, limits in LIMITS.items()}
    for flag, kind, text in (
        ("--n_layers", shape["num_hidden_layers"], "number of layers"),
        ("--n_heads", shape["num_attention_heads"], "number of attention heads"),
        ("--dim", shape["hidden_size"], "width of the hidden states"),
        ("--hidden_dim", shape["intermediate_size"], "width of the feed-forward layers"),
        ("--dropout", real(0, 0.99), "dropout probability in layers and embeddings"),
        ("--attention_dropout", real(0, 0.99), "dropout probability of attention weights"),
        ("--activation", str, "activation function of the feed-forward layers, such as gelu"),
        ("--vocab_size", shape["vocab_size"], "size of the vocabulary (default: the tokenizer's)"),
        ("--max_position_embeddings", shape["max_position_embeddings"], "longest sequence, in tokens"),
        ("--initializer_range", real(*LIMITS["initializer_range"]), "standard deviation of random initial weights"),
    ):
        add(flag, type=kind, help=text)
    add("--sinusoidal_pos_embds", action=SWITCH, help="start from sinusoidal position embeddings (distilbert only)")
    add("--tie_weights_", action=SWITCH, help="use one matrix as embeddings and projection onto the vocabulary")
    add(
        "--freeze_pos_embs",
        action=SWITCH,
        help="don't train the position embeddings (default: on if a distilbert learns from a teacher)",
    )
    add("--freeze_token_type_embds", action=SWITCH, default=False, help="don't train the token type embeddings")


def _add_loss_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss (each alpha is the weight of a term; 0 leaves it out)").add_argument
    add("--alpha_ce", type=real(0, 1e6), help="KL divergence from the teacher's predictions (%(default)s)")
    add("--alpha_mlm", type=real(0, 1e6), help=f"masked words (default: {Recipe.alpha_mlm}; 0 for causal models)")
    add("--alpha_clm", type=real(0, 1e6), help=f"next words (default: {Recipe.alpha_mlm} for causal models, else 0)")
    add("--alpha_mse", type=real(0, 1e6), help="squared error of the logits (%(default)s)")
    add("--alpha_cos", type=real(0, 1e6), help="cosine distance between last hidden states (%(default)s)")
    add("--alpha_relation", type=real(0, 1e6), help="relations between tokens, as in MiniLMv2 (%(default)s)")
    add(
        "--relation_layer",
        type=integer(0, 1000),
        help="layer of the teacher whose relations count, from 0 (default: the last; for BERT-large, with 24 layers, "
        "the paper found 20 better)",
    )
    add(
        "--relation_heads",
        type=integer(1, 1 << 12),
        help="number of relation heads, a divisor of the widths of queries, keys, and values (default: 48 or less)",
    )
    add("--alpha_layers", type=real(0, 1e6), help="squared distance of all hidden states, as in TinyBERT (%(default)s)")
    add(
        "--teacher_layers",
        type=integer(0, 1000),
        nargs="+",
        help="layer of the teacher that each layer of the student follows (default: the one it was taken from, if the "
        "JSON of extract_for_distil.py is given; otherwise evenly spread)",
    )
    add(
        "--alpha_pooled",
        type=real(0, 1e6),
        help="cosine distance between the vectors of whole texts, pooled as the teacher pools them and measured from "
        "their mean; for sentence encoders (%(default)s)",
    )
    add(
        "--keep_dense",
        action="store_true",
        help="if the student's width differs, keep the learned map to the teacher's width in the output, as a module "
        "of sentence-transformers, so that vectors of both can be compared",
    )
    add("--temperature", type=real(0.01, 1000), help="temperature of both softmaxes in the KL (%(default)s)")
    add(
        "--restrict_ce_to_mask",
        action="store_true",
        help="KL and MSE at masked tokens only: faster, and better in short runs",
    )


def _add_masking_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("masking").add_argument
    add("--mlm", action=SWITCH, help="masked language model, with --no-mlm a causal one (default: as the student)")
    add("--mlm_mask_prop", type=real(0, 1, low_allowed=False), help="share of tokens to predict (%(default)s)")
    add("--word_mask", type=FRACTION, help="share of these to replace with [MASK] (%(default)s)")
    add("--word_keep", type=FRACTION, help="share of these to leave as they are (%(default)s)")
    add("--word_rand", type=FRACTION, help="share of these to replace with a random token (%(default)s)")
    add(
        "--mlm_smoothing",
        type=real(0, 10),
        help="prefer rare words: choose tokens in proportion to count^-smoothing; 0 chooses evenly (%(default)s)",
    )
    add("--whole_word_mask", action=SWITCH, help="choose whole words instead of pieces (default: off)")


def _add_optimization_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--n_epoch", type=integer(1), help="how many times to go through the text (%(default)s)")
    add("--batch_size", type=integer(1), help="sequences per batch (%(default)s)")
    add("--tokens_per_batch", type=integer(1), help="tokens per batch, padding included; replaces --batch_size")
    add("--gradient_accumulation_steps", type=integer(1), help="batches per step on each process (%(default)s)")
    add("--shuffle", action=SWITCH, help="draw a new order in each epoch (default: on)")
    add("--group_by_size", action=SWITCH, help="put sequences of similar length into a batch (default: on)")
    add("--learning_rate", type=real(0, 100, low_allowed=False), help="peak learning rate (%(default)s)")
    add("--warmup_prop", type=FRACTION, help="share of the steps that warm up to the peak (%(default)s)")
    add("--weight_decay", type=real(0, 10), help="weight decay, except of biases and layer norms (%(default)s)")
    add("--adam_epsilon", type=real(0, 1, low_allowed=False), help="epsilon of AdamW (%(default)s)")
    add("--max_grad_norm", type=real(0, 1e9, low_allowed=False), help="clip gradients to this norm (%(default)s)")
    add("--seed", type=integer(0, 2**63 - 1), help="random seed of order, masks, dropout, and weights (%(default)s)")


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add_precision_flags(group)
    add("--fp16_opt_level", help="ignored; accepted for old command lines")
    add(
        "--tokens_per_micro_batch",
        type=integer(0),
        help="tokens that go through the models at once. The sequences of a step are sorted by length and cut into "
        "micro-batches of this size, which changes nothing but rounding and the draw of dropout (default: by the GPU's "
        "memory; 1,024 on a CPU; 0 makes each batch a micro-batch)",
    )
    add(
        "--padding_free",
        action=SWITCH,
        help="put the sequences of a micro-batch one after the other instead of padding them (default: on a GPU, if "
        "the models support it; slow on a CPU)",
    )
    add(
        "--compile",
        action=SWITCH,
        default=False,
        help="compile the layers with torch.compile, which takes a while at the start (default: off)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="use slower kernels, so that a GPU repeats a run bit for bit, also after --resume (a CPU always does)",
    )
    add("--n_gpu", type=integer(0, 1 << 20), help="GPUs on all machines; 0 for the CPU (default: what there is)")
    add("--local_rank", "--local-rank", type=integer(-1, 1 << 20), default=-1, help="set by launchers")
    add("--num_workers", type=integer(0, 4 * n_cores()), help="processes that prepare batches (default: 4 with a GPU)")
    add(
        "--peak_tflops",
        type=real(0, 1e6, low_allowed=False),
        help="peak TFLOP/s of the device, for the MFU (default: from models/flops.py)",
    )
    add(
        "--dry_run",
        type=integer(1),
        metavar="N",
        help="only time N steps, and print what the whole run will take; writes nothing to --dump_path",
    )


def _add_interval_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("intervals, in steps").add_argument
    add("--log_interval", type=integer(1), help="between log lines (default: 100 a run, at least one every 500 steps)")
    add(
        "--eval_interval",
        type=integer(1),
        help="between evaluations (default: 20 per run, or as few as 4 if they would read more than a quarter as "
        "much text as the training)",
    )
    add(
        "--checkpoint_interval",
        type=integer(1),
        help="between checkpoints (default: 15 minutes; after each epoch too)",
    )
    add("--keep_checkpoints", type=integer(1, 1000), help="number of checkpoints to keep, the newest (%(default)s)")


def _add_failure_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("failures").add_argument
    add(
        "--max_bad_steps",
        type=integer(0),
        help="how many steps with a loss or gradient that is not finite to leave out between two log lines before the "
        "run stops (%(default)s; a few are normal with --fp16)",
    )
    add(
        "--on_full_disk",
        choices=("stop", "continue"),
        help="when a checkpoint can't be written: stop, or go on without it until there is room (%(default)s)",
    )


def _add_card_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model card: what the hub shows beside the results").add_argument
    add("--language", type=words, nargs="+", help="language codes of the text, such as en")
    add("--license", type=words, help="license of the student, such as apache-2.0")
    add("--datasets", type=words, nargs="+", help="hub names of the data sets that the text is from")


def sanity_checks(args: argparse.Namespace) -> None:
    """Raises InputError if flags contradict each other; each one's own range is checked where it is defined."""
    total = args.word_mask + args.word_keep + args.word_rand
    if abs(total - 1) > 1e-6:
        raise InputError(f"--word_mask, --word_keep and --word_rand must add up to 1, not to {total:g}.")
    if args.force and args.resume:
        raise InputError("--force starts over and --resume continues: give one of them.")
    utils.check_needed(args, make_parser(""), "alpha_relation", "relation_layer", "relation_heads")
    utils.check_needed(args, make_parser(""), "alpha_layers", "teacher_layers")
    utils.check_needed(args, make_parser(""), "alpha_pooled", "keep_dense")
    if args.data_weights is not None and args.source_exponent is not None:
        raise InputError(
            "--data_weights and --source_exponent both say how often each text is drawn: give one of them."
        )
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
