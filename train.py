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
import time

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

import utils
from corpus.files import TokenCorpus, open_corpus
from corpus.overlap import load_overlap
from corpus.parallel import n_cores
from corpus.token_counts import count_tokens, load_token_counts
from corpus.tokenization import describe_tokenizer, load_tokenizer, vocabulary_difference
from corpus.vocabulary_trimming import Kept
from distiller import Distiller
from evaluation import held_out
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import MIN_LENGTH, LmSeqsDataset
from models.families import LanguageModel, family_of, freeze, max_length
from models.loading import count_parameters, load_config, load_language_model, load_with_or_without_head, some
from models.student import build_student, half_depth_config
from models.trimming import trim_config, trim_model
from training import dry_run, flags, run_folder
from training.batches import Masking, RunData
from training.distributed import World, choose_dtype, describe_device, init_world
from training.flags import ARCHITECTURE, DEFAULT_TEACHER, sanity_checks, whole_model
from training.memory import available_memory
from training.recipe import FAR_FEWER, TOKENS_PER_STEP, Recipe
from training.resume import check_resume, fingerprint
from training.sentence_encoder import sentence_transformers_files
from utils import InputError, logger

# --------------------------------------------------------------------------------------------------------------- checks


def needs_teacher(args: argparse.Namespace) -> bool:
    return any((args.alpha_ce, args.alpha_mse, args.alpha_cos, args.alpha_relation))


def inputs_of(args: argparse.Namespace) -> list[str]:
    """The files and folders that this run reads."""
    names = (args.token_counts, args.leave_out, args.teacher_name, args.tokenizer_name, args.student_config,
             args.student_pretrained_weights)  # fmt: skip
    texts = utils.expand_globs([*args.data_file, *(args.valid_data_file or ())])
    return [*texts, *(name for name in names if name)]


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
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"the student's width {config.hidden_size} is not a multiple of its {config.num_attention_heads} heads: "
            f"change --dim or --n_heads."
        )
    return config


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


# --------------------------------------------------------------------------------------------------------------- wiring


def build_data(
    args: argparse.Namespace, recipe: Recipe, text: TokenCorpus, tokenizer, length: int, masked: bool, world: World
) -> RunData:
    """Indexes the text, and says how it is masked and what of it is held out."""
    chosen = held_out.held_out_sequences(len(text), 0 if args.valid_data_file else args.valid_share)
    special_ids = describe_tokenizer(tokenizer)["special_ids"]
    left_out = load_overlap(args.leave_out, text) if args.leave_out else None
    excluded = chosen if left_out is None else np.union1d(chosen, left_out)
    train_set = LmSeqsDataset(text, special_ids, length, excluded, world.make_once)
    train_set.log_summary(f"training text {text}")
    if left_out is not None:
        logger.info("%s: %s sequences are left out", args.leave_out, f"{len(left_out):,}")
    sampler = GroupedBatchSampler(
        train_set.lengths,
        None if recipe.tokens_per_batch else recipe.batch_size,
        recipe.tokens_per_batch,
        recipe.group_by_size,
        recipe.shuffle,
        recipe.seed,
        world.make_once,
    )
    held_out_text = None
    if args.valid_data_file:
        valid_text = open_corpus(args.valid_data_file, tokenizer)
        valid_text.verify()
        held_out_text = held_out.held_out_batches(valid_text, tokenizer, length, masked, None)
    elif len(chosen):
        held_out_text = held_out.held_out_batches(text, tokenizer, length, masked, chosen)

    masking = None
    if masked:
        if args.token_counts:
            counts = load_token_counts(args.token_counts, len(tokenizer))
        else:
            logger.info("no --token_counts: counting the tokens of %s", text)
            counts = world.make_once(lambda: {"counts": count_tokens(text, len(tokenizer))})["counts"]
        masking = Masking.of_recipe(tokenizer, counts, recipe)
    evaluated = held_out.with_training_masks(held_out_text, masking, tokenizer) if held_out_text else {}
    return RunData(train_set, sampler, masking, held_out.padding_id(tokenizer), evaluated, left_out)


def log_small_steps(run: Distiller) -> None:
    """Says so if a step holds far fewer tokens than the rate was made for."""
    recipe, tokens = run.recipe, run.data.train_set.n_tokens / run.steps_per_epoch
    if tokens * FAR_FEWER < TOKENS_PER_STEP and recipe.learning_rate >= Recipe.learning_rate:
        logger.info(
            "a step holds some %s tokens, a rate of %g was made for %s: docs/recipe.md says what suits short runs",
            f"{tokens:,.0f}", Recipe.learning_rate, f"{TOKENS_PER_STEP:,}",
        )  # fmt: skip


def build_models(
    args: argparse.Namespace, recipe: Recipe, config: PretrainedConfig, kept: Kept | None, device: torch.device
) -> tuple[LanguageModel, LanguageModel | None]:
    """Loads student and teacher onto the device, and freezes what is to stay as it is."""
    if name := whole_model(args.student_pretrained_weights):
        student, missing = load_with_or_without_head(name, "student", config)
        if missing and not recipe.encoder_only:
            logger.info("student %s: its head starts from random weights (%s)", name, some(missing))
    else:
        student = build_student(config, args.student_pretrained_weights)
    family = family_of(config)
    if args.freeze_pos_embs and not freeze(student, family.positions):
        raise InputError(f"--freeze_pos_embs: a {config.model_type} has no table of positions.")
    if args.freeze_token_type_embds and not freeze(student, family.token_types):
        raise InputError(f"--freeze_token_type_embds: a {config.model_type} has no token types.")
    student = LanguageModel(student)
    if recipe.encoder_only:
        student.freeze_head()
    teacher = None
    if args.teacher_name:
        teacher = load_language_model(args.teacher_name, "teacher", head_required=not recipe.encoder_only)
        if kept:
            teacher = trim_model(teacher, kept.ids)
        teacher = LanguageModel(teacher.requires_grad_(False).eval())
    for role, model in (("teacher", teacher), ("student", student)):
        if model:
            part = model.encoder if recipe.encoder_only else model.model
            n = sum(p.numel() for p in part.parameters())
            trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
            logger.info(
                "%s: %s, %d layers, %.1f M parameters, %.1f M of them trained",
                role, model.model.config.model_type, model.depth, n / 1e6, trained / 1e6,
            )  # fmt: skip
    return student.to(device), teacher.to(device) if teacher else None


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


