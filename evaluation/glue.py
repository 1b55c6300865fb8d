"""The nine tasks of GLUE (Wang et al., 2019) and IMDb (Maas et al., 2011): their files, and the metrics of each.

A task's score is the mean of its metrics in percent, and the macro score the mean of the tasks' scores, as on GLUE's
leaderboard.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.paths import check_input_file
from utils import InputError, logger

MOST_BROKEN = 0.01  # share of lines with too few fields in a file that counts as whole: the official QQP has some
MAX_SCORE = 5  # of a regression
ENTAILMENT = ("not_entailment", "entailment")


class Example(NamedTuple):
    """One or two texts, and the index of the right label, or the score."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Attributes:
        name: also that of its folder.
        texts, label: the columns of its files, by the header or, where there is none, by number.
        labels: what is in the label's column, in the order of their indices; empty: a score from 0 to 5.
        metrics: whose mean in percent is the score.
        dev_files: the development sets; metrics are means over them.
        hub: data set and configuration on the hub.
        hub_texts: the columns there.
        max_length: tokens that are read by default.
    """

    name: str
    texts: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: tuple[str, str | None]
    hub_texts: tuple[str, ...]
    dev_files: tuple[str, ...] = ("dev",)
    hub_dev: tuple[str, ...] = ("validation",)
    max_length: int = 128

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def highest_label(self) -> int:
        return MAX_SCORE if self.is_regression else len(self.labels) - 1


def _glue(name, config, texts, label, labels, metrics, hub_texts=None, **more) -> Task:
    return Task(name, texts, label, labels, metrics, ("nyu-mll/glue", config), hub_texts or texts, **more)


BINARY, PAIR, QUESTIONS = ("0", "1"), ("sentence1", "sentence2"), ("question1", "question2")
TASKS = {
    task.name: task
    for task in (
        _glue("CoLA", "cola", (3,), 1, BINARY, ("matthews",), ("sentence",)),
        _glue("SST-2", "sst2", ("sentence",), "label", BINARY, ("accuracy",)),
        _glue("MRPC", "mrpc", ("#1 String", "#2 String"), "Quality", BINARY, ("accuracy", "f1"), PAIR),
        _glue("STS-B", "stsb", PAIR, "score", (), ("pearson", "spearman")),
        _glue("QQP", "qqp", QUESTIONS, "is_duplicate", BINARY, ("accuracy", "f1")),
        _glue(
            "MNLI",
            "mnli",
            PAIR,
            "gold_label",
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("premise", "hypothesis"),
            dev_files=("dev_matched", "dev_mismatched"),
            hub_dev=("validation_matched", "validation_mismatched"),
        ),
        _glue("QNLI", "qnli", ("question", "sentence"), "label", ENTAILMENT[::-1], ("accuracy",)),
        _glue("RTE", "rte", PAIR, "label", ENTAILMENT[::-1], ("accuracy",)),
        _glue("WNLI", "wnli", PAIR, "label", BINARY, ("accuracy",)),
        Task(
            "IMDb",
            ("text",),
            "label",
            ("neg", "pos"),
            ("accuracy",),
            ("stanfordnlp/imdb", None),
            ("text",),
            dev_files=("test",),
            hub_dev=("test",),
            max_length=512,
        ),
    )
}
CORRELATIONS = ("matthews", "pearson", "spearman")
APART = ("CoLA", "STS-B")  # where half the depth costs most; many published averages leave them out


# ------------------------------------------------------------------------------------------------------------- examples


def read_task(task: Task, data_dir: str | None) -> tuple[list[Example], list[list[Example]]]:
    """The training examples, and those of each development set.

    Args:
        data_dir: the folder with a folder for each task; None: from the hub, which needs the package `datasets`.

    Raises: InputError if a file is missing or none of this task.
    """
    if data_dir is None:
        return _from_hub(task, "train"), [_from_hub(task, split) for split in task.hub_dev]
    folder = Path(data_dir) / task.name
    if task.name == "IMDb":
        return _from_folders(task, folder / "train"), [_from_folders(task, folder / name) for name in task.dev_files]
    return _from_tsv(task, folder / "train.tsv"), [_from_tsv(task, folder / f"{name}.tsv") for name in task.dev_files]


def _from_tsv(task: Task, path: Path) -> list[Example]:
    check_input_file(path, "--data_dir", "the files of a task lie in a folder of its name, such as glue/CoLA/dev.tsv")
    lines = path.read_text("utf-8-sig", errors="replace").rstrip("\n").split("\n")
    columns: Iterable = (*task.texts, task.label)
    first = 0
    if isinstance(task.label, str):
        header = lines[0].rstrip("\r").split("\t")
        if missing := [column for column in columns if column not in header]:
            raise InputError(f"{path} is not a file of {task.name}: its first line names no column {missing[0]!r}.")
        columns, first = [header.index(column) for column in columns], 1
    columns = list(columns)
    examples, broken = [], []
    for number, line in enumerate(lines[first:], start=first + 1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) <= max(columns):
            broken.append(number)
            continue
        *texts, label = (fields[column] for column in columns)
        examples.append(Example(tuple(texts), _label(task, label, f"{path}, line {number}")))
    if broken and (broken[-1] == len(lines) or len(broken) > MOST_BROKEN * len(lines)):
        raise InputError(f"{path}, line {broken[-1]}: fewer fields than {task.name} has; is the file cut short?")
    if broken:
        logger.warning("%s: %d broken lines are left out, the first is line %d", path, len(broken), broken[0])
    if not examples:
        raise InputError(f"{path} holds no examples.")
    return examples


def _label(task: Task, value: str, where: str) -> float:
    try:
        label = float(value) if task.is_regression else task.labels.index(value)
        if 0 <= label <= task.highest_label:
            return label
    except ValueError:
        pass  # reported below, like a number out of range
    expected = f"numbers from 0 to {MAX_SCORE}" if task.is_regression else " or ".join(task.labels)
    raise InputError(f"{where}: the label is {value[:60]!r}, but {task.name}'s are {expected}.")


def _from_folders(task: Task, folder: Path) -> list[Example]:
    """IMDb as it comes: a folder for each label, a file for each review."""
    examples = []
    for label, name in enumerate(task.labels):
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise InputError(f"--data_dir: {folder / name} holds no reviews (*.txt).")
        examples += [Example((file.read_text("utf-8", errors="replace"),), label) for file in files]
    return examples


def _from_hub(task: Task, split: str) -> list[Example]:
    try:
        import datasets
    except ImportError:
        raise InputError("tasks from the hub need `pip install datasets`; or give --data_dir.") from None
    try:
        rows = datasets.load_dataset(*task.hub, split=split)
    except Exception as error:  # a network, a disk or the hub can fail in many ways
        raise InputError(f"{task.name} can't be had from the hub ({error}); give --data_dir.") from None
    if not all(0 <= row["label"] <= task.highest_label for row in rows):
        raise InputError(f"{task.name} from the hub, {split}: some labels are not from 0 to {task.highest_label}.")
    return [Example(tuple(row[column] for column in task.hub_texts), row["label"]) for row in rows]


# -------------------------------------------------------------------------------------------------------------- metrics


def score(task: Task, predictions: list[np.ndarray], examples: list[list[Example]]) -> dict[str, float]:
    """Each of the task's metrics in percent, mean over the development sets, and their mean as `score`.

    Args:
        predictions: for each development set (n, number of labels) logits, or (n, 1) scores.
    """
    sets = [
        _metrics(task, logits, np.array([example.label for example in labelled]))
        for logits, labelled in zip(predictions, examples, strict=True)
    ]
    metrics = {name: float(np.mean([values[name] for values in sets])) for name in task.metrics}
    return metrics | {"score": float(np.mean(list(metrics.values())))}


def _metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    import torch
    from torchmetrics.functional import classification, regression

    n_labels = len(task.labels)
    functions = {
        "accuracy": lambda a, b: (a == b).double().mean(),
        "f1": classification.binary_f1_score,
        "macro_f1": lambda a, b: classification.multiclass_f1_score(a, b, n_labels, average="macro"),
        "matthews": lambda a, b: classification.multiclass_matthews_corrcoef(a, b, n_labels),
        "pearson": regression.pearson_corrcoef,
        "spearman": regression.spearman_corrcoef,
    }
    if task.is_regression:
        guesses, right = torch.tensor(logits[:, 0], dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
    else:
        guesses, right = torch.tensor(logits.argmax(-1)), torch.tensor(labels.astype(int))
    if len(guesses.unique()) == 1 or len(right.unique()) == 1:
        # A correlation with what never varies is not defined: 0 for GLUE, nan or a small value for torchmetrics.
        functions |= dict.fromkeys(CORRELATIONS, lambda a, b: 0.0)
    return {name: 100 * float(functions[name](guesses, right)) for name in task.metrics}
