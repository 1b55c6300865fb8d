"""Draws the losses of one or several runs over the tokens they were trained on.

python scripts/plot_losses.py --runs serialization_dir/my_first_training --output losses.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from files.paths import check_picture
from training.metrics_files import METRICS, read_metrics
from utils import InputError, logger, path

MEMORY = "peak_memory_gib"
# What is drawn, each if a run has it: (kind of record, name in metrics.jsonl, title).
PANELS = (
    ("train", "loss_ce", "training: KL to the teacher (nats)"),
    ("train", "loss_mlm", "training: masked words (nats)"),
    ("train", "loss_clm", "training: next words (nats)"),
    ("train", "loss_mse", "training: squared error of logits"),
    ("train", "loss_cos", "training: 1 - cosine of hidden states"),
    ("valid", "mlm_loss", "held-out: MLM loss (nats)"),
    ("valid", "clm_loss", "held-out: CLM loss (nats)"),
    ("valid", "hidden_loss", "held-out: loss of hidden states"),
    ("valid", "kl", "held-out: KL to the teacher (nats)"),
    ("valid", "agreement", "held-out: top-1 as the teacher"),
    ("valid", "training_masks_mlm_loss", "held-out, training's masks: MLM loss (nats)"),
    ("valid", "training_masks_kl", "held-out, training's masks: KL (nats)"),
    ("valid", "training_masks_agreement", "held-out, training's masks: top-1 as the teacher"),
    ("train", MEMORY, "peak memory so far (GiB)"),
)
TEACHERS = {  # what to draw of the teacher beside the student's
    "mlm_loss": "teacher_loss",
    "clm_loss": "teacher_loss",
    "training_masks_mlm_loss": "training_masks_teacher_loss",
}


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--runs", type=path, nargs="+", required=True, help="folders of runs (--dump_path of train.py)")
    parser.add_argument("--output", type=path, default="losses.png", help="PNG, PDF, or SVG to write (%(default)s)")
    return parser


def panels_of(runs: dict[str, list[dict]]) -> list[tuple[str, str, str]]:
    """Those of PANELS that any run has. Raises: InputError if there is none.

    Args:
        runs: name -> the records of its metrics.jsonl.
    """
    panels = [panel for panel in PANELS if any(_points(records, *panel[:2])[0] for records in runs.values())]
    if not panels:
        raise InputError(f"--runs: no losses are noted yet in {', '.join(runs)}.")
    return panels


def draw(axis, runs: dict[str, list[dict]], kind: str, name: str, title: str) -> None:
    """Draws one panel on axes of matplotlib."""
    for i, (run, records) in enumerate(runs.items()):
        tokens, values = _points(records, kind, name)
        if tokens:
            axis.plot(tokens, values, label=as_text(run), color=f"C{i}", marker="." if kind == "valid" else None)
    if name in TEACHERS:
        tokens, values = _points(next(iter(runs.values())), "valid", TEACHERS[name])
        if tokens:
            axis.axhline(values[-1], color="gray", linestyle="--", label="teacher")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("million tokens")
    axis.grid(alpha=0.3)
    if name == MEMORY:
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
    axis.legend(fontsize=8)


def as_text(name: str) -> str:
    """For matplotlib, which would take dollars for formulas and leave out what begins with an underscore."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def read_runs(folders: list[str]) -> dict[str, list[dict]]:
    """Name -> records of each run. Raises: InputError if two have one name."""
    names = utils.distinct_names(folders, "--runs")
    return {name: read_metrics(Path(folder) / METRICS) for name, folder in zip(names, folders, strict=True)}


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_picture(args.output, "--output")
    runs = read_runs(args.runs)
    panels = panels_of(runs)

    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(n_rows, columns, figsize=(4.4 * columns, 3.2 * n_rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw(axis, runs, *panel)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)
    logger.info("%s: %d plots", args.output, len(panels))


def _points(records: list[dict], kind: str, name: str) -> tuple[list[float], list[float]]:
    chosen = [record for record in records if record["kind"] == kind and name in record]
    return [record["tokens"] / 1e6 for record in chosen], [record[name] for record in chosen]


if __name__ == "__main__":
    raise SystemExit(main())
