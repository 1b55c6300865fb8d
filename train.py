"""Distils a language model into a smaller one, as DistilBERT was distilled from BERT (arXiv 1910.01108).

On one GPU, or on the CPU where there is none:

    python train.py --dump_path serialization_dir/my_first_training \\
        --data_file data/binarized_text.bert-base-uncased.pickle \\
        --token_counts data/token_counts.bert-base-uncased.pickle --force

On the GPUs of one machine: torchrun --nproc_per_node 4 train.py ... with the same flags.

Without a teacher's losses (--alpha_ce 0 --alpha_cos 0) it trains a masked language model, which is how you make
a teacher of your own. The flags of both generations of the original scripts work under their names.
"""

import argparse
import dataclasses
import itertools
import time

import numpy as np
import torch
from transformers import PretrainedConfig

import utils
from corpus.files import TokenCorpus, expand_globs, open_corpus
from corpus.overlap import load_overlap
from corpus.sources import weights_of
from corpus.token_counts import count_tokens, load_token_counts
from corpus.tokenization import describe_tokenizer, load_tokenizer, padding_id, vocabulary_difference
from corpus.vocabulary_trimming import Kept
from distiller import Distiller
from evaluation import held_out
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import MIN_LENGTH, SHORTEST, LmSeqsDataset
from models.families import family_of, max_length
from models.language_model import LanguageModel, freeze
from models.loading import (
    count_parameters,
    load_config,
    load_language_model,
    load_with_or_without_head,
    some,
    tokenizer_for,
)
from models.memory import check_memory
from models.sentence_encoder import Pooling, pooling_of, prompts_of, sentence_transformers_files
from models.student import build_student
from models.trimming import trim_config, trim_model
from training import dry_run, flags, run_folder
from training.batches import MICRO_BATCH_PRICE, Padding, RunData
from training.checkpoint import check_resume, fingerprint, fingerprint_of_shape
from training.configurations import (
    check_fit,
    longest_sequence,
    needs_teacher,
    student_config,
    with_defaults,
    with_names,
)
from training.distributed import World, choose_dtype, describe_device, init_world, make_deterministic
from training.flags import sanity_checks, whole_model
from training.masking import Masking
from training.recipe import FAR_FEWER, TOKENS_PER_STEP, Recipe
from utils import InputError, logger

TEXTS_TO_CENTER = 200  # their mean vector is where `--alpha_pooled` measures directions from

# ------------------------------------------------------------------------------------ what is read, and what fits it


def inputs_of(args: argparse.Namespace) -> list[str]:
    """The files and folders that this run reads."""
    names = (args.token_counts, args.leave_out, args.teacher_name, args.tokenizer_name, args.student_config,
             args.student_pretrained_weights)  # fmt: skip
    texts = expand_globs([*args.data_file, *(args.valid_data_file or ())])
    return [*texts, *(name for name in names if name)]


def load_configs(args: argparse.Namespace):
    """Tokenizer, student's and teacher's (or None) configuration, checked against each other, and which entries of the
    teacher's vocabulary are kept (None: all); no weights yet."""
    teacher = load_config(args.teacher_name) if args.teacher_name else None
    student_name = whole_model(args.student_pretrained_weights)
    tokenizer = load_tokenizer(args.tokenizer_name)
    kept = kept_entries(args, teacher)
    if kept:
        logger.info(
            "the teacher's vocabulary is cut to the %s entries of %s", f"{len(kept.ids):,}", args.tokenizer_name
        )
        teacher = trim_config(teacher, kept.ids)
    check_vocabularies(args.tokenizer_name, tokenizer, None if kept else args.teacher_name, student_name)
    given = student_name or args.student_config
    student = student_config(args, load_config(given) if given else None, teacher, len(tokenizer))
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


# --------------------------------------------------------------------------------------------------------------- wiring