def default_tokens_per_micro_batch(device: torch.device) -> int:
    """On a GPU one token for each 4 MiB of its memory: several times what a BERT-base and its student need."""
    if device.type == "cpu":
        return 512
    return min(torch.cuda.get_device_properties(device).total_memory >> 22, 32768)


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


def make_parser() -> argparse.ArgumentParser:
    return flags.make_parser(__doc__)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> int:
    with init_world(args.n_gpu, args.local_rank) as world:
        return run(args, world)


def run(args: argparse.Namespace, world: World) -> int:
    """Checks, loads, trains. Returns the exit status."""
    sanity_checks(args)

    # Everything that the user can have got wrong comes before a model is loaded or a file removed.
    dtype = choose_dtype(args, world.device)
    run_folder.check_dump_path(args.dump_path, args.force, args.resume, inputs_of(args))
    tokenizer, student_cfg, teacher_cfg, kept = load_configs(args)
    resolve_defaults(args, student_cfg, world.device)
    check_memory(student_cfg, teacher_cfg, world.device)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    text = open_corpus(args.data_file, tokenizer)
    if world.local_rank == 0:  # once a machine
        text.verify()
    length = longest_sequence(student_cfg, teacher_cfg, tokenizer)
    masked = not (family_of(student_cfg).causal or recipe.encoder_only)
    data = build_data(args, recipe, text, tokenizer, length, masked, world)
    state = run_folder.load_state(args.dump_path) if args.resume else None

    logger.info("running on %s, computing in %s", describe_device(world.device), str(dtype).split(".")[1])
    if args.teacher_name and not needs_teacher(args):
        logger.info("no loss uses the teacher %s: it only serves to measure the agreement", args.teacher_name)
    utils.set_seed(args.seed)  # the student's random weights are drawn from this
    if recipe.encoder_only:
        logger.info("no loss needs a vocabulary head: the encoder alone is distilled, and nothing is masked")
    student, teacher = build_models(args, recipe, student_cfg, kept, world.device)
    if args.alpha_cos and student.dim != teacher.dim:
        logger.info("hidden states are compared through a learned projection from %d to %d", student.dim, teacher.dim)
    parameters = describe_run(args, text, data, tokenizer, teacher, dtype, world)
    if state:
        check_resume(run_folder.load_parameters(args.dump_path), parameters, student.uses_dropout)
    folder = None
    if world.is_master and not args.dry_run:
        more = sentence_transformers_files(args.teacher_name, student.dim) if recipe.encoder_only else None
        folder = run_folder.RunFolder(args.dump_path, parameters, tokenizer, args.keep_checkpoints, more)
    distiller = Distiller(recipe, student, teacher, data, world, dtype, folder)
    log_small_steps(distiller)
    return estimate(distiller, args) if args.dry_run else train(distiller, state, args.dump_path)


def describe_run(
    args: argparse.Namespace, text: TokenCorpus, data: RunData, tokenizer, teacher: LanguageModel | None,
    dtype: torch.dtype, world: World,
) -> dict:  # fmt: skip
    """What parameters.json holds: every flag, and what tells the contents of all that the run reads."""
    return vars(args) | {
        "data": text.identity,
        "left_out": None if data.left_out is None else fingerprint([torch.from_numpy(data.left_out)]),
        "valid_data": data.held_out[""].dataset.corpus.identity if args.valid_data_file else None,
        "masking": fingerprint([torch.from_numpy(data.masking.token_probs)]) if data.masking else None,
        "teacher": fingerprint(teacher.state_dict().values()) if teacher else None,
        "tokenizer": describe_tokenizer(tokenizer)["vocab_hash"],
        "dtype": str(dtype),
        "processes": world.size,
        "command": run_folder.command_line(),
    }


def estimate(distiller: Distiller, args: argparse.Namespace) -> int:
    """Says what the run would take. Returns the exit status."""
    made = dry_run.make_estimate(distiller, args.dry_run)
    if distiller.world.is_master:
        print(dry_run.report(made, distiller, args.dump_path))
    return utils.EXIT_OK


def train(distiller: Distiller, state: dict | None, dump_path: str) -> int:
    """Runs from `state` on, or from the start, to the end or to a signal. Returns the exit status."""
    if state:
        try:
            distiller.load_state_dict(state)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = utils.reason_of(error)
            raise InputError(
                f"the state in {dump_path} is not of this run ({reason}); start over with --force."
            ) from None
    if distiller.folder:
        distiller.folder.start(state["step"] if state else None)
    start = time.monotonic()
    try:
        signal_name = distiller.train()
    finally:
        if distiller.folder:
            distiller.folder.close()
    if signal_name:
        logger.info("stopped by %s after step %d; with --resume it continues there", signal_name, distiller.n_done)
        return utils.EXIT_INTERRUPTED
    logger.info("done in %.0f s: %s holds the model for from_pretrained", time.monotonic() - start, dump_path)
    return utils.EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
