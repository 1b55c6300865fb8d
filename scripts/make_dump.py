"""Makes the text that scripts/binarized_data.py reads: one sequence per line, made of whole sentences of one document,
up to a target length.

From files and folders (plain text, .gz .bz2 .xz of it, JSON lines, Parquet, the output of the Wikipedia extractors):

    python scripts/make_dump.py --source extracted/ books/*.txt --dump_file data/dump.txt

From a data set of the hub (needs `pip install datasets`):

    python scripts/make_dump.py --dataset Salesforce/wikitext --dataset_config wikitext-103-raw-v1

From the documentation of Python and of the installed packages, a few megabytes of English prose:

    python scripts/make_dump.py --documentation
"""

import argparse
import ast
import codecs
import contextlib
import functools
import importlib.util
import itertools
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.documents import DOCUMENTS, FRAGMENT_WORDS, TEXTS, Document, Packed, Piece, pack_piece, pieces_of_file
from corpus.parallel import MapTasks, map_ordered
from corpus.text_reader import LOOKED_AT, check_is_text, open_text
from files.atomic import atomic_write
from files.paths import check_input_file, check_output_file
from utils import InputError, integer, logger, n_cores, path, real, reason_of

MARKUP = 0.1  # share of tags above which a text counts as markup
FILES_AT_ONCE = 32  # files that a process reads docstrings from at a time
ROWS_AT_ONCE = 500  # of a data set, that make a piece


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--source", type=path, nargs="+", metavar="PATH", help="files, and folders that are searched recursively"
    )
    source.add_argument("--dataset", type=path, help="data set: name on the hub or local folder")
    source.add_argument("--documentation", action="store_true", help="docstrings and manuals on this machine")
    add("--dump_file", type=path, default="data/dump.txt", help="file to write (%(default)s)")
    add("--dataset_config", help="configuration of the data set")
    add("--split", default="train", help="split of the data set (%(default)s)")
    add("--text_column", default="text", help="column of the text, in JSON, Parquet, and data sets (%(default)s)")
    add(
        "--documents",
        choices=("blank_line", "file"),
        default="blank_line",
        help="where a document of plain text ends: at a blank line, or only at the end of the file (%(default)s)",
    )
    add(
        "--target_length",
        type=integer(1, 1 << 20),
        default=110,
        help="words and punctuation marks per sequence, at most (%(default)s, which is about 128 tokens of BERT)",
    )
    add("--min_length", type=integer(1, 1 << 20), default=10, help="drop sequences with fewer (%(default)s)")
    add("--max_megabytes", type=real(0, 1e9, low_allowed=False), help="stop after this much text")
    add(
        "--num_workers",
        type=integer(0, 1 << 10),
        default=n_cores(),
        help="number of extra processes, which does not change the text (%(default)s, one per core)",
    )
    return parser


# ------------------------------------------------------------------------------------------------- sources of documents


def files_of(sources: list[str], dump_file: str) -> list[Path]:
    """The files named, and those in the folders named, in the order of their names; not the file to be written.

    Raises: InputError if a named file is not text. In a folder, such files are left out, with a
        warning.
    """
    files = []
    for source in map(Path, sources):
        if not source.is_dir():
            check_input_file(source, "--source")
            check_source(source)
            files.append(source)
            continue
        for file in sorted(p for p in source.rglob("*") if not p.name.startswith(".")):
            try:
                if not file.is_file():
                    continue
                check_source(file)
                files.append(file)
            except (InputError, OSError) as error:
                logger.warning("left out: %s", error)
    target = Path(dump_file).resolve()
    if any(file.resolve() == target for file in files):
        logger.warning("left out: %s, which is the --dump_file", dump_file)
    return [file for file in files if file.resolve() != target]


def check_source(file: Path) -> None:
    """Raises InputError for what is not text; warns of text that looks like markup."""
    if file.suffix == ".parquet":
        return
    with open_text(str(file)) as (text, _):
        start = text.read(LOOKED_AT)
    check_is_text(start, file)
    head = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"\[\s*[{\[\"]", head):
        raise InputError(f"{file} is a JSON array; make it one object per line: jq -c '.[]' {file} > lines.jsonl")
    tags = re.findall(rb"</?[a-zA-Z][^<>\n]*>", head)
    if not head.startswith(b"<doc ") and sum(map(len, tags)) > MARKUP * len(head):
        logger.warning("%s looks like markup (%s ...); its tags become text unless taken out", file, tags[0].decode())


def pieces_of_files(files: list[Path], text_column: str, by_file: bool) -> Iterator[Piece]:
    for file in files:
        yield from pieces_of_parquet(file, text_column) if file.suffix == ".parquet" else pieces_of_file(file, by_file)


def pieces_of_parquet(file: Path, text_column: str) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file}: to read Parquet, pip install pyarrow.") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_column not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)[:100]
            raise InputError(f"{file}: no column {text_column!r}, only {columns}; name one with --text_column.")
        left, n_files = file.stat().st_size, 1
        bytes_of_row = left / max(1, table.metadata.num_rows)
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[text_column]):
            n_bytes = int(batch.num_rows * bytes_of_row)
            yield Piece(TEXTS, batch.column(0).to_pylist(), str(file), progress=n_bytes, n_files=n_files)
            left, n_files = left - n_bytes, 0
        yield Piece(TEXTS, [], progress=left, n_files=n_files)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read as Parquet ({reason_of(error)}).") from None


