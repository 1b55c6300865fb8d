"""Small files in the layouts of GLUE's tasks, on which a model can learn something."""

from pathlib import Path

import numpy as np
from workspace import OBJECTS, SUBJECTS, VERBS

from evaluation.glue import TASKS


def sentences(n: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(map(str, map(generator.choice, (SUBJECTS, VERBS, OBJECTS)))) for _ in range(n)]


def told(text: str) -> bool:
    """Whether the label is the second one; true of half of the texts."""
    return any(verb in text for verb in VERBS[:4])


def write_task(folder: Path, name: str, n_train: int = 64, n_dev: int = 24) -> None:
    """Files of one task in `folder`, whose labels are told by a word of the first text."""
    task = TASKS[name]
    (folder / name).mkdir(parents=True)
    for seed, (split, n) in enumerate({"train": n_train, **dict.fromkeys(task.dev_files, n_dev)}.items()):
        texts, others = sentences(n, seed), sentences(n, seed + 100)
        kinds = [told(text) for text in texts]
        labels = [("0.5", "4.25")[k] if task.is_regression else task.labels[k] for k in kinds]
        if name == "CoLA":
            lines = [f"gj04\t{label}\t\t{text}" for text, label in zip(texts, labels, strict=True)]
        else:
            columns = [*task.texts, task.label]
            rows = zip(texts, others, labels, strict=True)
            rows = [(str(i), *(row if len(task.texts) == 2 else row[::2])) for i, row in enumerate(rows)]
            lines = ["\t".join(row) for row in [("index", *columns), *rows]]
        (folder / name / f"{split}.tsv").write_text("".join(f"{line}\n" for line in lines))


def write_imdb(folder: Path) -> None:
    for seed, split in enumerate(("train", "test")):
        for label in ("neg", "pos"):
            (folder / "IMDb" / split / label).mkdir(parents=True)
            for i, text in enumerate(sentences(6, seed)):
                (folder / "IMDb" / split / label / f"{i}.txt").write_text(f"{text} {label}")
