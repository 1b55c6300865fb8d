"""Where a model fails: its held-out figures by how frequent a word is, by the length of its sequence, and by layer.

Dimensions: n masked (or next) words, the same for every model; voc_size.
"""

import itertools

import numpy as np
import torch

from evaluation import held_out
from models.language_model import LanguageModel
from models.student import with_layers
from training.batches import MicroBatches
from training.distributed import World
from utils import markdown_table

RANKS = (10, 100, 1_000, 10_000)  # of words by frequency: where groups end
LENGTHS = (32, 64, 128, 256)  # of sequences in tokens


def groups_by_frequency(labels: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Words by the rank of their frequency: name of a group -> (n,) bool, for each group that has some.

    Args:
        labels: (n,) ids.
        counts: (voc_size,) how often each id occurs in the training text.
    """
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return _groups(ranks[labels], RANKS, "the {} most frequent tokens", "{} to {}", "rarer")


def groups_by_length(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Words by the length of their sequence, (n,) in tokens; as `groups_by_frequency`."""
    return _groups(lengths, LENGTHS, "up to {} tokens", "{} to {}", "longer")


def _groups(values: np.ndarray, ends: tuple[int, ...], first: str, others: str, last: str) -> dict[str, np.ndarray]:
    names = [first.format(f"{ends[0]:,}")]
    names += [others.format(f"{low + 1:,}", f"{high:,}") for low, high in itertools.pairwise(ends)]
    group = np.searchsorted(ends, values)  # the number of the first end that is not below the value
    masks = {name: group == i for i, name in enumerate([*names, last])}
    return {name: mask for name, mask in masks.items() if mask.any()}


def by_layer(
    model: LanguageModel, teacher: LanguageModel, text: MicroBatches, world: World, dtype: torch.dtype
) -> list[dict[str, float]]:
    """The metrics of `held_out.evaluate` if the model ended after its first layer, its second, and so on.

    Args:
        teacher: read once for each layer, so preferably a `held_out.Remembered`.
    """
    own_family = model.model.config.model_type
    found = []
    for depth in range(1, model.depth + 1):
        cut = LanguageModel(with_layers(model.model, list(range(depth)), own_family)).to(world.device)
        found.append(held_out.evaluate(cut, teacher, text, world, dtype))
    return found


def tables(results: list[dict], counts: np.ndarray) -> str:
    """Loss and agreement of students by frequency, by length and by layer, in Markdown.

    Args:
        results: the teacher's and the students', each with its `name` and `labels`, as from `held_out.evaluate_labels`;
            a student's also with what `by_layer` returns.
        counts: (voc_size,) how often each id occurs in the training text.
    """
    teacher, *students = (result["labels"] for result in results)
    of_each = [f"{result['name']}: {what}" for result in results[1:] for what in ("loss", "as teacher")]
    parts = []
    for title, groups in (
        ("word", groups_by_frequency(teacher["label"], counts)),
        ("length of the sequence", groups_by_length(teacher["length"])),
    ):
        cells = []
        for name, mask in groups.items():
            cells.append([name, f"{mask.sum():,}", f"{teacher['loss'][mask].mean():.3f}"])
            for student in students:
                cells[-1] += _figures(student["loss"][mask].mean(), student["agreement"][mask].mean())
        parts.append(markdown_table([title, "words", f"{results[0]['name']}: loss", *of_each], cells))
    depths = [len(result["by_layer"]) for result in results[1:]]
    cells = []
    for layer in range(max(depths)):
        cells.append([str(layer + 1)])
        for result, depth in zip(results[1:], depths, strict=True):
            metrics = result["by_layer"][layer] if layer < depth else None
            cells[-1] += _figures(loss_of(metrics), metrics["agreement"]) if metrics else ["", ""]
    parts.append(markdown_table(["if it ended after layer", *of_each], cells))
    return "\n\n".join(parts)


def _figures(loss: float, agreement: float) -> list[str]:
    return [f"{loss:.3f}", f"{100 * agreement:.1f} %"]


def loss_of(metrics: dict[str, float]) -> float:
    return next(metrics[name] for name in held_out.LOSS.values() if name in metrics)
