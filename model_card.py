"""The README.md of a trained model: what it is, what it reached, how it was made."""

import statistics
from pathlib import Path

from transformers import PreTrainedModel


def render(name: str, model: PreTrainedModel, parameters: dict, metrics: list[dict]) -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        name: of the model.
        parameters: every flag of the run, and its `command`.
        metrics: the rows of metrics.jsonl so far.
    """
    distilled = any(parameters[f"alpha_{term}"] for term in ("ce", "mse", "cos"))
    teacher = parameters["teacher_name"] if distilled else None
    task = "text-generation" if parameters["alpha_clm"] else "fill-mask"
    n_parameters = sum(p.numel() for p in model.parameters())
    origin = f"distilled from `{teacher}`" if teacher else "trained by language modelling"
    metadata = ["library_name: transformers", f"pipeline_tag: {task}"]
    if teacher and not Path(teacher).exists():  # the hub takes no paths
        metadata.append(f"base_model: {teacher}")
    header = "\n".join(["---", *metadata, "---"])
    return f"""{header}

# {name}

A {model.config.model_type} of {model.config.num_hidden_layers} layers and {n_parameters / 1e6:.1f} M parameters,
{origin} on {_names(parameters["data_file"])}.

## Results

{_training(metrics)}

{_held_out(metrics)}

## Use

```python
from transformers import pipeline
pipeline("{task}", "{name}")
```

## How it was made

```
{parameters["command"]}
```

Every flag stands in `parameters.json`, the state of the code in `git_log.json`, all losses in `metrics.jsonl`.
"""


def _names(paths: list[str]) -> str:
    return ", ".join(f"`{Path(path).name}`" for path in paths)


def _training(metrics: list[dict]) -> str:
    rows = [row for row in metrics if row["kind"] == "train"]
    if not rows:
        return "Not trained yet."
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    tokens, updates = rows[-1]["tokens"], rows[-1]["update"]
    return f"Trained on {tokens / 1e6:,.1f} M tokens in {updates:,} updates, at {speed:,.0f} tokens/s (median)."


def _held_out(metrics: list[dict]) -> str:
    rows = [row for row in metrics if row["kind"] == "valid"]
    if not rows:
        return "Not evaluated on held-out text."
    first, last = rows[0], rows[-1]
    lines = [
        f"On held-out text with fixed masks, at updates {first['update']} and {last['update']}:",
        "",
        "| | before | now |",
        "|---|---|---|",
    ]
    for name in last:
        if name not in ("kind", "update", "tokens"):
            lines.append(f"| {name.replace('_', ' ')} | {first[name]:.4g} | {last[name]:.4g} |")
    return "\n".join(lines)
