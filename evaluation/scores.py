"""The file of scores that scripts/run_glue.py appends to, and the table made of it.

A line of the file is a JSON object: `model`, `task`, `seed`, `weights` (distinguishes models of the same name), how it
was fine-tuned, `metrics` in percent with their mean as `score`, `seconds`, and `versions` of the packages.
"""

import importlib.metadata
import statistics
from pathlib import Path

from evaluation.glue import APART, TASKS
from files.json_reader import read_json_lines
from utils import markdown_table

RECORD = {"model": str, "task": str, "seed": (int, None), "weights": int, "metrics": {"score": float, ...: float}}
RESULT = ("metrics", "seconds", "versions")


def read(path: str | Path) -> list[dict]:
    """The records of the file, if it is there; a last line that a kill cut short is left out.

    Raises: InputError if it is not such a file.
    """
    if not Path(path).exists():
        return []
    return read_json_lines(path, RECORD, "name a file of scripts/run_glue.py's scores")


def versions() -> dict[str, str]:
    """Of the packages that a score depends on."""
    return {package: importlib.metadata.version(package) for package in ("torch", "transformers")}


def find(records: list[dict], wanted: dict) -> dict | None:
    """The record of this model, task and seed under the same conditions."""
    for record in reversed(records):
        if {key: value for key, value in record.items() if key not in RESULT} == wanted:
            return record
    return None


def by_task(records: list[dict], model: str) -> dict[str, list[float]]:
    """Task -> the scores of a model's seeds, those of its newest weights under the newest conditions."""
    mine = [record for record in records if record["model"] == model]
    scores: dict[str, dict] = {}
    for record in mine:
        conditions = {key: value for key, value in record.items() if key not in (*RESULT, "seed")}
        if scores.get(record["task"], {}).get("conditions") != conditions:
            scores[record["task"]] = {"conditions": conditions, "seeds": {}}
        scores[record["task"]]["seeds"][record["seed"]] = record["metrics"]["score"]
    return {task: list(entry["seeds"].values()) for task, entry in scores.items()}


def table(records: list[dict], models: list[str]) -> str:
    """A Markdown table: one line per task, one column per model; the first model is what the others are compared to.

    Macro scores are over the tasks that all models have scores of.
    """
    scores = {model: by_task(records, model) for model in models}
    shared = [task for task in TASKS if all(task in known for known in scores.values())]
    others = [
        task for task in (*TASKS, *sorted({record["task"] for record in records} - TASKS.keys())) if task not in shared
    ]
    cells = [[task, *(_cell(scores[model].get(task)) for model in models)] for task in shared]
    for title, tasks in _averages(shared):
        means = [_mean_of_medians(scores[model], tasks) for model in models]
        shares = [f" ({100 * mean / means[0]:.1f} %)" if means[0] > 0 else "" for mean in means]
        cells.append([title, *(f"{mean:.1f}{share}" for mean, share in zip(means, shares, strict=True))])
    cells += [
        [task, *(_cell(scores[model].get(task)) for model in models)]
        for task in others
        if any(task in known for known in scores.values())
    ]
    n_seeds = max((len(values) for known in scores.values() for values in known.values()), default=0)
    seeds = "One seed" if n_seeds == 1 else f"Median of up to {n_seeds} seeds, with the lowest and highest"
    return f"{markdown_table(['task', *models], cells)}\n\n{seeds}; in brackets, % of {models[0]}'s."


def kept(records: list[dict], teacher: str, student: str) -> float | None:
    """The student's macro score in % of the teacher's, over the tasks that both have scores of; None if it is 0."""
    theirs, own = by_task(records, teacher), by_task(records, student)
    shared = [task for task in TASKS if task in theirs and task in own]
    if not shared:
        return None
    of_teacher = _mean_of_medians(theirs, shared)
    return 100 * _mean_of_medians(own, shared) / of_teacher if of_teacher > 0 else None


def _mean_of_medians(scores: dict[str, list[float]], tasks: list[str]) -> float:
    return statistics.mean(statistics.median(scores[task]) for task in tasks)


def _averages(shared: list[str]) -> list[tuple[str, list[str]]]:
    """Which tasks are averaged, and under which title."""
    apart = [task for task in shared if task in APART]
    rest = [task for task in shared if task not in APART]
    averages = [(f"macro over {len(shared)}", shared)] if len(shared) > 1 else []
    if apart and len(rest) > 1:
        averages += [(f"macro without {' and '.join(apart)}", rest)]
    return averages


def _cell(values: list[float] | None) -> str:
    if not values:
        return "-"
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.1f}, {max(values):.1f}]"
