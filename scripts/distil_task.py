"""Distils a task of your own: from two files of labeled texts to a small model that answers like a large one.

    python scripts/distil_task.py --train_file my_task/train.tsv --dev_file my_task/dev.tsv \\
        --teacher bert-base-uncased --student serialization_dir/my_first_training --output_dir serialization_dir/my_task

The files are .tsv, .csv or .jsonl with the columns text, label and, for a task about two texts, text_pair. Labels are
classes (words or whole numbers) or scores (numbers of which some are not whole). The teacher is fine-tuned on them,
unless it has been already; then the student follows its hidden states, and then its predictions. --output_dir holds

    student           for pipeline("text-classification"), with your label names; in student/onnx for ONNX Runtime, if
                      onnx, onnxscript and onnxruntime are installed
    teacher           fine-tuned, unless the one you named was
    results.md        scores, size and speed of both
    copies.jsonl      the rewritten texts of --augment
    differences.tsv   the examples of --dev_file that they answer differently

The same command continues after an interruption with what was not finished.
"""

import argparse
import csv
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export_onnx import INT8, OnnxModel, encode_batch, export, require_packages

import utils
from corpus.tokenization import load_tokenizer
from evaluation.augmentation import add_augmentation_flags, rewritten
from evaluation.fine_tuning import FineTuner, Settings, add_settings_flags, encode, load_for
from evaluation.glue import Example, Task, score
from evaluation.own_task import examples_of, read_table, task_of
from evaluation.task_card import CARD, Data, make_task_card
from evaluation.task_distillation import Distillation, add_distillation_flags, check_shared_vocabulary, distil
from files.atomic import atomic_folder, atomic_write, write_json
from files.json_reader import read_json
from files.paths import check_output_folder
from models.loading import read_config, save_model
from training.distributed import add_precision_flags, choose_dtype, single_process
from utils import InputError, integer, logger, path

CONDITIONS = "conditions.json"  # in --output_dir: what its models were made with
COPIES = "copies.jsonl"  # there, with --augment
TIMED = 100  # texts


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--train_file", type=path, required=True, help="labeled texts to train on")
    add("--dev_file", type=path, required=True, help="labeled texts to score both models on")
    add("--unlabelled_file", type=path, help="more texts for the student, with the teacher's answers as labels")
    add("--teacher", type=path, required=True, help="hub name or folder; fine-tuned here if it is not yet")
    add("--student", type=path, required=True, help="hub name or folder, such as a dump_path")
    add("--output_dir", type=path, required=True, help="folder for the models and tables")
    add("--max_length", type=integer(8, 1 << 20), default=128, help="tokens to read of an example (%(default)s)")
    add("--seed", type=integer(0, 2**31 - 1), default=1, help="random seed of heads, order, and dropout (%(default)s)")
    add_settings_flags(parser.add_argument_group("fine-tuning"))
    group = parser.add_argument_group("distillation")
    add_distillation_flags(group)
    add_augmentation_flags(group, "--teacher, if it has not been fine-tuned")
    add_precision_flags(parser)
    add("--n_gpu", type=integer(0, 1), help="0 for the CPU (default: what there is)")
    return parser


def read_files(args: argparse.Namespace) -> tuple[Task, list[Example], list[Example], list[tuple[str, ...]]]:
    """The task; its examples to train on and to score; texts without labels."""
    lines = read_table(args.train_file, "--train_file")
    task = task_of(lines, Path(args.output_dir).name)
    train, dev = examples_of(task, lines), examples_of(task, read_table(args.dev_file, "--dev_file"))
    unlabelled = []
    if args.unlabelled_file:
        unlabelled = [line.texts for line in read_table(args.unlabelled_file, "--unlabelled_file", has_labels=False)]
    if len({len(texts) for texts in [example.texts for example in train + dev] + unlabelled}) > 1:
        raise InputError("some of the files have a column 'text_pair' and some do not.")
    kind = "scores" if task.is_regression else f"{len(task.labels)} classes"
    logger.info("%s: %d texts to train on, %d to score", kind, len(train) + len(unlabelled), len(dev))
    return task, train, dev, unlabelled


