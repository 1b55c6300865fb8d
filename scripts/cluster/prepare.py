"""Turns text of any size into binarized shards, on all cores of this machine or all nodes of a Slurm cluster.

    python scripts/cluster/prepare.py --source crawl --dump_file data/crawl --tokenizer_name bert-base-uncased \\
        --where 'language == en' 'language_score >= 0.65' --against glue/*/dev.tsv --drop_duplicates

The source is a folder of Parquet or JSON lines (`--glob '*.jsonl.gz'`), on a disk, in an object store
(`s3://bucket/crawl`, with `pip install s3fs`) or on the hub (`hf://datasets/HuggingFaceFW/fineweb/sample/10BT`). Every
task reads its share of the files and writes one shard, `data/crawl.bert-base-uncased-00000-of-00016.pickle`, with the
counts of its tokens beside it; train.py and scripts/token_counts.py take them as they are. The text is never written
out in between. Interrupted, the same command does the tasks that are left.

It is a pipeline of datatrove (`pip install 'datatrove[io]'`), whose logs and statistics go to --logs. With --slurm it
submits the tasks as a job array and ends; without, this machine does them all.
"""

import argparse
import functools
import glob
import os
import signal
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import utils
from corpus.files import expand_globs
from corpus.overlap import NGRAM, ngrams_of
from corpus.tokenization import load_tokenizer, tokenizer_short_name
from files.atomic import write_json
from files.json_reader import read_json
from files.paths import check_output_file
from utils import InputError, RunError, integer, logger, n_cores, path, reason_of

MOST_TASKS = 1000
BUCKETS = 14  # of MinHash, as datatrove and FineWeb have it


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--source", required=True, help="folder with the text: a path, or s3://..., hf://datasets/..., and so on")
    add("--glob", default="**/*.parquet", help="files to read: Parquet or JSON lines, also compressed (%(default)s)")
    add("--text_column", default="text", help="column of the text (%(default)s)")
    add(
        "--where",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="keep only documents that meet all these conditions, such as 'language == en' 'score >= 0.5'",
    )
    add("--drop_duplicates", action="store_true", help="keep only one of nearly identical documents (MinHash)")
    add("--against", type=path, nargs="+", default=[], help="leave out what shares words with these evaluation sets")
    add("--ngram", type=integer(2, 1000), default=NGRAM, help="words in a row that count as shared (%(default)s)")
    add("--tokenizer_name", "--bert_tokenizer", type=path, default="bert-base-uncased", help="tokenizer (%(default)s)")
    add("--dump_file", type=path, default="data/binarized_text", help="beginning of the shards' names (%(default)s)")
    add("--target_length", type=integer(1, 1 << 20), default=100, help="words per sequence, at most (%(default)s)")
    add("--min_length", type=integer(1, 1 << 20), default=10, help="drop sequences with fewer words (%(default)s)")
    add(
        "--tasks",
        type=integer(1, 99_999),
        help=f"number of shards, one task each (default: as many as files, at most {MOST_TASKS:,})",
    )
    add("--workers", type=integer(1, 99_999), help="tasks at a time (default: one per core; with --slurm no limit)")
    add("--logs", type=path, help="folder for logs and the record of finished tasks (default: beside the shards)")
    add("--slurm", action="store_true", help="submit the tasks to Slurm")
    add("--partition", default="cpu", help="partition of the cluster (%(default)s)")
    add("--time", default="24:00:00", help="time limit of a task (%(default)s)")
    add("--cpus_per_task", type=integer(1, 1024), default=2, help="CPUs per task (%(default)s)")
    add("--setup", default="", help="command to run first in each job, such as 'source venv/bin/activate'")
    return parser


def files_of(args: argparse.Namespace) -> list[str]:
    from datatrove.io import get_datafolder

    try:
        files = get_datafolder(args.source).list_files(glob_pattern=args.glob)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--source {args.source} can't be read ({reason_of(error)}).") from None
    if not files:
        raise InputError(f"--source {args.source} has no file that matches --glob {args.glob!r}.")
    return files


def check_same_settings(args: argparse.Namespace, files: list[str]) -> None:
    """Tasks that are done are not done again, so all must have been asked for the same. Raises: InputError."""
    names = ("source", "glob", "text_column", "where", "drop_duplicates", "against", "ngram", "tokenizer_name",
             "dump_file", "target_length", "min_length", "tasks")  # fmt: skip
    settings = {name: getattr(args, name) for name in names} | {"files": zlib.crc32("\n".join(files).encode())}
    recorded = Path(args.logs) / "settings.json"
    if recorded.exists():
        before = read_json(recorded, dict, f"remove {args.logs} and the shards, and start over")
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"--logs {args.logs} is of a preparation with other {name} ({before.get(name)}, not {value}): give "
                    f"another --dump_file, or remove that folder and its shards."
                )
    recorded.parent.mkdir(parents=True, exist_ok=True)
    write_json(recorded, settings)


