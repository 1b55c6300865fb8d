"""Trains students without one part of the method each, to measure what each part is worth (the paper's Table 4). Two
more rows try relations between tokens and the other way to choose masks.

After `--` come the flags of train.py for the full method; every student is trained with them and one change:

    python scripts/ablation.py --output_dir serialization_dir/ablation --data_dir glue --tasks CoLA RTE -- \\
        --data_file data/binarized_text.bert-base-uncased.pickle --from_pretrained_weights serialization_dir/init.pth \\
        --token_counts data/token_counts.bert-base-uncased.pickle --n_epoch 1

Each student is a run of train.py in a folder of --output_dir, named after what is changed. Interrupted runs continue,
finished ones are not repeated, and --rows selects some. Tasks are scored by scripts/run_glue.py, and the table goes to
`ablation.md`.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_glue

import train
import utils
from evaluation import scores
from evaluation.glue import TASKS, read_task
from files.atomic import atomic_write
from files.paths import check_output_folder
from training import flags
from training.metrics_files import METRICS, read_metrics
from training.recipe import Recipe
from utils import InputError, integer, logger, path, real

WEIGHTS = ("--from_pretrained_weights", "--student_pretrained_weights")
OF_RELATIONS = ("--relation_layer", "--relation_heads")  # which have no effect without --alpha_relation
GIVEN_BY_US = ("--dump_path", "--force", "--resume", "--dry_run")


@dataclass(frozen=True)
class Row:
    """A student of the table.

    Attributes:
        title: what is changed.
        change: flags of train.py.
        paper: what the change cost DistilBERT in points of GLUE (Sanh et al., 2019, table 4).
        left_out: flags of train.py that the full method has and this student does not.
    """

    title: str
    change: tuple[str, ...] = ()
    paper: float | None = None
    left_out: tuple[str, ...] = ()


ROWS = {
    "all": Row("all parts"),
    "no_teacher": Row(
        "no teacher at all",
        tuple(f"--alpha_{term}=0" for term in ("ce", "cos", "mse", "relation")),
        left_out=OF_RELATIONS,
    ),
    "random_init": Row("random weights at the start", paper=-3.69, left_out=WEIGHTS),
    "no_ce": Row("no KL to the teacher", ("--alpha_ce", "0"), -2.96),
    "no_cos": Row("no cosine of hidden states", ("--alpha_cos", "0"), -1.46),
    "no_mlm": Row("no masked words", ("--alpha_mlm", "0"), -0.31),
    "relation": Row("relations between tokens too", ("--alpha_relation", "1")),
    "smoothing": Row("rare words masked more often, or not"),  # the flag depends on the full method's
}


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=path, required=True, help="folder for the students, their scores, and the table")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="students to train (default: all)")
    add("--data_dir", type=path, help="folder with a folder for each task (default: the hub)")
    add(
        "--tasks", nargs="+", choices=[*TASKS, run_glue.NONE], default=["CoLA", "SST-2", "STS-B", "RTE"],
        help="tasks to score the students on (CoLA SST-2 STS-B RTE)",
    )  # fmt: skip
    add("--seeds", type=integer(0, 2**31 - 1), nargs="+", default=[1, 2, 3], help="seeds of the fine-tuning (1 2 3)")
    add("--max_train_examples", type=integer(1, 1 << 40), help="fine-tune on the first examples only")
    add(
        "--task_learning_rate",
        type=real(0, 1, low_allowed=False),
        default=run_glue.Settings.learning_rate,
        help="peak learning rate of the fine-tuning (%(default)s)",
    )
    add("training", nargs="+", metavar="-- FLAGS", help="flags of train.py, after --")
    return parser


def without(training: list[str], names: tuple[str, ...]) -> list[str]:
    """The flags without these and their values."""
    kept, skipping = [], False
    for part in training:
        if part.startswith("--"):
            skipping = part.split("=")[0] in names
        if not skipping:
            kept.append(part)
    return kept


def flags_of(row: str, training: list[str], base: argparse.Namespace) -> list[str]:
    """The flags of train.py for a row. Raises: InputError if it would be the full method again."""
    if row == "smoothing":
        return [*training, "--mlm_smoothing", "0" if base.mlm_smoothing else str(Recipe.mlm_smoothing)]
    if row == "random_init" and not base.student_pretrained_weights:
        raise InputError(f"--rows {row}: the flags of train.py name no --from_pretrained_weights to leave out.")
    return [*without(training, ROWS[row].left_out), *ROWS[row].change]


# ---------------------------------------------------------------------------------------------------------------- table


def held_out(run: Path) -> dict[str, float]:
    """The metrics of a run's last evaluation."""
    rows = [row for row in read_metrics(run / METRICS) if row["kind"] == "valid"]
    return rows[-1] if rows else {}


