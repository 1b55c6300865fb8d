"""Which tokenizer, student and teacher a run is of, and whether they fit together: told by their configurations, before
any weights are loaded.
"""

import argparse

import torch
from transformers import AutoConfig, PretrainedConfig

from corpus.parallel import n_cores
from corpus.tokenization import describe_tokenizer, load_tokenizer, vocabulary_difference
from corpus.vocabulary_trimming import Kept
from lm_seqs_dataset import MIN_LENGTH
from models.families import DROPOUT, family_of, max_length
from models.loading import count_parameters, load_config
from models.student import half_depth_config
from models.trimming import trim_config
from training.distributed import describe_device
from training.flags import ARCHITECTURE, DEFAULT_TEACHER, whole_model
from training.memory import available_memory
from training.recipe import Recipe
from utils import InputError, logger


def load_configs(args: argparse.Namespace):
    """Tokenizer, student's and teacher's (or None) configuration, checked against each other, and which entries of the
    teacher's vocabulary are kept (None: all); no weights yet."""
    if needs_teacher(args) and args.teacher_name is None:
        args.teacher_name = DEFAULT_TEACHER
    teacher = load_config(args.teacher_name) if args.teacher_name else None
    student_name = whole_model(args.student_pretrained_weights)
    args.tokenizer_name = args.tokenizer_name or args.teacher_name or student_name or DEFAULT_TEACHER
    tokenizer = load_tokenizer(args.tokenizer_name)
    kept = kept_entries(args, teacher)
    if kept:
        logger.info(
            "the teacher's vocabulary is cut to the %s entries of %s", f"{len(kept.ids):,}", args.tokenizer_name
        )
        teacher = trim_config(teacher, kept.ids)
    check_vocabularies(args.tokenizer_name, tokenizer, None if kept else args.teacher_name, student_name)
    student = student_config(args, teacher, tokenizer)
    check_fit(args, student, teacher, tokenizer)
    return tokenizer, student, teacher, kept


def needs_teacher(args: argparse.Namespace) -> bool:
    return any((args.alpha_ce, args.alpha_mse, args.alpha_cos, args.alpha_relation))


def student_config(args: argparse.Namespace, teacher: PretrainedConfig | None, tokenizer) -> PretrainedConfig:
    """The student's shape: as given, or half the teacher, or the family's default; then the architecture flags."""
    if whole_model(args.student_pretrained_weights):
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


def kept_entries(args: argparse.Namespace, teacher: PretrainedConfig | None) -> Kept | None:
    """If the tokenizer is one that scripts/trim_vocabulary.py made of the teacher's: which entries it kept."""
    kept = Kept.load(args.tokenizer_name)
    if kept is None or teacher is None:
        return None
    try:
        own = describe_tokenizer(load_tokenizer(args.teacher_name))
    except InputError:  # the teacher brings none
        return kept if teacher.vocab_size >= kept.old_size else None
    return kept if own["vocab_hash"] == kept.old_hash else None


def check_vocabularies(name: str, tokenizer, *models: str | None) -> None:
    """The tokenizers that the models bring with them must be the run's. Raises: InputError that says where they differ.

    Args:
        name: of the run's tokenizer.
    """
    for model in dict.fromkeys(model for model in models if model and model != name):
        try:
            own = load_tokenizer(model)
        except InputError:
            continue  # it brings none
        if difference := vocabulary_difference(tokenizer, own):
            raise InputError(f"{name} and {model} do not share a vocabulary: {difference}.")


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
        raise InputError(f"{shortest} takes only {longest[shortest]} tokens at once; {MIN_LENGTH} are the least.")
    return longest[shortest]


def check_memory(student: PretrainedConfig, teacher: PretrainedConfig | None, device: torch.device) -> None:
    """Raises InputError if the models, the gradients and the optimizer's state alone are more than what is free."""
    needed = 16 * count_parameters(student, "the student")
    if teacher:
        needed += 4 * count_parameters(teacher, "the teacher")
    free = available_memory(device)
    if needed > free:
        raise InputError(
            f"teacher and student take {needed / 1e9:,.1f} GB of memory, but {free / 1e9:,.1f} are free on "
            f"{describe_device(device)}: choose smaller ones."
        )


def resolve_defaults(args: argparse.Namespace, student: PretrainedConfig, device: torch.device) -> None:
    """Fills in the defaults that depend on the student and on the machine."""
    causal = family_of(student).causal
    if args.alpha_mlm is None:
        args.alpha_mlm = 0.0 if causal else Recipe.alpha_mlm
    if args.alpha_clm is None:
        args.alpha_clm = Recipe.alpha_mlm if causal else 0.0
    if not (needs_teacher(args) or args.alpha_mlm or args.alpha_clm):
        raise InputError("all --alpha_... are 0: there is nothing to learn from.")
    if args.freeze_pos_embs is None:
        args.freeze_pos_embs = needs_teacher(args) and student.model_type == "distilbert"
    if args.num_workers is None:
        args.num_workers = min(4, n_cores()) if device.type == "cuda" else 0
    if args.tokens_per_micro_batch is None:
        args.tokens_per_micro_batch = default_tokens_per_micro_batch(device)


def default_tokens_per_micro_batch(device: torch.device) -> int:
    """On a GPU one token for each 4 MiB of its memory: several times what a BERT-base and its student need."""
    if device.type == "cpu":
        return 512
    return min(torch.cuda.get_device_properties(device).total_memory >> 22, 32768)
