"""Whether tokenizer, student, and teacher fit together, judged by their configurations before any weights are loaded,
and the defaults that depend on them.
"""

import argparse

import torch
from transformers import AutoConfig, PretrainedConfig

from lm_seqs_dataset import MIN_LENGTH
from models.families import DROPOUT, family_of, max_length
from models.memory import default_tokens_per_micro_batch
from models.packing import kernel_fault
from models.student import half_depth_config
from training.flags import ARCHITECTURE, DEFAULT_TEACHER, whole_model
from training.recipe import OF_TEACHER, Recipe
from utils import InputError, logger, n_cores


def needs_teacher(args: argparse.Namespace) -> bool:
    return any(getattr(args, f"alpha_{term}") for term in OF_TEACHER)


def student_config(
    args: argparse.Namespace, given: PretrainedConfig | None, teacher: PretrainedConfig | None, voc_size: int
) -> PretrainedConfig:
    """The student's shape: as given, or half the teacher, or the family's default; then the architecture flags."""
    if given:
        config = given
    elif teacher:
        config = half_depth_config(teacher, args.student_type)
    else:
        config = AutoConfig.for_model(args.student_type or "distilbert", vocab_size=voc_size)
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
    for flag, names in DROPOUT.items():
        value, known = getattr(args, flag), [name for name in names if name in config.to_dict()]
        if value and not known:
            raise InputError(f"--{flag}: a {config.model_type} has no such setting; use --student_config.")
        for name in known if value is not None else ():
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
    if len(tokenizer) > student.vocab_size:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, but the student only {student.vocab_size}.")
    if args.mlm is not None and args.mlm == causal:
        flag = "--mlm" if args.mlm else "--no-mlm"
        raise InputError(f"{flag}: a {student.model_type} is {'' if causal else 'not '}a causal model.")
    if not causal and tokenizer.mask_token_id is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path} has no mask token, so nothing can be masked.")
    if causal and args.whole_word_mask:
        raise InputError(f"--whole_word_mask: a {student.model_type} is causal, so nothing is masked.")
    if causal and args.alpha_mlm:
        raise InputError(f"--alpha_mlm {args.alpha_mlm}: a {student.model_type} is causal; use --alpha_clm.")
    if not causal and args.alpha_clm:
        raise InputError(f"--alpha_clm {args.alpha_clm}: a {student.model_type} is not causal; use --alpha_mlm.")


def longest_sequence(student: PretrainedConfig, teacher: PretrainedConfig | None, tokenizer) -> int:
    """What all three can take, in tokens. Raises: InputError if that is too short to learn from."""
    longest = {"the student": max_length(student), "the tokenizer": tokenizer.model_max_length}
    if teacher:
        longest["the teacher"] = max_length(teacher)
    shortest = min(longest, key=longest.get)
    if longest[shortest] < MIN_LENGTH:
        raise InputError(f"{shortest} takes only {longest[shortest]} tokens at once; at least {MIN_LENGTH} are needed.")
    return longest[shortest]


def with_names(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with the default teacher and tokenizer filled in."""
    teacher = args.teacher_name or (DEFAULT_TEACHER if needs_teacher(args) else None)
    student = whole_model(args.student_pretrained_weights)
    names = {"teacher_name": teacher, "tokenizer_name": args.tokenizer_name or teacher or student or DEFAULT_TEACHER}
    return argparse.Namespace(**vars(args) | names)


def why_padded(
    args: argparse.Namespace, configs: list[PretrainedConfig], device: torch.device, dtype: torch.dtype
) -> str | None:
    """What keeps a run from --padding_free; None: nothing does."""
    for config in configs:
        if not family_of(config).packs:
            return f"a {config.model_type} takes padded sequences only"
    if args.compile:
        return "--compile takes padded sequences"
    faults = (kernel_fault(device, dtype, config.hidden_size // config.num_attention_heads) for config in configs)
    return next(filter(None, faults), None)


def with_defaults(
    args: argparse.Namespace,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    recorded: dict,
) -> argparse.Namespace:
    """The flags with the defaults filled in that depend on the student and on the machine.

    Args:
        recorded: the parameters of the run to continue, if any. Its micro-batches stay as they are, since dropout
            depends on them, even if this machine has a larger GPU.
    """
    causal = family_of(student).causal
    padded = why_padded(args, [config for config in (student, teacher) if config], device, dtype)
    defaults = {
        "alpha_mlm": 0.0 if causal else Recipe.alpha_mlm,
        "alpha_clm": Recipe.alpha_mlm if causal else 0.0,
        "freeze_pos_embs": needs_teacher(args) and student.model_type == "distilbert",
        "num_workers": min(4, n_cores()) if device.type == "cuda" else 0,
        "tokens_per_micro_batch": recorded.get("tokens_per_micro_batch", default_tokens_per_micro_batch(device)),
        "padding_free": recorded.get("padding_free", device.type == "cuda" and not padded and not recorded),
    }
    missing = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = argparse.Namespace(**vars(args) | missing)
    if args.padding_free and padded:  # by the flag, or in the run that is continued
        raise InputError(f"--padding_free: {padded}.")
    if device.type == "cuda":
        how = "free of padding" if args.padding_free else "padded"
        logger.info("micro-batches are %s%s", how, f": {padded}" if padded else "")
    if not (needs_teacher(args) or args.alpha_mlm or args.alpha_clm):
        raise InputError("all --alpha_... are 0: there is nothing to learn from.")
    return args
