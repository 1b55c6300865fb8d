"""Distils a language model into a smaller one, as DistilBERT was distilled from BERT (arXiv 1910.01108).

On one GPU, or on the CPU where there is none:

    python train.py --dump_path serialization_dir/my_first_training \\
        --data_file data/binarized_text.bert-base-uncased.pickle \\
        --token_counts data/token_counts.bert-base-uncased.pickle --force

On the GPUs of one machine: torchrun --nproc_per_node 4 train.py ... with the same flags.

Without a teacher's losses (--alpha_ce 0 --alpha_cos 0) it trains a masked language model, which is how a teacher of
one's own is made. The flags of both generations of the original scripts work under their names.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

import evaluation
import run_folder
import utils
from corpus import TokenCorpus, open_corpus
from counts import count_tokens, load_token_counts
from distiller import Corpus, Distiller, Recipe
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset
from micro_batches import Masking
from models import (
    FAMILIES,
    LanguageModel,
    build_student,
    family_of,
    freeze,
    half_depth_config,
    load_config,
    load_language_model,
    max_length,
)
from tokenization import describe_tokenizer, load_tokenizer
from utils import InputError, World, logger

DEFAULT_TEACHER = "bert-base-uncased"

# Flag of the first generation -> attribute of a configuration, as most families and as DistilBERT call it.
ARCHITECTURE = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "max_position_embeddings": ("max_position_embeddings", "max_position_embeddings"),
    "n_layers": ("num_hidden_layers", "n_layers"),
    "n_heads": ("num_attention_heads", "n_heads"),
    "dim": ("hidden_size", "dim"),
    "hidden_dim": ("intermediate_size", "hidden_dim"),
    "dropout": ("hidden_dropout_prob", "dropout"),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout"),
    "activation": ("hidden_act", "activation"),
    "initializer_range": ("initializer_range", "initializer_range"),
    "sinusoidal_pos_embds": (None, "sinusoidal_pos_embds"),
    "tie_weights_": ("tie_word_embeddings", "tie_word_embeddings"),
}
REGULARIZATION = ("dropout", "attention_dropout")  # not a matter of shape: they go with any student

# Flags that may differ when a run is resumed, because they don't change its result.
HARMLESS = {
    "command", "force", "resume", "dump_path", "data_file", "log_interval", "checkpoint_interval", "num_workers",
    "local_rank", "n_gpu", "fp16_opt_level",
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="train.py --dump_path FOLDER --data_file FILE [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("files")
    group.add_argument("--dump_path", required=True, help="folder for all that the run writes")
    group.add_argument(
        "--data_file",
        nargs="+",
        required=True,
        help="binarized text to train on (scripts/binarized_data.py): files, or globs such as 'text-*.pickle'",
    )
    group.add_argument("--token_counts", help="counts of that text (scripts/token_counts.py); default: counted anew")
    group.add_argument(
        "--valid_data_file", nargs="+", help="binarized text to evaluate on; default: --valid_share of --data_file"
    )
    group.add_argument(
        "--valid_share",
        type=float,
        default=0.01,
        help="share of the sequences held out for evaluation, 500 at most; 0: no evaluation (default: %(default)s)",
    )
    group.add_argument("--force", action="store_true", help="overwrite the run that --dump_path holds")
    group.add_argument(
        "--resume", action="store_true", help="go on from the state in --dump_path, or begin if there is none"
    )

    group = parser.add_argument_group("teacher and tokenizer (hub names or local folders)")
    group.add_argument("--teacher_name", "--bert_model", help=f"the teacher (default: {DEFAULT_TEACHER})")
    group.add_argument("--teacher_type", choices=FAMILIES, help="its family; only checked, the teacher itself tells it")
    group.add_argument("--tokenizer_name", "--bert_tokenizer", help="default: the teacher's, else the student's")
    group.add_argument("--tokenizer_type", choices=FAMILIES, help="accepted for old command lines; not needed")

    group = parser.add_argument_group("student (default: the teacher's shape at half the depth, random weights)")
    group.add_argument("--student_type", choices=FAMILIES, help="default: distilbert for a bert, else the teacher's")
    group.add_argument(
        "--student_config", "--from_pretrained_config", help="its shape: a JSON file, folder or hub name"
    )
    group.add_argument(
        "--student_pretrained_weights",
        "--from_pretrained_weights",
        help="its first weights: a .pth file (scripts/extract_for_distil.py), or a folder or hub name to train on",
    )
    for flag, kind, text in (
        ("--n_layers", int, "layers"),
        ("--n_heads", int, "attention heads"),
        ("--dim", int, "width of the hidden states"),
        ("--hidden_dim", int, "width of the feed-forward layers"),
        ("--dropout", float, "dropout of layers and embeddings"),
        ("--attention_dropout", float, "dropout of attention weights"),
        ("--activation", str, "activation of the feed-forward layers, such as gelu"),
        ("--vocab_size", int, "entries of the vocabulary (default: the tokenizer's)"),
        ("--max_position_embeddings", int, "longest sequence"),
        ("--initializer_range", float, "standard deviation of random initial weights"),
    ):
        group.add_argument(flag, type=kind, help=text)
    group.add_argument("--sinusoidal_pos_embds", action=switch, help="positions start as sinusoids (distilbert only)")
    group.add_argument("--tie_weights_", action=switch, help="one matrix as embedding and vocabulary projection")
    group.add_argument(
        "--freeze_pos_embs",
        action=switch,
        help="keep the position embeddings as they start (default: where a teacher's losses train a distilbert)",
    )
    group.add_argument("--freeze_token_type_embds", action=switch, default=False, help="same for token types")

    group = parser.add_argument_group("loss: the weights of its terms, 0 to leave one out")
    group.add_argument("--alpha_ce", type=float, default=5.0, help="KL to the teacher's predictions (%(default)s)")
    group.add_argument("--alpha_mlm", type=float, help="masked words (default: 2.0; 0 for causal models)")
    group.add_argument("--alpha_clm", type=float, help="next words (default: 2.0 for causal models, else 0)")
    group.add_argument("--alpha_mse", type=float, default=0.0, help="squared error of the logits (%(default)s)")
    group.add_argument("--alpha_cos", type=float, default=1.0, help="direction of the last hidden states (%(default)s)")
    group.add_argument("--temperature", type=float, default=2.0, help="of both softmaxes in the KL (%(default)s)")
    group.add_argument("--restrict_ce_to_mask", action="store_true", help="KL and MSE at masked positions only")

    group = parser.add_argument_group("masking")
    group.add_argument("--mlm", action=switch, help="masked (--no-mlm: causal) language model; the student tells it")
    group.add_argument("--mlm_mask_prop", type=float, default=0.15, help="share of tokens chosen (%(default)s)")
    group.add_argument("--word_mask", type=float, default=0.8, help="of those, share masked (%(default)s)")
    group.add_argument("--word_keep", type=float, default=0.1, help="of those, share kept (%(default)s)")
    group.add_argument("--word_rand", type=float, default=0.1, help="of those, share replaced at random (%(default)s)")
    group.add_argument(
        "--mlm_smoothing", type=float, default=0.7, help="chosen with weight count^-smoothing; 0: evenly (%(default)s)"
    )

    group = parser.add_argument_group("optimization")
    group.add_argument("--n_epoch", type=int, default=3, help="passes over the text (%(default)s)")
    group.add_argument("--batch_size", type=int, default=5, help="sequences a micro-batch (%(default)s)")
    group.add_argument("--tokens_per_batch", type=int, help="a micro-batch by tokens, padding included, instead")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=50, help="micro-batches an update and process (%(default)s)"
    )
    group.add_argument("--shuffle", action=switch, default=True, help="draw a new order each epoch (default: on)")
    group.add_argument(
        "--group_by_size", action=switch, default=True, help="sequences of similar length together (default: on)"
    )
    group.add_argument("--learning_rate", type=float, default=5e-4, help="peak (%(default)s)")
    group.add_argument("--warmup_prop", type=float, default=0.05, help="share of updates up to the peak (%(default)s)")
    group.add_argument("--weight_decay", type=float, default=0.0, help="not of biases and layer norms (%(default)s)")
    group.add_argument("--adam_epsilon", type=float, default=1e-6, help="(%(default)s)")
    group.add_argument("--max_grad_norm", type=float, default=5.0, help="gradients are clipped to it (%(default)s)")
    group.add_argument("--seed", type=int, default=56, help="of order, masks, dropout, weights (%(default)s)")

    group = parser.add_argument_group("machine")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="compute in bfloat16; default where it is native")
    precision.add_argument("--fp16", action="store_true", help="compute in float16 with loss scaling (GPU only)")
    precision.add_argument("--fp32", action="store_true", help="compute in float32; default elsewhere")
    group.add_argument("--fp16_opt_level", help="accepted for old command lines; there is one level now")
    group.add_argument("--n_gpu", type=int, help="GPUs over all machines, 0 for the CPU (default: what there is)")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers")
    group.add_argument("--num_workers", type=int, help="processes that prepare batches (default: 4 with a GPU, else 0)")

    group = parser.add_argument_group("intervals, in updates")
    group.add_argument("--log_interval", type=int, help="default: 100 lines a run, but at least one every 500")
    group.add_argument("--eval_interval", type=int, help="default: 20 evaluations a run")
    group.add_argument("--checkpoint_interval", type=int, help="default: every 15 minutes; always after an epoch")
    return parser


# --------------------------------------------------------------------------------------------------------------- checks


def sanity_checks(args: argparse.Namespace) -> None:
    """What the flags alone can get wrong. Raises: InputError that names them."""
    for name in ("alpha_ce", "alpha_mlm", "alpha_clm", "alpha_mse", "alpha_cos", "mlm_smoothing", "weight_decay"):
        if (value := getattr(args, name)) is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name} {value}: it must be 0 or more.")
    for name in ("n_epoch", "batch_size", "tokens_per_batch", "gradient_accumulation_steps", "temperature",
                 "learning_rate", "max_grad_norm", "adam_epsilon", "log_interval", "eval_interval",
                 "checkpoint_interval", "mlm_mask_prop"):  # fmt: skip
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} {value}: it must be more than 0.")
    for name in ("warmup_prop", "valid_share", "mlm_mask_prop", "word_mask", "word_keep", "word_rand"):
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise InputError(f"--{name} {value}: it is a share, between 0 and 1.")
    fates = args.word_mask + args.word_keep + args.word_rand
    if abs(fates - 1) > 1e-6:
        raise InputError(f"--word_mask, --word_keep and --word_rand must add up to 1, not to {fates:g}.")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: it must be 0 or more.")
    if args.force and args.resume:
        raise InputError("--force begins anew and --resume goes on: give one of them.")
    if args.tokens_per_batch and not args.group_by_size:
        raise InputError("--tokens_per_batch needs sequences grouped by length: leave out --no-group_by_size.")
    given = [f"--{name}" for name in ARCHITECTURE if name not in REGULARIZATION and getattr(args, name) is not None]
    whole = args.student_config or (args.student_pretrained_weights if not _is_state_dict(args) else None)
    if given and whole:
        raise InputError(f"{given[0]} contradicts {whole}, which says the student's shape: give one of them.")
    if args.student_config and args.student_pretrained_weights and not _is_state_dict(args):
        raise InputError(
            f"--student_config contradicts --student_pretrained_weights {args.student_pretrained_weights}, a whole "
            f"model with a shape of its own: give one of them."
        )


def needs_teacher(args: argparse.Namespace) -> bool:
    return args.alpha_ce > 0 or args.alpha_mse > 0 or args.alpha_cos > 0


def inputs_of(args: argparse.Namespace) -> list[str]:
    """The files and folders that this run reads."""
    names = (args.token_counts, args.teacher_name, args.tokenizer_name, args.student_config,
             args.student_pretrained_weights)  # fmt: skip
    texts = utils.expand_globs([*args.data_file, *(args.valid_data_file or ())])
    return [*texts, *(name for name in names if name)]


def _is_state_dict(args: argparse.Namespace) -> bool:
    weights = args.student_pretrained_weights
    return weights is not None and (Path(weights).is_file() or weights.endswith((".pth", ".pt", ".bin")))


def student_config(args: argparse.Namespace, teacher: PretrainedConfig | None, tokenizer) -> PretrainedConfig:
    """The student's shape: as given, or half the teacher, or the family's default; then the architecture flags."""
    if args.student_pretrained_weights and not _is_state_dict(args):
        config = load_config(args.student_pretrained_weights)
    elif args.student_config:
        config = load_config(args.student_config)
    elif teacher:
        config = half_depth_config(teacher, args.student_type)
    else:
        config = AutoConfig.for_model(args.student_type or "distilbert", vocab_size=len(tokenizer))
    family_of(config)
    if args.student_type and config.model_type != args.student_type:
        raise InputError(f"--student_type {args.student_type}: the student given is a {config.model_type}.")
    for flag, (usual, distilbert) in ARCHITECTURE.items():
        value = getattr(args, flag)
        if value is None:
            continue
        name = distilbert if config.model_type == "distilbert" else usual
        if name is None or not hasattr(config, name):
            raise InputError(f"--{flag}: a {config.model_type} has no such setting; use --student_config.")
        setattr(config, name, value)
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"the student's width {config.hidden_size} is not a multiple of its {config.num_attention_heads} heads: "
            f"change --dim or --n_heads."
        )
    return config


def check_fit(args: argparse.Namespace, student: PretrainedConfig, teacher: PretrainedConfig | None, tokenizer) -> None:
    """Tokenizer, teacher and student must speak of the same tokens. Raises: InputError that says where they don't."""
    causal = family_of(student).causal
    if teacher:
        if args.teacher_type and teacher.model_type != args.teacher_type:
            raise InputError(f"--teacher_type {args.teacher_type}: {args.teacher_name} is a {teacher.model_type}.")
        if teacher.vocab_size != student.vocab_size:
            raise InputError(
                f"teacher and student do not share a vocabulary: {args.teacher_name} has {teacher.vocab_size} "
                f"entries, the student {student.vocab_size}."
            )
        if family_of(teacher).causal != causal:
            raise InputError(f"a {teacher.model_type} can't teach a {student.model_type}: only one of them is causal.")
        if args.alpha_cos > 0 and teacher.hidden_size != student.hidden_size:
            raise InputError(
                f"--alpha_cos compares hidden states, but the teacher's have {teacher.hidden_size} entries and the "
                f"student's {student.hidden_size}: give --alpha_cos 0 or a student of the teacher's width."
            )
    if len(tokenizer) > student.vocab_size:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, but the student only {student.vocab_size}.")
    if args.mlm is not None and args.mlm == causal:
        flag = "--mlm" if args.mlm else "--no-mlm"
        raise InputError(f"{flag}: a {student.model_type} is {'' if causal else 'not '}a causal model.")
    if not causal and tokenizer.mask_token_id is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path} has no mask token, so nothing can be masked.")
    if causal and args.alpha_mlm:
        raise InputError(f"--alpha_mlm {args.alpha_mlm}: a {student.model_type} is causal; use --alpha_clm.")
    if not causal and args.alpha_clm:
        raise InputError(f"--alpha_clm {args.alpha_clm}: a {student.model_type} is not causal; use --alpha_mlm.")