def check_conditions(args: argparse.Namespace, folder: Path, examples: tuple) -> None:
    """Notes in the folder what its models are made with. Raises InputError if that was something else."""
    conditions = {f"--{name}": value for name, value in vars(args).items() if name not in ("command", "n_gpu")}
    conditions["contents of the files"] = zlib.crc32(repr(examples).encode(errors="surrogatepass"))
    file = folder / CONDITIONS
    if file.exists():
        known = read_json(file, {...: object}, "give another --output_dir")
        if changed := [name for name in conditions if known.get(name) != conditions[name]]:
            raise InputError(f"--output_dir {folder} was made with other {changed[0]}; give another folder.")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"--output_dir {folder} is not empty, and not of this script; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, conditions)


# ---------------------------------------------------------------------------------------------------------- the models


class Trainings:
    """Makes teacher and student of a task, each as a folder that is whole once it is there."""

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        self.args, self.task, self.settings, self.folder = args, task, Settings.of(args), Path(args.output_dir)
        self.device = single_process(args.n_gpu).device
        self.dtype = choose_dtype(args, self.device)

    def teacher(self, train: list[Example]) -> str:
        """Its folder, or the name that was given if that model knows the task."""
        name, folder = self.args.teacher, self.folder / "teacher"
        if is_fine_tuned(name, self.task):
            logger.info("%s has been fine-tuned for these labels", name)
            return name
        if not folder.exists():
            tuner = self._tuner(name)
            features = encode(tuner.tokenizer, tuner.model, [example.texts for example in train], self.args.max_length)
            labels = [example.label for example in train]
            tuner.train([f | {"labels": label} for f, label in zip(features, labels, strict=True)], "teacher")
            self._save(tuner, folder)
        return str(folder)

    def student(self, teacher: str, train: list[Example], unlabelled: list[tuple[str, ...]]) -> str:
        """Its folder."""
        folder = self.folder / "student"
        if not folder.exists():
            tuner = self._tuner(self.args.student)
            texts = [example.texts for example in train] + unlabelled
            labels = [example.label for example in train] + [None] * len(unlabelled)
            how = Distillation.of(self.args)
            distil(tuner, load_fine_tuned(teacher)[0], texts, labels, self.args.max_length, "student", how)
            self._save(tuner, folder)
        return str(folder)

    def _tuner(self, name: str) -> FineTuner:
        utils.set_seed(self.args.seed)  # the head is drawn from this
        tokenizer, labels = load_tokenizer(name), self.task.labels
        options = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        options = {"num_labels": 1} if self.task.is_regression else options
        model = load_for(AutoModelForSequenceClassification, name, tokenizer, self.settings.dropout, **options)
        on_cpu = self.device.type == "cpu"
        return FineTuner(model, tokenizer, self.settings, self.args.seed, self.dtype, use_cpu=on_cpu)

    @staticmethod
    def _save(tuner: FineTuner, folder: Path) -> None:
        with atomic_folder(folder) as temporary:
            save_model(tuner.model, tuner.tokenizer, temporary)


def is_fine_tuned(name: str, task: Task) -> bool:
    """Whether a model has a head for these very labels, in this order."""
    config = read_config(name)
    classifies = any(kind.endswith("SequenceClassification") for kind in config.architectures or ())
    labels = tuple(config.id2label.get(i) for i in range(len(config.id2label)))
    return classifies and (len(labels) == 1 if task.is_regression else labels == task.labels)


def load_fine_tuned(name: str) -> tuple[PreTrainedModel, object]:
    """Model and tokenizer."""
    tokenizer = load_tokenizer(name)
    return load_for(AutoModelForSequenceClassification, name, tokenizer, head_required=True).eval(), tokenizer


# ---------------------------------------------------------------------------------------------------------- the report


class Answers:
    """What a model says of the texts of --dev_file.

    Args:
        ask: a batch, as `encode` makes it of some texts -> (bs, number of labels) logits, or (bs, 1) scores.

    Attributes:
        logits: those of all texts.
        ms: milliseconds a text, one at a time; the median.
        megabytes: of the weights.
    """

    def __init__(self, ask: Callable, encode: Callable, texts: list[tuple[str, ...]], n_bytes: int) -> None:
        batches = (encode(texts[i : i + 32]) for i in range(0, len(texts), 32))
        self.logits, self.megabytes = np.concatenate([ask(batch) for batch in batches]), n_bytes / 1e6
        seconds = []
        for text in texts[:TIMED]:
            batch, start = encode([text]), time.perf_counter()
            ask(batch)
            seconds.append(time.perf_counter() - start)
        self.ms = 1000 * statistics.median(seconds)


