"""A task of one's own: a table of texts and labels, and the kind of task that its labels make.

A table is a .tsv (tabs, no quotes), a .csv, or a .jsonl with an object a line. Its columns are `text`, `label` and, for
a task about two texts, `text_pair`; others are ignored. Labels are words or whole numbers, which are classes, or
numbers of which some are not whole, which are scores.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from evaluation.glue import Example, Task
from files.json_reader import parse_json
from files.paths import check_input_file
from utils import InputError

TEXT, PAIR, LABEL = "text", "text_pair", "label"
DIALECTS = {".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}, ".csv": {}}
JSON_LINES = (".jsonl", ".json")
WAY_OUT = f"each line is an object with {TEXT!r} and {LABEL!r}"


class Line(NamedTuple):
    """An example as its file has it."""

    texts: tuple[str, ...]
    label: str  # empty in a file without labels
    where: str  # file and line, for messages


def read_table(path: str | Path, flag: str, has_labels: bool = True) -> list[Line]:
    """The examples of a file. Raises: InputError that names the file, and the line if that is what is wrong."""
    path = Path(path)
    check_input_file(path, flag)
    if path.suffix not in (*DIALECTS, *JSON_LINES):
        raise InputError(f"{flag} {path}: the name of a table must end in {', '.join((*DIALECTS, JSON_LINES[0]))}.")
    wanted = [TEXT, *([LABEL] if has_labels else [])]
    found = []
    for where, fields in (_lines if path.suffix in DIALECTS else _objects)(path, wanted):
        if empty := [column for column in (*wanted, *([PAIR] if PAIR in fields else [])) if not fields[column].strip()]:
            raise InputError(f"{where}: its {empty[0]!r} is empty.")
        texts = (fields[TEXT], fields[PAIR]) if PAIR in fields else (fields[TEXT],)
        if found and len(found[0].texts) != len(texts):
            raise InputError(f"{where}: some examples have a {PAIR!r} and some do not.")
        found.append(Line(texts, fields[LABEL] if has_labels else "", where))
    if not found:
        raise InputError(f"{flag} {path} holds no examples.")
    return found


def _lines(path: Path, wanted: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, **DIALECTS[path.suffix])
            header = next(reader, [])
            if missing := [column for column in wanted if column not in header]:
                raise InputError(f"{path}: its first line names no column {missing[0]!r}.")
            for fields in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                if len(fields) != len(header):
                    raise InputError(f"{where}: {len(fields)} fields, but the first line names {len(header)}.")
                yield where, dict(zip(header, fields, strict=True))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; `iconv -t utf-8` converts other encodings.") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}.") from None


def _objects(path: Path, wanted: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    shape = {TEXT: str, LABEL: (str, float)}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        value = parse_json(line, where, {column: shape[column] for column in wanted}, WAY_OUT)
        if not isinstance(value.get(PAIR, ""), str):
            raise InputError(f"{where}: its {PAIR!r} is not text.")
        yield where, {name: str(value[name]) for name in (TEXT, PAIR, LABEL) if value.get(name) is not None}


def task_of(train: list[Line], name: str) -> Task:
    """What the labels of the training set make it: scores to predict, or classes to tell apart."""
    labels = {line.label for line in train}
    numbers = [_number(label) for label in labels]
    if None not in numbers and not all(label.lstrip("+-").isdigit() for label in labels):
        return Task(name, (), LABEL, (), ("pearson", "spearman"), ("", None), ())
    if len(labels) == 1:
        raise InputError(f"{train[0].where}: all labels are {train[0].label!r}, so there is nothing to learn.")
    if 2 * len(labels) > len(train) + 2:
        raise InputError(f"{train[0].where}: {len(labels)} different labels in {len(train)} examples are too many.")
    names = sorted(labels) if None in numbers else sorted(labels, key=int)
    return Task(name, (), LABEL, tuple(names), ("accuracy", "macro_f1", "matthews"), ("", None), ())


def examples_of(task: Task, lines: list[Line]) -> list[Example]:
    """With the index of the label, or the score. Raises: InputError for a label that the task does not have."""
    examples = []
    for line in lines:
        label = _number(line.label) if task.is_regression else None
        if line.label in task.labels:
            label = task.labels.index(line.label)
        if label is None:
            expected = "a number" if task.is_regression else f"one of the training set's ({', '.join(task.labels)})"
            raise InputError(f"{line.where}: the label {line.label[:60]!r} is not {expected[:300]}.")
        examples.append(Example(line.texts, label))
    return examples


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