def check_resume(args: argparse.Namespace, parameters: dict) -> None:
    """A run that goes on must be the run that began. Raises: InputError that names the flags that differ."""
    old = run_folder.load_parameters(args.dump_path)
    changed = sorted(key for key in parameters if key in old and key not in HARMLESS and parameters[key] != old[key])
    if changed:
        flags = ", ".join(f"--{key} ({old[key]} then, {parameters[key]} now)" for key in changed)
        flags = flags.replace("--data (", "the text of --data_file (").replace("--processes", "number of processes")
        raise InputError(
            f"--resume: this would change the result of the run in {args.dump_path}: {flags}; begin anew with --force."
        )


# --------------------------------------------------------------------------------------------------------------- wiring


def choose_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    if args.fp16:
        if device.type == "cpu":
            raise InputError("--fp16 needs a GPU; on a CPU use --bf16 or --fp32.")
        return torch.float16
    if args.bf16:
        return torch.bfloat16
    return torch.float32 if args.fp32 or not utils.has_native_bf16(device) else torch.bfloat16


def build_corpus(
    args: argparse.Namespace, text: TokenCorpus, tokenizer, length: int, causal: bool, world: World
) -> Corpus:
    """Indexes the text, and says how it is masked and what of it is held out."""
    held_out = evaluation.held_out_sequences(len(text), 0 if args.valid_data_file else args.valid_share)
    special_ids = describe_tokenizer(tokenizer)["special_ids"]
    train_set = LmSeqsDataset(text, special_ids, length, held_out, world.share)
    train_set.log_summary(f"training text {text}")
    sampler = GroupedBatchSampler(
        train_set.lengths,
        None if args.tokens_per_batch else args.batch_size,
        args.tokens_per_batch,
        args.group_by_size,
        args.shuffle,
        args.seed,
        world.share,
    )
    held_out_batches = None
    if args.valid_data_file:
        valid_text = open_corpus(args.valid_data_file, tokenizer)
        valid_text.verify()
        held_out_batches = evaluation.held_out_batches(valid_text, tokenizer, length, causal, None)
    elif len(held_out):
        held_out_batches = evaluation.held_out_batches(text, tokenizer, length, causal, held_out)

    masking = None
    if not causal:
        if args.token_counts:
            counts = load_token_counts(args.token_counts, len(tokenizer))
        else:
            logger.info("no --token_counts: counting the tokens of %s", text)
            counts = world.share(lambda: {"counts": count_tokens(text, len(tokenizer))})["counts"]
        masking = Masking.of_tokenizer(
            tokenizer,
            counts,
            args.mlm_smoothing,
            proportion=args.mlm_mask_prop,
            word_mask=args.word_mask,
            word_keep=args.word_keep,
            word_rand=args.word_rand,
        )
    return Corpus(train_set, sampler, masking, evaluation.padding_id(tokenizer), held_out_batches)