def answers_of(models: dict[str, str], texts: list[tuple[str, ...]], length: int) -> dict[str, Answers]:
    """Of each model, and of the student in int8 if that can be made.

    Args:
        models: role -> folder or hub name.
    """
    found = {}
    for role, name in models.items():
        model, tokenizer = load_fine_tuned(name)
        encoder = lambda some, model=model, tokenizer=tokenizer: encode_batch(tokenizer, model, some, length)  # noqa: E731
        with torch.inference_mode():
            ask = lambda batch, model=model: model(**batch).logits.numpy()  # noqa: E731
            found[role] = Answers(ask, encoder, texts, 4 * model.num_parameters())
    try:
        require_packages()
    except InputError as error:
        logger.info("no line for int8: %s", error)
    else:
        export(model, tokenizer, Path(models["student"]) / "onnx")
        file = Path(models["student"]) / "onnx" / INT8
        found["student, int8"] = Answers(OnnxModel(file), encoder, texts, file.stat().st_size)
    return found


def table_of(task: Task, answers: dict[str, Answers], dev: list[Example]) -> str:
    lines = []
    for role, given in answers.items():
        metrics = score(task, [given.logits], [dev])
        figures = [f"{metrics[name]:.1f}" for name in task.metrics]
        lines.append([role, *figures, f"{given.ms:.1f}", f"{given.megabytes:.3g}"])
    return utils.markdown_table(["", *(name.replace("_", " ") for name in task.metrics), "ms a text", "MB"], lines)


def write_differences(file: Path, task: Task, answers: dict[str, Answers], dev: list[Example]) -> None:
    """What teacher and student answer differently; of scores, the tenth of the texts where they differ most."""
    t, s = answers["teacher"].logits, answers["student"].logits
    if task.is_regression:
        chosen = np.argsort(-np.abs(t[:, 0] - s[:, 0]), kind="stable")[: -(-len(dev) // 10)]
        say = lambda logits: f"{logits[0]:.2f}"  # noqa: E731
    else:
        chosen = np.flatnonzero(t.argmax(-1) != s.argmax(-1))
        say = lambda logits: task.labels[logits.argmax()]  # noqa: E731
    with atomic_write(file, "w") as out:
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        writer.writerow(["label", "teacher", "student", *("text", "text_pair")[: len(dev[0].texts)]])
        for i in chosen:
            label = dev[i].label if task.is_regression else task.labels[int(dev[i].label)]
            writer.writerow([label, say(t[i]), say(s[i]), *dev[i].texts])
    logger.info("%s: %d of %d examples", file, len(chosen), len(dev))


def write_card(
    args: argparse.Namespace, task: Task, teacher: str, student: str, answers: dict[str, Answers], dev: list[Example],
    table: str,
) -> None:  # fmt: skip
    """The student's model card."""
    metrics = score(task, [answers["student"].logits], [dev])
    shown = {name: metrics[name] for name in task.metrics}
    name, model = f"{task.name}-student", load_fine_tuned(student)[0]
    card = make_task_card(name, model, args.student, teacher, Data(task.name), shown, args.command, table)
    with atomic_write(Path(student) / CARD, "w") as file:
        file.write(str(card))


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    utils.check_needed(args, make_parser(), "augment", "augment_with")
    folder = Path(args.output_dir)
    check_output_folder(folder, "--output_dir")
    task, train, dev, unlabelled = read_files(args)
    check_shared_vocabulary(args.teacher, load_tokenizer(args.teacher), args.student, load_tokenizer(args.student))
    trainings = Trainings(args, task)
    check_conditions(args, folder, (train, dev, unlabelled))
    if args.augment and not (folder / "student").exists():
        texts, model, file = [example.texts for example in train], args.augment_with or args.teacher, folder / COPIES
        unlabelled += rewritten(texts, args.augment, model, args.seed, file, trainings.device, "copies")
    teacher = trainings.teacher(train)
    student = trainings.student(teacher, train, unlabelled)
    answers = answers_of({"teacher": teacher, "student": student}, [example.texts for example in dev], args.max_length)
    write_differences(folder / "differences.tsv", task, answers, dev)
    table = table_of(task, answers, dev)
    with atomic_write(folder / "results.md", "w") as file:
        file.write(table + "\n")
    write_card(args, task, teacher, student, answers, dev, table)
    print(table)


if __name__ == "__main__":
    raise SystemExit(main())
