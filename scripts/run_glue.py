"""Fine-tunes models on GLUE tasks and compares their scores: what a student keeps of its teacher.

From local files in GLUE's own layout (glue/CoLA/train.tsv, ...; IMDb as glue/IMDb/train/pos/*.txt):

    python scripts/run_glue.py --models bert-base-uncased serialization_dir/my_first_training --data_dir glue \\
        --tasks CoLA STS-B RTE --seeds 1 2 3 --output serialization_dir/glue.jsonl

or, without --data_dir, from the hub (`pip install datasets`). The first model is the one that the others are
compared with. Every score is appended to --output as soon as it is known; the same command continues after an
interruption, and adds more models, tasks, or seeds. --tasks none only prints the table of the scores that are there.

With --distil and --save_models, the other models also learn each task from the first one, once that has been fine-tuned
on it: a second step of distillation, first of all hidden states and then of predictions, whose scores are those of
my_first_training-taught. With --augment they do so on rewritten copies of the examples too; those are in --save_models.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.tokenization import load_tokenizer
from evaluation import scores
from evaluation.augmentation import add_augmentation_flags, rewritten
from evaluation.fine_tuning import FineTuner, Settings, add_settings_flags, encode, load_for
from evaluation.glue import TASKS, Example, Task, read_task, score
from evaluation.task_card import CARD, Data, make_task_card
from evaluation.task_distillation import Distillation, add_distillation_flags, check_shared_vocabulary, distil
from evaluation.text_vectors import TextEncoder, similarity_scores
from files.atomic import append_json_lines, atomic_folder
from files.paths import check_output_file, check_output_folder
from models.loading import save_model
from training.checkpoint import fingerprint
from training.distributed import add_precision_flags, choose_dtype, single_process
from utils import InputError, integer, logger, path

HIDDEN_STATES = "STS-B, hidden states"  # the task of --hidden_states
NONE = "none"
SCORE = "score.jsonl"  # beside a fine-tuned model that is kept: its record


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=path, nargs="+", required=True, help="hub names or folders, such as a dump_path")
    add("--tokenizer_name", type=path, help="tokenizer of all models (default: each model's own)")
    add("--data_dir", type=path, help="folder with a folder for each task (default: the hub)")
    add("--tasks", nargs="+", choices=[*TASKS, NONE], default=list(TASKS), help="tasks (default: all nine, and IMDb)")
    add(
        "--hidden_states",
        action="store_true",
        help="also score STS-B without fine-tuning: how well the cosine of the vectors of two texts ranks the pairs",
    )
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--seeds",
        type=integer(0, 2**31 - 1),
        nargs="+",
        default=[1, 2, 3],
        help="random seeds of head, order, and dropout; the median counts (1 2 3)",
    )
    add_settings_flags(group)
    group.add_argument(
        "--distil",
        action="store_true",
        help="also let the other models follow the first one, which --save_models keeps as fine-tuned on the same task "
        "with the same seed",
    )
    add_distillation_flags(group)
    add_augmentation_flags(group, "the first of --models")
    group.add_argument(
        "--max_length", type=integer(8, 1 << 20), help="tokens to read of an example (128; 512 for IMDb)"
    )
    group.add_argument("--max_train_examples", type=integer(1, 1 << 40), help="fine-tune on the first examples only")
    add_precision_flags(parser)
    add("--n_gpu", type=integer(0, 1), help="0 for the CPU (default: what there is)")
    add("--output", type=path, default="serialization_dir/glue.jsonl", help="file to append scores to (%(default)s)")
    add("--save_models", type=path, help="folder to keep the fine-tuned models in, with their scores")
    return parser


def fine_tune_and_score(
    name: str, tokenizer, record: dict, train: list[Example], dev: list[list[Example]], args, device, dtype,
    teacher: Path | None = None, copies: Iterable[tuple[str, ...]] = (),
) -> dict[str, float]:  # fmt: skip
    """The metrics of the model `name` after fine-tuning.

    Args:
        teacher: folder of a fine-tuned model that helps.
        copies: texts to follow it on, beside those of the examples.
    """
    task, seed = TASKS[record["task"]], record["seed"]
    utils.set_seed(seed)  # the head is drawn from this
    settings = Settings.of(args)
    model = load_for(
        AutoModelForSequenceClassification, name, tokenizer, settings.dropout, num_labels=len(task.labels) or 1
    )
    length = args.max_length or task.max_length
    texts = [example.texts for example in train]
    labels = [(float if task.is_regression else int)(example.label) for example in train]
    tuner = FineTuner(model, tokenizer, settings, seed, dtype, use_cpu=device.type == "cpu")
    title = f"{record['model']}, {task.name}, seed {seed}"
    if teacher:
        texts, labels = [*texts, *copies], [*labels, *(None for _ in copies)]
        distil(tuner, load_teacher(teacher, name, tokenizer), texts, labels, length, title, Distillation.of(args))
    else:
        features = encode(tokenizer, model, texts, length)
        tuner.train([feature | {"labels": label} for feature, label in zip(features, labels, strict=True)], title)
    sets = [encode(tokenizer, model, [example.texts for example in examples], length) for examples in dev]
    metrics = score(task, [tuner.predict(features) for features in sets], dev)
    if args.save_models:
        folder, helper = kept_at(args, record["model"], task.name, seed), args.models[0] if teacher else None
        shown = {metric: metrics[metric] for metric in task.metrics}
        card = make_task_card(folder.name, model, name, helper, Data.of(task), shown, args.command)
        with atomic_folder(folder) as temporary:
            save_model(model, tokenizer, temporary)
            (temporary / CARD).write_text(str(card))
            append_json_lines(temporary / SCORE, record | {"metrics": metrics})
    return metrics


def load_teacher(folder: Path, student: str, students_tokenizer) -> PreTrainedModel:
    """A fine-tuned model that --save_models has kept."""
    try:
        tokenizer = load_tokenizer(str(folder))
        model = load_for(AutoModelForSequenceClassification, str(folder), tokenizer, head_required=True)
    except InputError as error:
        raise InputError(f"{error} Remove that folder, which --save_models has left, and it is made again.") from None
    check_shared_vocabulary(str(folder), tokenizer, student, students_tokenizer)
    return model


def taught(name: str) -> str:
    """The name of a model that was fine-tuned with the help of another one."""
    return f"{Path(name).name}-taught"


def kept_at(args: argparse.Namespace, name: str, task: str, seed: int) -> Path:
    """Where --save_models keeps a fine-tuned model."""
    return Path(args.save_models) / f"{Path(name).name}-{task}-{seed}"


def conditions(args: argparse.Namespace, task: Task, dtype: torch.dtype) -> dict:
    """The conditions under which two scores of one model and seed are the same."""
    return asdict(Settings.of(args)) | {
        "max_length": args.max_length or task.max_length,
        "max_train_examples": args.max_train_examples,
        "dtype": str(dtype).removeprefix("torch."),
    }


def jobs(args: argparse.Namespace, tasks: list[Task], device, dtype) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """What each score is of (the first part of its record in the file), and a call that finds its metrics."""
    data = {task.name: read_task(task, args.data_dir) for task in tasks}
    pairs = read_task(TASKS["STS-B"], args.data_dir)[1][0] if args.hidden_states else None
    names = args.models if tasks or pairs else []
    tokenizers = {name: load_tokenizer(args.tokenizer_name or name) for name in names}
    models = {name: {"model": Path(name).name, "weights": weights_of(name)} for name in names}
    if pairs:
        for name in names:
            record = models[name] | {"task": HIDDEN_STATES, "seed": None}
            yield record, lambda name=name: similarity_scores(TextEncoder(name, device, tokenizers[name]), pairs)
    copies = {task.name: copies_of(args, task, data[task.name][0], device) for task in tasks if args.augment}
    for seed in dict.fromkeys(args.seeds):
        for task in tasks:
            train, dev = data[task.name]
            settings = (train[: args.max_train_examples], dev, args, device, dtype)
            run = {"task": task.name, "seed": seed, **conditions(args, task, dtype)}
            for name in names:
                record = models[name] | run
                yield record, partial(fine_tune_and_score, name, tokenizers[name], record, *settings)
            if not args.distil:
                continue
            teacher = kept_at(args, names[0], task.name, seed)
            run |= {"teacher": models[names[0]]["weights"], "alpha_ce": args.alpha_ce, "temperature": args.temperature}
            if args.layer_epochs:
                run |= {"layer_epochs": args.layer_epochs, "layer_rate": args.layer_rate}
                if args.alpha_relation:
                    run |= {"alpha_relation": args.alpha_relation}
            if args.augment:
                run |= {"augment": args.augment, "augment_with": rewriter(args).name}
            more = {"teacher": teacher, "copies": copies.get(task.name, ())}
            for name in names[1:]:
                record = models[name] | run | {"model": taught(name)}
                yield record, partial(fine_tune_and_score, name, tokenizers[name], record, *settings, **more)


def rewriter(args: argparse.Namespace) -> Path:
    """The model that rewrites examples."""
    return Path(args.augment_with or args.models[0])


def copies_of(args: argparse.Namespace, task: Task, train: list[Example], device) -> list[tuple[str, ...]]:
    """Rewritten texts, the same for all seeds."""
    file = Path(args.save_models) / f"{task.name}-{args.augment}-{rewriter(args).name}.jsonl"
    texts = [example.texts for example in train[: args.max_train_examples]]
    return rewritten(texts, args.augment, str(rewriter(args)), 0, file, device, f"{task.name}, copies")


def is_done(args: argparse.Namespace, known: list[dict], record: dict) -> bool:
    """Whether the score is known and, if fine-tuned models are kept, this one is."""
    if args.save_models and record["seed"] is not None:
        kept = scores.read(kept_at(args, record["model"], record["task"], record["seed"]) / SCORE)
        if scores.find(kept, record) is None:
            return False
    return scores.find(known, record) is not None


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_output_file(args.output, "--output")
    utils.check_needed(args, make_parser(), "distil", *(field.name for field in fields(Distillation)), "augment")
    utils.check_needed(args, make_parser(), "augment", "augment_with")
    if args.distil and not (args.save_models and args.models[1:]):
        raise InputError("--distil needs --save_models, a folder for the fine-tuned teachers, and a second model.")
    if args.save_models:
        check_output_folder(args.save_models, "--save_models")
    students = args.models[1:] if args.distil else []
    names = utils.distinct_names([*args.models, *map(taught, students)], "--models")
    known = scores.read(args.output)
    device = single_process(args.n_gpu).device
    tasks = [TASKS[name] for name in dict.fromkeys(args.tasks) if name != NONE]
    for record, find_metrics in jobs(args, tasks, device, choose_dtype(args, device)):
        if is_done(args, known, record):
            continue
        start = time.monotonic()
        record["metrics"] = metrics = find_metrics()
        record |= {"seconds": round(time.monotonic() - start, 1), "versions": scores.versions()}
        append_json_lines(args.output, record)
        known.append(record)
        seed = "" if record["seed"] is None else f", seed {record['seed']}"
        logger.info(
            "%s, %s%s: %.2f (%.0f s)", record["model"], record["task"], seed, metrics["score"], record["seconds"]
        )
    if not any(record["model"] in names for record in known):
        raise InputError(f"--tasks {NONE}: {args.output} holds no scores of these models yet.")
    print(scores.table(known, names))


def weights_of(name: str) -> int:
    """A checksum that distinguishes these weights from others of the same name."""
    utils.set_seed(0)  # of a pooler, if the weights have none
    return fingerprint(load_for(AutoModel, name).state_dict().values())


if __name__ == "__main__":
    raise SystemExit(main())
