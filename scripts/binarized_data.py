"""Turns text, one sequence a line, into the binarized file that train.py reads.

    python scripts/binarized_data.py --file_path data/dump.txt --bert_tokenizer bert-base-uncased \\
        --dump_file data/binarized_text

writes data/binarized_text.bert-base-uncased.pickle. The text streams through, so memory does not grow with it: one file
or many (`--file_path 'wiki/*.txt.gz' books.txt`), or standard input (`--file_path -`). After an interruption, such as
a full disk or the end of a job, the same command with --resume continues and gives the same bytes.

Several processes divide the text and write a shard each, with its counts (`.counts`) beside it: start them with
torchrun, or as a job array with a number each (`--shard_id $SLURM_ARRAY_TASK_ID --num_shards 16`). train.py takes the
shards as they are (`--data_file 'data/binarized_text.*-of-00016.pickle'`); scripts/merge_data.py joins them.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import expand_globs, shard_name
from corpus.text_reader import STDIN, Block, TextReader, spans_of
from corpus.token_counts import save_counts
from corpus.tokenization import LineEncoder, describe_tokenizer, load_tokenizer, tokenizer_short_name
from dataset import TokenFileWriter, is_unfinished, partial_folder, write_token_file
from files.paths import check_input_file, check_output_file
from utils import InputError, integer, logger, n_cores, path

CHECKPOINT_SECONDS = 5  # of work that a kill can cost
REPORT_SECONDS = 60  # between lines of the log, where there is no terminal for a progress bar


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add(
        "--file_path",
        type=path,
        nargs="+",
        default=["data/dump.txt"],
        help="text files or globs, also compressed (gzip, bzip2, xz); - for standard input (data/dump.txt)",
    )
    add(
        "--tokenizer_name",
        "--bert_tokenizer",
        type=path,
        default="bert-base-uncased",
        help="hub name or folder (%(default)s)",
    )
    add("--tokenizer_type", help="ignored; accepted for old command lines")
    add("--dump_file", type=path, default="data/binarized_text", help="beginning of the output's name (%(default)s)")
    add("--resume", action="store_true", help="continue an interrupted run; do nothing if it was finished")
    add(
        "--encoding_errors",
        choices=("replace", "strict"),
        default="replace",
        help="repair lines that are not UTF-8, with a warning, or stop at one (%(default)s)",
    )
    add("--num_shards", type=integer(1, 99_999), help="processes that share the text (default: from torchrun)")
    add("--shard_id", type=integer(0, 99_999), help="number of this process, from 0 (default: from torchrun)")
    add("--local_rank", "--local-rank", type=integer(-1, 1 << 20), help="set by launchers")
    return parser


def shard_of(args: argparse.Namespace) -> tuple[int, int]:
    """(number of this shard, number of shards), by the flags or by the launcher."""
    if (args.num_shards is None) != (args.shard_id is None):
        raise InputError("--num_shards and --shard_id go together: give both or none.")
    if args.num_shards is not None:
        if not 0 <= args.shard_id < args.num_shards:
            raise InputError(f"--shard_id {args.shard_id}: of --num_shards {args.num_shards}, the first one is 0.")
        return args.shard_id, args.num_shards
    if "RANK" not in os.environ:
        return 0, 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, n_cores() // on_this_machine)))
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def files_of(names: list[str]) -> list[str]:
    if STDIN in names:
        if len(names) > 1:
            raise InputError("--file_path - (standard input) can't be mixed with files.")
        return names
    names = expand_globs(names)
    for name in names:
        check_input_file(name, "--file_path", "scripts/make_dump.py makes a text from what you have")
    return names


def identity_of(paths: list[str], shard: tuple[int, int]) -> dict:
    """What must be the same for an interrupted run to continue."""
    stats = {name: os.stat(name) for name in paths if name != STDIN}
    return {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()], "shard": list(shard)}


def is_finished(target: str, paths: list[str]) -> bool:
    """Whether the output is there, newer than the text."""
    if is_unfinished(target) or not os.path.isfile(target):
        return False
    return all(os.stat(name).st_mtime_ns <= os.stat(target).st_mtime_ns for name in paths)


def encoded(blocks: Iterable[Block], encode: LineEncoder) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
    """Each block with its ids and lengths; the next one is being encoded while one is written."""
    with ThreadPoolExecutor(1) as thread:
        previous = None
        for block in blocks:
            current = block, thread.submit(encode, block.lines)
            if previous:
                yield previous[0], *previous[1].result()
            previous = current
        if previous:
            yield previous[0], *previous[1].result()


class Progress:
    """A bar on a terminal; elsewhere a line of the log now and then."""

    def __init__(self, title: str, done: int, shown: bool) -> None:
        self.bar = utils.progress_bar(shown, desc=title, initial=done, unit="B", unit_scale=True)
        self.done, self.start, self.last = done, (done, time.monotonic()), time.monotonic()

    def update(self, block: Block, n_tokens: int) -> None:
        self.done += block.n_bytes
        self.bar.total = max(block.total_bytes, self.done) if block.total_bytes else None
        self.bar.set_postfix_str(f"{n_tokens / 1e6:,.1f} M tokens", refresh=False)
        self.bar.update(block.n_bytes)
        now = time.monotonic()
        if self.bar.disable and now - self.last > REPORT_SECONDS:
            self.last = now
            rate = (self.done - self.start[0]) / (now - self.start[1])
            left = "an unknown time"
            if block.total_bytes:
                left = self.bar.format_interval(max(0, block.total_bytes - self.done) / rate)
            logger.info(
                "%.0f MB of text, %.1f M tokens, %.1f MB/s; %s left", self.done / 1e6, n_tokens / 1e6, rate / 1e6, left
            )


def binarize(writer: TokenFileWriter, reader: TextReader, encode: LineEncoder, identity: dict, shown: bool) -> None:
    """Reads, encodes and writes from where the writer continues, with checkpoints."""
    position, done = None, 0
    if writer.progress:
        if writer.progress["identity"] != identity:
            raise InputError("--resume: the text or its shards are not what they were; leave out --resume.")
        position, done = tuple(writer.progress["position"]), writer.progress["bytes"]
        logger.info("continuing after %.1f MB of text, %s tokens", done / 1e6, f"{writer.n_tokens:,}")
    progress = Progress(Path(reader.spans[0].path).name, done, shown)
    last = time.monotonic()
    with progress.bar:
        for block, ids, lengths in encoded(reader.blocks(position), encode):
            writer.append(ids, lengths)
            progress.update(block, writer.n_tokens)
            if identity["files"] and time.monotonic() - last >= CHECKPOINT_SECONDS:
                writer.checkpoint({"identity": identity, "position": block.position, "bytes": progress.done})
                last = time.monotonic()


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    shard_id, num_shards = shard_of(args)
    is_master = args.num_shards is not None or shard_id == 0  # jobs of an array have a log of their own each
    utils.setup_logging(is_master)
    paths = files_of(args.file_path)
    if paths == [STDIN] and (num_shards > 1 or args.resume):
        raise InputError("--file_path -: standard input can neither be divided into shards nor resumed; give a file.")
    target = f"{args.dump_file}.{tokenizer_short_name(args.tokenizer_name)}.pickle"
    if num_shards > 1:
        target = shard_name(target, shard_id, num_shards)
    check_output_file(target, "--dump_file")
    if args.resume and is_finished(target, paths):
        shutil.rmtree(partial_folder(target), ignore_errors=True)  # its traces, where a kill came just after the end
        logger.info("%s is there already, and newer than the text: nothing to do", target)
        return

    tokenizer = load_tokenizer(args.tokenizer_name)
    encode = LineEncoder(tokenizer)
    spans = spans_of(paths, shard_id, num_shards)
    if not spans:
        raise InputError(f"shard {shard_id} of {num_shards} gets no text: there is too little; use fewer shards.")
    reader = TextReader(spans, strict=args.encoding_errors == "strict")
    with write_token_file(target, describe_tokenizer(tokenizer), args.resume) as writer:
        binarize(writer, reader, encode, identity_of(paths, (shard_id, num_shards)), shown=is_master)
    if num_shards > 1:
        save_counts(target)
    logger.info(
        "%s: %s sequences, %s tokens, %.1f on average",
        target,
        f"{writer.n_sequences:,}",
        f"{writer.n_tokens:,}",
        writer.n_tokens / writer.n_sequences,
    )


if __name__ == "__main__":
    raise SystemExit(main())