def build_data(
    args: argparse.Namespace, recipe: Recipe, text: TokenCorpus, tokenizer, length: int, masked: bool, world: World
) -> RunData:
    """Indexes the text, and decides how it is masked and which part is held out."""
    chosen = held_out.held_out_sequences(len(text), 0 if args.valid_data_file else args.valid_share)
    special_ids = describe_tokenizer(tokenizer)["special_ids"]
    left_out = load_overlap(args.leave_out, text) if args.leave_out else None
    excluded = chosen if left_out is None else np.union1d(chosen, left_out)
    min_length = SHORTEST if recipe.encoder_only else MIN_LENGTH
    train_set = LmSeqsDataset(text, special_ids, length, excluded, min_length, world.make_once)
    train_set.log_summary(f"training text {text}")
    if left_out is not None:
        logger.info("%s: %s sequences are left out", args.leave_out, f"{len(left_out):,}")
    sources, weights = draws_of_sources(args, train_set)
    sampler = GroupedBatchSampler(
        train_set.lengths,
        None if recipe.tokens_per_batch else recipe.batch_size,
        recipe.tokens_per_batch,
        recipe.group_by_size,
        recipe.shuffle,
        recipe.seed,
        world.make_once,
        sources,
        weights,
    )
    held_out_text = None
    if args.valid_data_file:
        valid_text = open_corpus(args.valid_data_file, tokenizer)
        valid_text.verify()
        held_out_text = held_out.held_out_batches(valid_text, tokenizer, length, masked, None, min_length=min_length)
    elif len(chosen):
        held_out_text = held_out.held_out_batches(text, tokenizer, length, masked, chosen, min_length=min_length)

    masking = None
    if masked:
        if args.token_counts:
            counts = load_token_counts(args.token_counts, len(tokenizer))
        else:
            logger.info("no --token_counts: counting the tokens of %s", text)
            counts = world.make_once(lambda: {"counts": count_tokens(text, len(tokenizer))})["counts"]
        masking = Masking.of_recipe(tokenizer, counts, recipe)
    evaluated = held_out.with_training_masks(held_out_text, masking, tokenizer) if held_out_text else {}
    price = MICRO_BATCH_PRICE.get(world.device.type, 0)
    padding = Padding(padding_id(tokenizer), length, price, recipe.padding_free, recipe.compares_sequences)
    return RunData(train_set, sampler, masking, padding, evaluated, left_out)


