"""Which of a teacher's layers make the best start for a student, measured before any training.

Each list of layers is tried untrained: the student that `models.student.with_layers` makes of it predicts held-out
masked (or next) words beside its teacher, or, if that predicts no words, makes vectors of texts beside it. Besides the
usual lists, layers are taken away one by one, each time the one that is missed least (the greedy search of Peer et al.,
2022, arXiv 2105.14839).
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from evaluation import held_out
from models.language_model import LanguageModel
from models.sentence_encoder import Pooling
from models.student import spread_layers, with_layers
from training.batches import MicroBatches
from training.distributed import World
from training.objective import Objective
from training.recipe import Recipe

OF_VECTORS = Recipe(alpha_ce=0, alpha_mlm=0, alpha_cos=1, alpha_pooled=1)


def usual_lists(depth: int, n: int, types: list[str] | None = None) -> dict[str, list[int]]:
    """The usual choices of `n` of `depth` layers, by name; each list once.

    Args:
        types: of the layers, where they alternate.
    """
    low = -(-n // 2)
    lists = {
        "evenly spread": spread_layers(depth, n, types),
        "every second": list(range(depth))[::2][:n],
        "every second from 1": list(range(depth))[1::2][:n],
        "the lowest": list(range(n)),
        "the highest": list(range(depth - n, depth)),
        "the lowest and the highest": [*range(low), *range(depth - n + low, depth)],
        "the lowest and the last": [*range(n - 1), depth - 1],
    }
    once = {tuple(layers): name for name, layers in reversed(lists.items()) if len(layers) == n}
    return {name: lists[name] for name in lists if name in once.values()}


def one_by_one(depth: int, n: int, score: Callable[[list[int]], float]) -> list[int]:
    """The layers that remain after repeatedly removing the one whose removal hurts least, until `n` are left.

    Args:
        score: of a list of layers; the lower, the better.
    """
    layers = list(range(depth))
    while len(layers) > n:
        shorter = [layers[:i] + layers[i + 1 :] for i in range(len(layers))]
        layers = min(shorter, key=score)
    return layers


def n_trials(depth: int, n: int) -> int:
    """How many lists `one_by_one` scores."""
    return sum(range(n + 1, depth + 1))


class Trial:
    """Scores lists of a teacher's layers on held-out text.

    Args:
        teacher: frozen, float32, on the world's device.
        student_type: the student's family; None for the usual one.
        text: with the words to predict, if the teacher predicts words.
        pooling: how it makes vectors, if it does not.
        world: of one process.
        dtype: what to compute in.
        tried: called after each list.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student_type: str | None,
        text: MicroBatches,
        pooling: Pooling | None,
        world: World,
        dtype: torch.dtype,
        tried: Callable[[], None] = lambda: None,
    ) -> None:
        self.teacher, self.student_type, self.text = teacher, student_type, text
        self.world, self.dtype, self.tried = world, dtype, tried
        self.beside, self.of_vectors = held_out.Remembered(teacher, pooling), pooling is not None
        self.measure = "hidden_pooled" if self.of_vectors else "kl"  # the lower, the better

    def metrics(self, layers: list[int]) -> dict[str, float]:
        """The metrics of `held_out.evaluate`, or `evaluate_hidden`, for a student with these layers."""
        student = LanguageModel(with_layers(self.teacher, layers, self.student_type)).to(self.world.device)
        if self.of_vectors:
            objective = Objective(OF_VECTORS, student, self.beside, self.world.device, self.dtype)
            objective.find_center(list(self.text))
            metrics = held_out.evaluate_hidden(objective, self.text, self.world)
        else:
            metrics = held_out.evaluate(student, self.beside, self.text, self.world, self.dtype)
        self.tried()
        return metrics

    def score(self, layers: list[int]) -> float:
        return self.metrics(layers)[self.measure]