def build_models(args: argparse.Namespace, config: PretrainedConfig, device: torch.device):
    """Loads teacher and student onto the device, and freezes what is to stay as it is."""
    if args.student_pretrained_weights and not _is_state_dict(args):
        student = load_language_model(args.student_pretrained_weights, "student", head_required=False, config=config)
    else:
        student = build_student(config, args.student_pretrained_weights)
    family = family_of(config)
    if args.freeze_pos_embs:
        freeze(student, family.positions)
    if args.freeze_token_type_embds and not freeze(student, family.token_types):
        raise InputError(f"--freeze_token_type_embds: a {config.model_type} has no token types.")
    teacher = None
    if args.teacher_name:
        teacher = load_language_model(args.teacher_name, "teacher", head_required=True)
        teacher.requires_grad_(False).eval()
    for role, model in (("teacher", teacher), ("student", student)):
        if model:
            n = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            logger.info(
                "%s: %s, %d layers, %.1f M parameters, %.1f M of them trained",
                role, model.config.model_type, model.config.num_hidden_layers, n / 1e6, trained / 1e6,
            )  # fmt: skip
    return LanguageModel(student).to(device), LanguageModel(teacher).to(device) if teacher else None


def load_configs(args: argparse.Namespace):
    """Tokenizer, student's and teacher's (or None) configuration, checked against each other; no weights yet."""
    if needs_teacher(args) and args.teacher_name is None:
        args.teacher_name = DEFAULT_TEACHER
    teacher = load_config(args.teacher_name) if args.teacher_name else None
    whole_student = None if _is_state_dict(args) else args.student_pretrained_weights
    args.tokenizer_name = args.tokenizer_name or args.teacher_name or whole_student or DEFAULT_TEACHER
    tokenizer = load_tokenizer(args.tokenizer_name)
    student = student_config(args, teacher, tokenizer)
    check_fit(args, student, teacher, tokenizer)
    return tokenizer, student, teacher


