"""Writes one page that compares a student with its teacher: a single HTML file that needs nothing else, and no network.

    python scripts/report.py --runs serialization_dir/my_first_training --output report.html

It shows size, speed, held-out loss and agreement, measured anew and side by side, also by frequency of the words, by
length and by layer; the losses of training; the first guesses of all for some sentences; and the exact commands and
versions. What else has been measured is added: scores of tasks (--scores, of scripts/run_glue.py) and tables in
Markdown (--tables, such as those that scripts/benchmark_inference.py and scripts/ablation.py leave).

Teacher and held-out text are those of the first run, unless named.
"""

import argparse
import glob
import html
import io
import re
import sys
from pathlib import Path
from string import Template

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare_models
import fill_mask
import plot_losses

import utils
from corpus.files import open_corpus
from corpus.token_counts import count_tokens, load_token_counts
from corpus.tokenization import load_tokenizer
from evaluation import breakdown, scores
from files.atomic import atomic_write
from files.paths import check_input_file, check_output_file
from training.distributed import add_precision_flags, choose_dtype, describe_device, single_process
from training.run_folder import load_parameters
from utils import InputError, integer, logger, path, words

SENTENCES = (
    "The capital of France is [MASK].",
    "She opened the door and saw a [MASK].",
    "The river [MASK] into the sea.",
    "He was born in London and studied at the University of [MASK].",
    "The film was so boring that I nearly fell [MASK].",
    "Water boils at one hundred [MASK].",
)
TOP = 3
THEMED = "#010203"  # what is drawn in this color takes that of the page's text

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1c2024; --soft: #60646c; --line: #d9dce1; --back: #fcfcfd; --card: #f1f3f5;
  --strong: #1565c0; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ec; --soft: #a3a8b0; --line: #3a3f47; --back: #14171a;
  --card: #1e2227; --strong: #7db8f5; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 66rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.5rem; color: var(--strong); }
.card span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.guesses td, .guesses th { text-align: left; } .guesses td:first-child { white-space: normal; min-width: 14rem; }
.bar { display: inline-block; height: .55rem; background: var(--strong); opacity: .55; border-radius: 2px;
  margin-right: .4rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .5rem; }
svg { width: 100%; height: auto; }
pre { background: var(--card); padding: .8rem; border-radius: .5rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; }
</style>
</head>
<body>
$body
</body>
</html>
""")


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--runs", type=path, nargs="+", required=True, help="folders of runs (dump_path), the student's first")
    add("--teacher", type=path, help="teacher: hub name or folder (default: the first run's)")
    add("--valid_data_file", type=path, nargs="+", help="binarized held-out text (default: the first run's)")
    add("--scores", type=path, help="scores that scripts/run_glue.py has written")
    add("--tables", type=path, nargs="+", default=[], help="Markdown files to add")
    add("--text", type=words, nargs="+", default=list(SENTENCES), help="sentences with one [MASK] each")
    add(
        "--breakdown",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add tables of loss and agreement by frequency, length, and layer (default: on)",
    )
    add("--turns", type=integer(1, 1000), default=3, help="timings of each model; the median counts (%(default)s)")
    add_precision_flags(parser)
    add("--n_gpu", type=integer(0, 1 << 20), help="0 for the CPU (default: what there is)")
    add("--output", type=path, default="report.html", help="file to write (%(default)s)")
    return parser


# ----------------------------------------------------------------------------------------------------------- HTML parts


def table_of(markdown: str) -> str:
    """An HTML table of a Markdown one; the lines between tables become paragraphs."""
    parts = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            rows = [[html.escape(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines]
            head, *body = rows[:1] + rows[2:]
            cells = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
            cells += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
            parts.append(f'<div class="wide"><table>{"".join(cells)}</table></div>')
        elif lines[0].startswith("#"):
            parts.append(f"<h3>{html.escape(lines[0].lstrip('# '))}</h3>")
        else:
            parts.append(f'<p class="soft">{html.escape(" ".join(lines))}</p>')
    return "\n".join(parts)


def cards_of(figures: dict[str, str]) -> str:
    cards = [
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'
        for what, value in figures.items()
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def pictures_of(runs: dict[str, list[dict]]) -> str:
    """The losses, a picture each, whose text and axes have the page's color, light or dark."""
    import matplotlib
    from matplotlib.figure import Figure

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    names_of_backs = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "legend.edgecolor", "savefig.facecolor")
    pictures = []
    with matplotlib.rc_context(
        dict.fromkeys(names, THEMED) | dict.fromkeys(names_of_backs, "none") | {"svg.fonttype": "none"}
    ):
        for panel in plot_losses.panels_of(runs):
            figure = Figure(figsize=(4.4, 3.2), layout="tight")
            plot_losses.draw(figure.subplots(), runs, *panel)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            svg = file.getvalue()
            pictures.append(svg[svg.index("<svg") :].replace(THEMED, "currentColor"))
    return f'<div class="pictures">{"".join(pictures)}</div>'


def guesses_of(models: list[str], tokenizer_name: str, texts: list[str]) -> str:
    """A table: one line per sentence, one column per model."""
    rows = []
    for text in texts:
        cells = []
        for name in models:
            guesses = fill_mask.guesses(name, tokenizer_name, text, TOP)
            lines = (
                f'<span class="bar" style="width:{4 * p:.2f}rem"></span>{html.escape(word)} '
                f'<span class="soft">{p:.0%}</span>'
                for word, p in guesses
            )
            cells.append(f"<td>{'<br>'.join(lines)}</td>")
        rows.append(f"<tr><td>{html.escape(text)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(Path(name).name)}</th>" for name in models)
    return f'<div class="wide"><table class="guesses"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