def pieces_of_dataset(name: str, config: str | None, split: str, text_column: str) -> Iterator[Piece]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"--dataset {name}: to read data sets, pip install datasets.") from None
    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
    except Exception as error:  # each loader has its own errors
        raise InputError(f"--dataset {name}: it could not be loaded ({reason_of(error)}).") from None
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        if text_column not in some[0]:
            raise InputError(
                f"--dataset {name}: no {text_column!r}, only {', '.join(some[0])[:100]}; see --text_column."
            )
        yield Piece(TEXTS, [row[text_column] for row in some], f"--dataset {name}", progress=len(some))


def files_of_documentation() -> list[Path]:
    """The standard library, and the packages installed here; not their tests, which are long and say little."""
    files = []
    for root, left_out in (
        (Path(sysconfig.get_path("stdlib")), {"test", "tests", "site-packages"}),
        (Path(importlib.util.find_spec("numpy").origin).parents[1], {"test", "tests"}),
    ):
        files += [file for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts)]
    return files


def pieces_of_documentation(files: list[Path], map_tasks: MapTasks) -> Iterator[Piece]:
    """The language's reference, then the docstrings of these files. What is code, a table or a list is left out, and a
    paragraph that has occurred before."""
    import pydoc_data.topics

    known: set[str] = set()

    def piece(texts: list[list[str]], progress: int) -> Piece:
        documents: list[Document] = []
        for blocks in texts:
            documents.append([block for block in dict.fromkeys(blocks) if block not in known])
            known.update(blocks)
        return Piece(DOCUMENTS, documents, progress=progress, n_files=len(texts))

    yield piece(list(map(prose_of, pydoc_data.topics.topics.values())), 0)
    parts = [files[i : i + FILES_AT_ONCE] for i in range(0, len(files), FILES_AT_ONCE)]
    for part, texts in zip(parts, map_tasks(prose_of_files, parts), strict=True):
        yield piece(texts, len(part))


def prose_of_files(files: list[Path]) -> list[list[str]]:
    """The paragraphs of prose in the docstrings of each of these files."""
    return [list(itertools.chain.from_iterable(map(prose_of, docstrings(file)))) for file in files]


def prose_of(text: str) -> list[str]:
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if is_prose(block)]


def docstrings(file: Path) -> Iterator[str]:
    """Those of a module, and of its classes and functions, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's code
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # templates and tests that are no Python
            return
    yield from _docstrings_within(tree)


def _docstrings_within(node: ast.AST) -> Iterator[str]:
    """Only statements are visited: to walk through every expression takes as long again as to parse."""
    documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if documented and (text := ast.get_docstring(node)):
        yield text
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        for statement in getattr(node, name, ()):
            yield from _docstrings_within(statement)


def is_prose(block: str) -> bool:
    lines = block.splitlines()
    words = block.split()
    if len(words) < FRAGMENT_WORDS or not block[0].isalpha() or ">>>" in block or block.rstrip()[-1] not in ".!?:)\"'":
        return False
    if any(line[:1] in " \t>|-*=" for line in lines):
        return False
    return len(re.findall(r"[A-Za-z][a-z']+", block)) > 0.75 * len(words)


# -------------------------------------------------------------------------------------------------------- all together


def pieces(args: argparse.Namespace, files: list[Path], map_tasks: MapTasks) -> Iterator[Piece]:
    if args.dataset:
        return pieces_of_dataset(args.dataset, args.dataset_config, args.split, args.text_column)
    if args.documentation:
        return pieces_of_documentation(files, map_tasks)
    return pieces_of_files(files, args.text_column, args.documents == "file")


def packed_documents(args: argparse.Namespace, seen: Counter) -> Iterator[Packed]:
    """What all documents become, in order, with a progress bar; `seen` counts the files."""
    if args.documentation:
        files = files_of_documentation()
        bar = {"total": len(files), "unit": " files"}
    else:
        files = files_of(args.source, args.dump_file) if args.source else []
        total = sum(file.stat().st_size for file in files)
        bar = {"unit": " rows"} if args.dataset else {"total": total, "unit": "B", "unit_scale": True}
    pack = functools.partial(
        pack_piece, text_column=args.text_column, target_length=args.target_length, min_length=args.min_length
    )
    with map_ordered(args.num_workers) as map_tasks, utils.progress_bar(desc="reading", **bar) as progress:
        for piece in map_tasks(pack, pieces(args, files, map_tasks)):
            seen["files"] += piece.n_files
            yield from piece.documents
            progress.update(piece.progress)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if args.target_length < args.min_length:
        raise InputError(f"--target_length {args.target_length} is below --min_length {args.min_length}.")
    check_output_file(args.dump_file, "--dump_file")
    seen: Counter = Counter()
    limit = args.max_megabytes * 1e6 if args.max_megabytes else float("inf")
    n_bytes = 0
    with atomic_write(args.dump_file) as out, contextlib.closing(packed_documents(args, seen)) as documents:
        for packed in documents:
            out.write(packed.text)
            n_bytes += len(packed.text)
            counts = {"documents": 1, "sequences": packed.n_sequences, "sentences": packed.n_sentences}
            seen.update(counts | {"fragments": packed.n_fragments, "short": packed.n_short})
            if n_bytes >= limit:
                break
        if not seen["sequences"]:
            raise InputError(f"{args.dump_file} was not written: there is no text of {args.min_length} words or more.")
    logger.info(
        "read %s files, %s documents, %s sentences; dropped %s headings and fragments, %s sequences under %d words",
        *(f"{seen[name]:,}" for name in ("files", "documents", "sentences", "fragments", "short")),
        args.min_length,
    )
    logger.info("%s: %s sequences, %.1f MB", args.dump_file, f"{seen['sequences']:,}", n_bytes / 1e6)


if __name__ == "__main__":
    raise SystemExit(main())