def draws_of_sources(args: argparse.Namespace, train_set: LmSeqsDataset) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Where each `--data_file` begins among the sequences, and how often an epoch draws it; None, None: all once."""
    if args.data_weights is None and args.source_exponent is None:
        return None, None
    n_files = [len(expand_globs([name])) for name in args.data_file]
    sources = train_set.first_of_file(np.cumsum([0, *n_files]))
    tokens = np.array([train_set.lengths[a:b].sum(dtype=np.int64) for a, b in itertools.pairwise(sources)])
    weights = weights_of(args.data_file, tokens, args.data_weights, args.source_exponent)
    for name, n, weight in zip(args.data_file, tokens, weights, strict=True):
        logger.info("%s: %s tokens, which an epoch draws %.3g times", name, f"{n:,}", weight)
    return sources, weights


def log_missing_prompts(teacher: str, tokenizer, train_set: LmSeqsDataset) -> None:
    """Logs a hint if an encoder expects a prompt before each text, such as "query: ", and the text has none."""
    prompts = [prompt for prompt in prompts_of(teacher).values() if prompt.strip()]
    starts = [tokenizer(prompt.strip(), add_special_tokens=False).input_ids for prompt in prompts]
    some = [train_set[i][1:].tolist() for i in range(0, len(train_set), max(1, len(train_set) // 100))]
    if prompts and not any(sequence[: len(start)] == start for sequence in some for start in starts):
        logger.warning(
            "%s expects %s before a text, and no training text begins so: write it before each line",
            teacher, " or ".join(map(repr, dict.fromkeys(prompts))),
        )  # fmt: skip


def log_small_steps(run: Distiller) -> None:
    """Logs a hint if a step holds far fewer tokens than the learning rate was meant for."""
    recipe, tokens = run.recipe, run.data.train_sampler.n_tokens / run.steps_per_epoch
    if tokens * FAR_FEWER < TOKENS_PER_STEP and recipe.learning_rate >= Recipe.learning_rate:
        logger.info(
            "a step holds some %s tokens, a rate of %g was made for %s: docs/recipe.md says what suits short runs",
            f"{tokens:,.0f}", Recipe.learning_rate, f"{TOKENS_PER_STEP:,}",
        )  # fmt: skip


def build_models(
    args: argparse.Namespace, recipe: Recipe, config: PretrainedConfig, kept: Kept | None, device: torch.device
) -> tuple[LanguageModel, LanguageModel | None]:
    """Loads student and teacher onto the device, and freezes what the flags say."""
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
        pooling = pooling_of(args.teacher_name) if args.alpha_pooled else None
        # Lengths do not matter to a cosine, and a last matrix of the teacher's would not fit the student.
        teacher = LanguageModel(teacher.requires_grad_(False).eval(), Pooling(pooling.mode) if pooling else None)
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


def beside_encoder(args: argparse.Namespace, student: LanguageModel, teacher: LanguageModel) -> dict[str, object]:
    """The files with which sentence-transformers takes the student for an encoder like its teacher."""
    width = teacher.dim if args.keep_dense else None
    if width == student.dim:
        raise InputError("--keep_dense: the student is as wide as its teacher, so there is no Dense; leave it out.")
    files = sentence_transformers_files(args.teacher_name, student.dim, max_length(student.model.config), width)
    if args.keep_dense and not files:
        raise InputError(f"--keep_dense: {args.teacher_name} has no modules.json to list a Dense in; leave it out.")
    return files


def make_parser() -> argparse.ArgumentParser:
    return flags.make_parser(__doc__)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> int:
    with init_world(args.n_gpu, args.local_rank) as world:
        return run(args, world)


def run(args: argparse.Namespace, world: World) -> int:
    """Checks, loads, trains. Returns the exit status."""
    sanity_checks(args)

    # Everything that the user may have gotten wrong is checked before a model is loaded or a file is removed.
    dtype = choose_dtype(args, world.device)
    if args.deterministic:
        make_deterministic()
    run_folder.check_dump_path(args.dump_path, args.force, args.resume, inputs_of(args))
    args = with_names(args)
    tokenizer, student_cfg, teacher_cfg, kept = load_configs(args)
    state = run_folder.load_state(args.dump_path) if args.resume else None
    recorded = run_folder.load_parameters(args.dump_path) if state else {}
    args = with_defaults(args, student_cfg, teacher_cfg, world.device, dtype, recorded)
    taught = count_parameters(teacher_cfg, "the teacher") if teacher_cfg else 0
    check_memory("teacher and student", world.device, taught, count_parameters(student_cfg, "the student"))
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    text = open_corpus(args.data_file, tokenizer)
    if world.local_rank == 0:  # once a machine
        text.verify()
    length = longest_sequence(student_cfg, teacher_cfg, tokenizer)
    masked = not (family_of(student_cfg).causal or recipe.encoder_only)
    data = build_data(args, recipe, text, tokenizer, length, masked, world)

    logger.info("running on %s, computing in %s", describe_device(world.device), str(dtype).split(".")[1])
    if args.teacher_name and not needs_teacher(args):
        logger.info("no loss uses the teacher %s: it only serves to measure the agreement", args.teacher_name)
    utils.set_seed(args.seed)  # the student's random weights are drawn from this
    if recipe.encoder_only:
        logger.info("no loss needs a vocabulary head: the encoder alone is distilled, and nothing is masked")
        log_missing_prompts(args.teacher_name, tokenizer, data.train_set)
    student, teacher = build_models(args, recipe, student_cfg, kept, world.device)
    if (args.alpha_cos or args.alpha_layers or args.alpha_pooled) and student.dim != teacher.dim:
        logger.info("hidden states are compared through a learned linear map from %d to %d", student.dim, teacher.dim)
    parameters = describe_run(args, text, data, tokenizer, student, teacher, dtype, world)
    if state:
        check_resume(recorded, parameters, student.uses_dropout)
    folder = None
    if world.is_master and not args.dry_run:
        more = beside_encoder(args, student, teacher) if recipe.encoder_only or recipe.alpha_pooled else None
        saved = tokenizer_for(student_cfg, tokenizer)
        folder = run_folder.RunFolder(args.dump_path, parameters, saved, args.keep_checkpoints, more)
    distiller = Distiller(recipe, student, teacher, data, world, dtype, folder)
    if recipe.alpha_pooled:
        distiller.objective.find_center(data.some(TEXTS_TO_CENTER, recipe))
    log_small_steps(distiller)
    return estimate(distiller, args) if args.dry_run else train(distiller, state, args.dump_path)


def describe_run(
    args: argparse.Namespace, text: TokenCorpus, data: RunData, tokenizer, student: LanguageModel,
    teacher: LanguageModel | None, dtype: torch.dtype, world: World,
) -> dict:  # fmt: skip
    """What parameters.json holds: every flag, and fingerprints of everything that the run reads."""
    return vars(args) | {
        "data": text.identity,
        "left_out": None if data.left_out is None else fingerprint([torch.from_numpy(data.left_out)]),
        "valid_data": data.held_out[""].batches.dataset.corpus.identity if args.valid_data_file else None,
        "masking": fingerprint([torch.from_numpy(data.masking.token_probs)]) if data.masking else None,
        "shape": fingerprint_of_shape(student.model.config),
        "teacher": fingerprint(teacher.state_dict().values()) if teacher else None,
        "tokenizer": describe_tokenizer(tokenizer)["vocab_hash"],
        "dtype": str(dtype),
        "processes": world.size,
    }


def estimate(distiller: Distiller, args: argparse.Namespace) -> int:
    """Prints what the run would take. Returns the exit status."""
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
                f"the state in {dump_path} is of another run or version ({reason}); start over with --force."
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