def reading_steps(args: argparse.Namespace) -> list:
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from pipeline_steps import holds, parse_condition

    reader = ParquetReader if args.glob.endswith(".parquet") else JsonlReader
    steps = [reader(args.source, glob_pattern=args.glob, text_key=args.text_column)]
    for condition in args.where:
        column, comparison, value = parse_condition(condition)
        steps.append(LambdaFilter(functools.partial(holds, column=column, comparison=comparison, value=value)))
    return steps


def stages_of(args: argparse.Namespace, target: str) -> list[tuple[str, list, int]]:
    """(name, steps, number of tasks) of each pipeline, one to be run after the other."""
    from pipeline_steps import Words, WriteShard

    write = WriteShard(target, args.tokenizer_name, args.target_length, args.min_length, args.against, args.ngram)
    if not args.drop_duplicates:
        return [("shards", [*reading_steps(args), write], args.tasks)]
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    # datatrove's own choice, xxhash, wants bytes in its newer versions and gets text.
    config = MinhashConfig(num_buckets=BUCKETS, hash_config=HashConfig(hash_fc="sha1"))
    signatures, buckets, removed = (f"{args.logs}/minhash/{name}" for name in ("signatures", "buckets", "removed"))
    return [
        ("signatures", [*reading_steps(args), MinhashDedupSignature(signatures, config, Words())], args.tasks),
        ("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], BUCKETS),
        ("clusters", [MinhashDedupCluster(buckets, removed, config)], 1),
        ("shards", [*reading_steps(args), MinhashDedupFilter(removed), write], args.tasks),
    ]


def run(args: argparse.Namespace, target: str) -> None:
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    previous = None
    for name, steps, tasks in stages_of(args, target):
        logs = f"{args.logs}/{name}"
        if args.slurm:
            previous = SlurmPipelineExecutor(
                steps, tasks, args.time, args.partition, args.cpus_per_task, job_name=f"prepare-{name}",
                workers=args.workers or -1, logging_dir=logs, depends=previous, qos=None,
                env_command=f"cd {os.getcwd()}; export PYTHONPATH={ROOT}:{ROOT}/scripts/cluster; {args.setup}",
            )  # fmt: skip
        else:
            workers = min(args.workers or n_cores(), tasks)
            previous = LocalPipelineExecutor(steps, tasks, workers, logs, previous)
    previous.run()


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("LOGURU_DIAGNOSE", "0")  # of datatrove: tracebacks without the values of all variables
    os.environ.setdefault("LOGURU_BACKTRACE", "0")
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise InputError("this is a pipeline of datatrove: pip install 'datatrove[io]'") from None
    from pipeline_steps import parse_condition

    if args.target_length < args.min_length:
        raise InputError(f"--target_length {args.target_length} is below --min_length {args.min_length}.")
    for condition in args.where:
        parse_condition(condition)  # complains
    tokenizer = load_tokenizer(args.tokenizer_name)
    args.against = expand_globs(args.against)
    if args.against:
        ngrams_of(args.against, tokenizer, args.ngram)  # complains about what can't be read
    target = f"{args.dump_file}.{tokenizer_short_name(args.tokenizer_name)}.pickle"
    check_output_file(target, "--dump_file")
    files = files_of(args)
    args.tasks = args.tasks or min(len(files), MOST_TASKS)
    args.logs = args.logs or f"{target}.logs"
    check_same_settings(args, files)
    # Tasks that run beside each other share the cores.
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, n_cores() // min(args.workers or n_cores(), args.tasks))))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that datatrove ends its helpers, as after Ctrl-C
    try:
        run(args, target)
    except (InputError, RunError, OSError):
        raise
    except Exception as error:  # whatever a library makes of a damaged file
        raise RunError(
            f"a task failed ({reason_of(error)}); {args.logs} has its log, and the same command continues."
        ) from error
    pattern = target.replace(".pickle", f"-*-of-{args.tasks:05d}.pickle")
    if args.slurm:
        logger.info("%d tasks are submitted; they write %s", args.tasks, pattern)
    elif shards := glob.glob(pattern):
        logger.info("%s: %d shards are done", pattern, len(shards))
    else:
        raise InputError(f"no task found text for a single sequence: is it in --text_column {args.text_column}?")


if __name__ == "__main__":
    raise SystemExit(main())
