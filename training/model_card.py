"""The README.md of a model: what it is, its results, how it was made, and first the metadata that the hub reads."""

import statistics
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from training.metrics_files import TRAINING_MASKS
from training.recipe import OF_TEACHER
from utils import markdown_table

# Held-out metrics that the hub shows: name in metrics.jsonl -> what it is called there.
SHOWN_METRICS = {
    "mlm_loss": "MLM loss",
    "clm_loss": "CLM loss",
    "kl": "KL to the teacher",
    "agreement": "top-1 as teacher",
}

TEMPLATE = """---
{metadata}
---

# {name}

{description}

## Results

{results}

## Use

```python
from transformers import pipeline
pipeline("{task}", "{name}")
```

## How it was made

```
{command}
```
{more}"""
OF_A_RUN = """
Every flag is in `parameters.json`, the state of the code in `git_log.json`, and all losses in `metrics.jsonl`.
"""


def render(data: ModelCardData, description: str, results: str, command: str, more: str = "") -> ModelCard:
    """A card of this metadata and text. `more` is said below the command."""
    return ModelCard(
        TEMPLATE.format(
            metadata=data.to_yaml().strip(),
            name=data.model_name,
            description=description,
            results=results,
            task=data.pipeline_tag,
            command=command,
            more=more,
        )
    )


def size_of(model: PreTrainedModel) -> str:
    """The family, depth and number of parameters, for a description."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"A {model.config.model_type} of {model.config.num_hidden_layers} layers and {millions:.1f} M parameters,"


def on_the_hub(name: str | None) -> str | None:
    """The name, if it is not a local path: the hub takes no paths."""
    return None if name is None or Path(name).exists() else name


def make_card(name: str, model: PreTrainedModel, parameters: dict, metrics: list[dict]) -> ModelCard:
    """A model card with the metadata that the hub reads.

    Args:
        name: of the model.
        parameters: every flag of the run, and its `command`.
        metrics: the records of metrics.jsonl so far.
    """
    distilled = any(parameters[f"alpha_{term}"] for term in OF_TEACHER)
    teacher = parameters["teacher_name"] if distilled else None
    on_words = any(parameters[f"alpha_{term}"] for term in ("ce", "mse", "mlm", "clm"))
    task = "feature-extraction" if not on_words else "text-generation" if parameters["alpha_clm"] else "fill-mask"
    texts = ", ".join(f"`{Path(path).name}`" for path in parameters["data_file"])
    origin = f"distilled from `{teacher}`" if teacher else "trained by language modeling"
    evaluations = [record for record in metrics if record["kind"] == "valid"]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=task,
        base_model=on_the_hub(teacher),
        language=parameters.get("language"),
        license=parameters.get("license"),
        datasets=parameters.get("datasets"),
        eval_results=_eval_results(task, Path(parameters["data_file"][0]).name, evaluations) or None,
    )
    trained = _training([record for record in metrics if record["kind"] == "train"])
    description = f"{size_of(model)}\n{origin} on {texts}."
    return render(data, description, f"{trained}\n\n{_held_out(evaluations)}", parameters["command"], OF_A_RUN)


def _eval_results(task: str, text: str, evaluations: list[dict]) -> list[EvalResult]:
    last = evaluations[-1] if evaluations else {}
    return [
        EvalResult(
            task_type=task,
            dataset_type=text,
            dataset_name="held-out text",
            metric_type=name,
            metric_name=SHOWN_METRICS[name],
            metric_value=round(value, 4),
        )
        for name, value in last.items()
        if name in SHOWN_METRICS
    ]


def _training(records: list[dict]) -> str:
    if not records:
        return "Not trained yet."
    speed = statistics.median(record["tokens_per_second"] for record in records)
    tokens, steps = records[-1]["tokens"], records[-1]["step"]
    return f"Trained on {tokens / 1e6:,.1f} M tokens in {steps:,} steps, at {speed:,.0f} tokens/s (median)."


def _held_out(evaluations: list[dict]) -> str:
    if not evaluations:
        return "Not evaluated on held-out text."
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in last if name not in ("kind", "step", "tokens")]
    rows = [[name.replace("_", " "), f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in names]
    table = markdown_table(["", f"step {first['step']}", f"step {last['step']}"], rows)
    how = ""
    if any(name.startswith(TRAINING_MASKS) for name in names):
        how = ', chosen evenly, and for "training masks" as in training'
    masks = ", not masked" if "hidden_loss" in last else f" with masks that never change{how}"
    return f"On held-out text{masks}:\n\n{table}"