def table(folder: Path, rows: list[str], teacher: str, known: list[dict]) -> str:
    """Markdown: a row a student, and first the teacher's."""
    figures = {row: held_out(folder / row) for row in rows}
    scored = {name: scores.by_task(known, name) for name in [Path(teacher).name, *rows]}
    tasks = [task for task in TASKS if all(task in known_tasks for known_tasks in scored.values())]
    header = ["student", "held-out loss", "KL", "as teacher", *tasks]
    if tasks:
        header += ["mean", "change", "paper's"]
    medians = {name: [statistics.median(by_task[task]) for task in tasks] for name, by_task in scored.items()}
    first = figures[rows[0]]
    cells = [["the teacher", _number(first, "teacher_loss"), "0", "100.0 %", *_scores(medians[Path(teacher).name])]]
    full = medians.get("all")
    for row in rows:
        found = figures[row]
        agreement = f"{100 * found['agreement']:.1f} %" if "agreement" in found else "-"
        line = [ROWS[row].title, _number(found, "mlm_loss"), _number(found, "kl"), agreement, *_scores(medians[row])]
        if tasks:
            change = statistics.mean(medians[row]) - statistics.mean(full) if full else None
            line += ["-" if change is None or row == "all" else f"{change:+.2f}"]
            line += ["-" if ROWS[row].paper is None else f"{ROWS[row].paper:+.2f}"]
        cells.append(line)
    cells[0] += ["-", "-"] if tasks else []
    return utils.markdown_table(header, cells)


def _number(figures: dict, name: str) -> str:
    return f"{figures[name]:.3f}" if name in figures else "-"


def _scores(medians: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in medians] + ([f"{statistics.mean(medians):.2f}"] if medians else [])


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> int:
    check_output_folder(args.output_dir, "--output_dir")
    folder = Path(args.output_dir)
    if ours := {part.split("=")[0] for part in args.training} & set(GIVEN_BY_US):
        raise InputError(f"leave out {min(ours)}: each student's folder is in --output_dir, and is continued.")
    base = flags.make_parser(train.__doc__).parse_args([*args.training, "--dump_path", str(folder)])
    teacher = base.teacher_name or flags.DEFAULT_TEACHER
    rows = [row for row in ROWS if row in args.rows]
    commands = {row: flags_of(row, args.training, base) for row in rows}
    models = [teacher, *(str(folder / row) for row in rows)]
    utils.distinct_names(models, f"--rows and the teacher {teacher}")
    tasks = [TASKS[name] for name in args.tasks if name != run_glue.NONE]
    for task in tasks:
        read_task(task, args.data_dir)  # before hours of training, so that problems with them show now
    for row, command in commands.items():
        logger.info("%s: %s", row, ROWS[row].title)
        flags_of_run = [*command, "--teacher_name", teacher, "--dump_path", str(folder / row), "--resume"]
        status = train.main(flags_of_run)
        if status:
            if status != utils.EXIT_BAD_INPUT:
                logger.info("%s is not finished; the same command continues there", row)
            return status
    output = folder / "glue.jsonl"
    if tasks:
        more = ["--data_dir", args.data_dir] if args.data_dir else []
        more += ["--max_train_examples", str(args.max_train_examples)] if args.max_train_examples else []
        more += ["--n_gpu", "0"] if base.n_gpu == 0 else []
        status = run_glue.main(
            ["--models", *models, "--tasks", *args.tasks, "--seeds", *map(str, args.seeds), "--output", str(output),
             "--learning_rate", str(args.task_learning_rate), *more]
        )  # fmt: skip
        if status:
            return status
    text = table(folder, rows, teacher, scores.read(str(output)))
    print(text)
    with atomic_write(folder / "ablation.md", "w") as out:
        out.write(text + "\n")
    return utils.EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