def resolve_defaults(args: argparse.Namespace, student: PretrainedConfig, device: torch.device) -> None:
    """Fills in the defaults that depend on the student and on the machine."""
    causal = family_of(student).causal
    if args.alpha_mlm is None:
        args.alpha_mlm = 0.0 if causal else 2.0
    if args.alpha_clm is None:
        args.alpha_clm = 2.0 if causal else 0.0
    if not (needs_teacher(args) or args.alpha_mlm or args.alpha_clm):
        raise InputError("all --alpha_... are 0: there is nothing to learn from.")
    if args.freeze_pos_embs is None:
        args.freeze_pos_embs = needs_teacher(args) and student.model_type == "distilbert"
    if args.num_workers is None:
        args.num_workers = min(4, os.cpu_count() or 1) if device.type == "cuda" else 0


@utils.cli
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    sanity_checks(args)
    world = utils.init_world(args.n_gpu, args.local_rank)
    utils.setup_logging(world.is_master)
    utils.quiet_transformers()

    # Everything that the user can have got wrong comes before a model is loaded or a file removed.
    dtype = choose_dtype(args, world.device)
    run_folder.check_dump_path(args.dump_path, args.force, args.resume, inputs_of(args))
    tokenizer, student_cfg, teacher_cfg = load_configs(args)
    resolve_defaults(args, student_cfg, world.device)
    text = open_corpus(args.data_file, tokenizer)
    if world.local_rank == 0:  # once a machine
        text.verify()
    length = min([max_length(cfg) for cfg in (student_cfg, teacher_cfg) if cfg] + [tokenizer.model_max_length])
    corpus = build_corpus(args, text, tokenizer, length, family_of(student_cfg).causal, world)
    parameters = vars(args) | {
        "data": text.identity,
        "dtype": str(dtype),
        "processes": world.size,
        "command": run_folder.command_line(),
    }
    state = run_folder.load_state(args.dump_path) if args.resume else None
    if state:
        check_resume(args, parameters)

    logger.info("running on %s, computing in %s", utils.describe_device(world.device), str(dtype).split(".")[1])
    if args.teacher_name and not needs_teacher(args):
        logger.info("no loss uses the teacher %s: it only serves to measure the agreement", args.teacher_name)
    utils.set_seed(args.seed)  # of the student's random weights
    student, teacher = build_models(args, student_cfg, world.device)
    folder = None
    if world.is_master:
        folder = run_folder.RunFolder(args.dump_path, parameters, tokenizer, state["update"] if state else None)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    distiller = Distiller(recipe, student, teacher, corpus, world, dtype, folder)
    if state:
        distiller.load_state_dict(state)
    start = time.monotonic()
    signal_name = distiller.train()
    if folder:
        folder.close()
    world.close()
    if signal_name:
        logger.info("stopped by %s at update %d; with --resume it goes on there", signal_name, distiller.update)
        return utils.EXIT_INTERRUPTED
    logger.info("done in %.0f s: %s holds the model for from_pretrained", time.monotonic() - start, args.dump_path)
    return utils.EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