# ------------------------------------------------------------------------------------------------------------- the page


def summary(teacher: dict, student: dict, kept: float | None) -> dict[str, str]:
    """The figures of the cards: what each is -> its value."""
    figures = {
        "of the teacher's parameters": f"{100 * student['parameters'] / teacher['parameters']:.0f} %",
        "as fast as the teacher": f"{student['speed'] / teacher['speed']:.2f}x",
    }
    if "labels" in student:
        loss = student["labels"]["loss"].mean() - teacher["labels"]["loss"].mean()
        figures["first guesses as the teacher's"] = f"{100 * student['labels']['agreement'].mean():.1f} %"
        figures["held-out loss above the teacher's"] = f"{loss:+.3f} nats"
    elif student["cosine"] is not None:
        figures["cosine of hidden states with the teacher's"] = f"{student['cosine']:.3f}"
    return figures | ({} if kept is None else {"of the teacher's mean score on tasks": f"{kept:.1f} %"})


def counts_of(run: str, parameters: dict) -> np.ndarray:
    """(voc_size,) how often each token occurs in the text of a run."""
    tokenizer = load_tokenizer(run)
    if parameters["token_counts"] and Path(parameters["token_counts"]).is_file():
        return load_token_counts(parameters["token_counts"], len(tokenizer))
    return count_tokens(open_corpus(parameters["data_file"], tokenizer), len(tokenizer))


def make_page(args: argparse.Namespace, runs: dict, parameters: dict, known: list[dict], tables: dict) -> str:
    """Measures, draws and writes down.

    Args:
        args: the flags.
        runs, parameters: name of a run -> its metrics, its flags; teacher and text are the first one's, unless named.
        known: scores of tasks.
        tables: titles -> Markdown.
    """
    world = single_process(args.n_gpu)
    first = next(iter(parameters.values()))
    names = [args.teacher or first["teacher_name"], *args.runs]
    tokenizer = args.runs[0]  # lies in its folder, wherever that is now
    files, share = args.valid_data_file or first["valid_data_file"], None
    if files is None:
        files, share = first["data_file"], first["valid_share"]
    dtype = choose_dtype(args, world.device)
    results = compare_models.measure(names, tokenizer, files, share, args.turns, world, dtype, layers=args.breakdown)
    on_words = "labels" in results[0]
    title = f"{results[1]['name']}, a student of {results[0]['name']}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">Measured on {html.escape(describe_device(world.device))}.</p>',
        cards_of(summary(results[0], results[1], scores.kept(known, results[0]["name"], results[1]["name"]))),
        "<h2>Size, speed and held-out text</h2>",
        table_of(compare_models.report(results)),
    ]
    if scored := [result["name"] for result in results if any(score["model"] == result["name"] for score in known)]:
        body += ["<h2>Tasks</h2>", table_of(scores.table(known, scored))]
    body += ["<h2>Losses</h2>", pictures_of(runs)]
    if on_words and args.breakdown:
        body += [
            "<h2>Where the students fail</h2>",
            table_of(breakdown.tables(results, counts_of(args.runs[0], first))),
        ]
    if on_words:
        body += ["<h2>First guesses</h2>", guesses_of(names, tokenizer, args.text)]
    for name, table in tables.items():
        body += [f"<h2>{html.escape(name)}</h2>", table_of(table)]
    body += ["<h2>Commands</h2>"]
    for name, flags in parameters.items():
        body += [f'<p class="soft">{html.escape(name)}</p><pre>{html.escape(flags["command"])}</pre>']
    versions = ", ".join(f"{package} {version}" for package, version in scores.versions().items())
    body += [f'<p class="soft">With {html.escape(versions)}.</p>']
    return PAGE.substitute(title=html.escape(title), body="\n".join(body))


def read_table(name: str) -> str:
    check_input_file(name, "--tables")
    try:
        text = Path(name).read_text()
    except (ValueError, OSError, MemoryError) as error:
        raise InputError(f"--tables {name} is not text ({utils.reason_of(error)}).") from None
    if not text.strip():
        raise InputError(f"--tables {name} is empty; leave it out.")
    return text


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_output_file(args.output, "--output")
    tables = {Path(name).stem: read_table(name) for name in args.tables}
    if args.scores:
        check_input_file(args.scores, "--scores")
    known = scores.read(args.scores) if args.scores else []
    runs = plot_losses.read_runs(args.runs)
    plot_losses.panels_of(runs)  # raises if there is none
    parameters = {Path(run).name: load_parameters(run) for run in args.runs}
    first = next(iter(parameters.values()))
    if not (args.teacher or first["teacher_name"]):
        raise InputError(f"{args.runs[0]} had no teacher: name one with --teacher to compare it with.")
    if not (args.valid_data_file or first["valid_data_file"] or first["valid_share"]):
        raise InputError(f"{args.runs[0]} held no text out: name some with --valid_data_file.")
    counted = filter(None, (first["token_counts"], *first["data_file"]))
    if args.breakdown and not any(Path(name).exists() or glob.glob(name) for name in counted):
        raise InputError(f"{args.runs[0]} learned from a text that is not here, {first['data_file'][0]}, so its words "
                         f"can't be counted: call this where it was trained, or with --no-breakdown.")  # fmt: skip
    page = make_page(args, runs, parameters, known, tables)
    with atomic_write(args.output, "w") as out:
        out.write(page)
    logger.info("%s: open it in a browser", args.output)


if __name__ == "__main__":
    raise SystemExit(main())
