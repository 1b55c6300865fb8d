"""The model card of a model that has been fine-tuned on a task."""

from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from evaluation.glue import Task
from training.model_card import on_the_hub, render, size_of
from utils import logger, markdown_table

CARD = "README.md"
PIPELINES = {"SequenceClassification": "text-classification", "QuestionAnswering": "question-answering"}
METRICS = {"matthews": "matthews_correlation", "spearman": "spearmanr", "macro_f1": "f1"}  # ours -> the hub's


class Data(NamedTuple):
    """What a model was scored on: what it is called, and where the hub has it, if it does."""

    title: str
    hub: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def of(cls, task: Task) -> "Data":
        """The development set of a task; the first, if there are several."""
        return cls(task.name, task.hub[0] or None, task.hub[1], task.hub_dev[0])


def make_task_card(
    name: str, model: PreTrainedModel, origin: str, teacher: str | None, data: Data, metrics: dict[str, float],
    command: str, results: str | None = None,
) -> ModelCard:  # fmt: skip
    """A card with the metrics. Languages, license, data sets and base model are those of the card that `origin` has.

    Args:
        name: of the model.
        origin: what was fine-tuned, hub name or folder.
        teacher: what helped.
        metrics: in percent, by name.
        results: a table of them; None: one is made.
    """
    known = _card_data(origin)
    task = next(task for head, task in PIPELINES.items() if type(model).__name__.endswith(head))
    datasets = [*([known.datasets] if isinstance(known.datasets, str) else known.datasets or []), data.hub]
    card_data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=task,
        base_model=on_the_hub(origin) or known.base_model,
        language=known.language,
        license=known.license,
        datasets=list(dict.fromkeys(filter(None, datasets))) or None,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=data.hub or data.title,
                dataset_name=data.title,
                dataset_config=data.config,
                dataset_split=data.split,
                metric_type=METRICS.get(metric, metric),
                metric_name=metric.replace("_", " "),
                metric_value=round(value, 2),
            )
            for metric, value in metrics.items()
        ],
    )
    helped = f", with the help of `{Path(teacher).name}`" if teacher else ""
    description = f"{size_of(model)}\n`{Path(origin).name}` fine-tuned on {data.title}{helped}."
    rows = [[metric.replace("_", " "), f"{value:.2f}"] for metric, value in metrics.items()]
    return render(card_data, description, results or markdown_table(["", data.title], rows), command)


def _card_data(origin: str) -> ModelCardData:
    """The metadata of the card in a local folder; empty if it has none."""
    file = Path(origin) / CARD
    try:
        if file.is_file():
            return ModelCard.load(file, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s is left aside, since its metadata can't be read (%s)", file, error)
    return ModelCardData()
