"""Draws the losses of one or several runs over the tokens they were trained on.

python scripts/plot_losses.py --runs serialization_dir/my_first_training --output losses.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from training.run_folder import METRICS, read_metrics
from utils import InputError, logger, path

# What is drawn, each if a run has it: (kind of row, name in metrics.jsonl, title).
PANELS = (
    ("train", "loss_ce", "training: KL to the teacher (nats)"),
    ("train", "loss_mlm", "training: masked words (nats)"),
    ("train", "loss_clm", "training: next words (nats)"),
    ("train", "loss_mse", "training: squared error of logits"),
    ("train", "loss_cos", "training: 1 - cosine of hidden states"),
    ("valid", "mlm_loss", "held-out: MLM loss (nats)"),
    ("valid", "clm_loss", "held-out: CLM loss (nats)"),
    ("valid", "kl", "held-out: KL to the teacher (nats)"),
    ("valid", "agreement", "held-out: top-1 as the teacher"),
    ("valid", "training_masks_mlm_loss", "held-out, masked as in training: MLM loss (nats)"),
    ("valid", "training_masks_kl", "held-out, masked as in training: KL (nats)"),
    ("valid", "training_masks_agreement", "held-out, masked as in training: top-1 as the teacher"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--runs", type=path, nargs="+", required=True, help="dump_paths of train.py")
    parser.add_argument("--output", type=path, default="losses.png", help="PNG, PDF or SVG to write (%(default)s)")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    utils.check_picture(args.output, "--output")
    runs = {Path(run).name: read_metrics(Path(run) / METRICS) for run in args.runs}
    if len(runs) < len(args.runs):
        raise InputError("--runs: two of these folders have the same name.")
    panels = [panel for panel in PANELS if any(_points(rows, *panel[:2])[0] for rows in runs.values())]
    if not panels:
        raise InputError(f"--runs: no losses are noted yet in {', '.join(args.runs)}.")

    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(n_rows, columns, figsize=(4.4 * columns, 3.2 * n_rows), squeeze=False)
    for axis, (kind, name, title) in zip(axes.flat, panels, strict=False):
        for i, (run, rows) in enumerate(runs.items()):
            tokens, values = _points(rows, kind, name)
            if tokens:
                axis.plot(tokens, values, label=run, color=f"C{i}", marker="." if kind == "valid" else None)
        if name in ("mlm_loss", "clm_loss"):
            tokens, values = _points(next(iter(runs.values())), "valid", "teacher_loss")
            if tokens:
                axis.axhline(values[-1], color="gray", linestyle="--", label="teacher")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)
    logger.info("%s: %d plots", args.output, len(panels))


def _points(rows: list[dict], kind: str, name: str) -> tuple[list[float], list[float]]:
    chosen = [row for row in rows if row["kind"] == kind and name in row]
    return [row["tokens"] / 1e6 for row in chosen], [row[name] for row in chosen]


if __name__ == "__main__":
    raise SystemExit(main())
