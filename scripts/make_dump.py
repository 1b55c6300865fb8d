"""Makes the text that scripts/binarized_data.py reads: one sequence a line, each of several whole sentences of one
document, up to a target length.

From files and folders (plain text, .gz .bz2 .xz of it, JSON lines, Parquet, the output of the Wikipedia extractors):

    python scripts/make_dump.py --source extracted/ books/*.txt --dump_file data/dump.txt

From a data set of the hub (needs `pip install datasets`):

    python scripts/make_dump.py --dataset Salesforce/wikitext --dataset_config wikitext-103-raw-v1

From the documentation that Python and the packages installed here carry, some megabytes of English prose:

    python scripts/make_dump.py --documentation
"""

import argparse
import ast
import codecs
import importlib.util
import itertools
import json
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.text_reader import LOOKED_AT, check_is_text, open_text, read_lines
from utils import InputError, integer, logger, path, real, reason_of

WORD = re.compile(r"\w+|[^\w\s]")  # as BERT's basic tokenizer cuts; a word is some 1.15 of its tokens
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+(?=[\"'“‘«(\[]*[^\W_a-z])|[。！？]+")
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Z]|[Ee]\.g|[Ii]\.e|[A-Z]\.[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Lt|Capt|Sgt|Rev|Jr|Sr|vs|etc|cf|No|"
    r"Vol|Fig|Inc|Ltd|Co|Corp|approx|ca|Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec)\.$"
)
MARKUP = 0.1  # share of tags from which on a text is told to be markup
FRAGMENT_WORDS = 8  # a paragraph shorter than this and without a full stop is a heading or an item of a list
Document = list[str]  # its paragraphs


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--source", type=path, nargs="+", metavar="PATH", help="files and folders, searched to the bottom"
    )
    source.add_argument("--dataset", type=path, help="name of a data set of the hub, or a local folder of one")
    source.add_argument("--documentation", action="store_true", help="docstrings and manuals on this machine")
    parser.add_argument("--dump_file", type=path, default="data/dump.txt", help="file to write (%(default)s)")
    parser.add_argument("--dataset_config", help="configuration of the data set")
    parser.add_argument("--split", default="train", help="part of the data set (%(default)s)")
    parser.add_argument("--text_column", default="text", help="in JSON, Parquet and data sets (%(default)s)")
    parser.add_argument(
        "--documents",
        choices=("blank_line", "file"),
        default="blank_line",
        help="in plain text a document ends at a blank line, or only at the end of the file (%(default)s)",
    )
    parser.add_argument(
        "--target_length",
        type=integer(1, 1 << 20),
        default=110,
        help="most words and punctuation marks a sequence (%(default)s, some 128 tokens of BERT)",
    )
    parser.add_argument(
        "--min_length", type=integer(1, 1 << 20), default=10, help="shorter sequences are dropped (%(default)s)"
    )
    parser.add_argument("--max_megabytes", type=real(0, 1e9, low_allowed=False), help="stop when so much is written")
    return parser


# ------------------------------------------------------------------------------------------------- sources of documents


def files_of(sources: list[str], dump_file: str) -> list[Path]:
    """The files named, and those in the folders named, in the order of their names; not the file to be written.

    Raises: InputError for what is named and is no text. What is found in a folder and is none is left out, with a
        warning.
    """
    files = []
    for source in map(Path, sources):
        if not source.is_dir():
            utils.check_input_file(source, "--source")
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
    """Raises InputError for what is no text; warns of text that looks like markup."""
    if file.suffix == ".parquet":
        return
    with open_text(str(file)) as (text, _):
        start = text.read(LOOKED_AT)
    check_is_text(start, file)
    head = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"\[\s*[{\[\"]", head):
        raise InputError(f"{file} is a JSON array; make an object a line of it: jq -c '.[]' {file} > lines.jsonl")
    tags = re.findall(rb"</?[a-zA-Z][^<>\n]*>", head)
    if not head.startswith(b"<doc ") and sum(map(len, tags)) > MARKUP * len(head):
        logger.warning("%s looks like markup (%s ...); its tags become text unless taken out", file, tags[0].decode())


def documents_of_files(
    sources: list[str], dump_file: str, text_column: str, by_file: bool, seen: Counter
) -> Iterator[Document]:
    """Every document of these files and folders, in the order of their names."""
    files = files_of(sources, dump_file)
    total = sum(file.stat().st_size for file in files)
    with utils.progress_bar(total=total, unit="B", unit_scale=True, desc="reading") as progress:
        for file in files:
            seen["files"] += 1
            yield from documents_of_file(file, text_column, by_file)
            progress.update(file.stat().st_size)


def documents_of_file(file: Path, text_column: str, by_file: bool) -> Iterator[Document]:
    if file.suffix == ".parquet":
        yield from documents_of_parquet(file, text_column)
        return
    lines = (line.decode("utf-8", "replace") for line in read_lines(file))
    first = next(lines, "").removeprefix("\ufeff")  # the mark that some editors put before a text
    lines = itertools.chain([first], lines)
    if first.lstrip().startswith("{"):
        yield from documents_of_json(file, lines, text_column)
    elif first.startswith("<doc "):
        yield from documents_of_extractor(lines)
    elif by_file:
        yield list(paragraphs(lines))
    else:
        for is_blank, block in itertools.groupby(lines, lambda line: not line.strip()):
            if not is_blank:
                yield list(paragraphs(block))


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Lines -> paragraphs: a blank line ends one, and so does a line too long to have been wrapped by hand."""
    parts: list[str] = []
    for line in itertools.chain(lines, [""]):
        line = line.strip()
        if line:
            parts.append(line)
        if parts and (not line or len(line) > 200):
            yield " ".join(parts)
            parts = []


def documents_of_json(file: Path, lines: Iterable[str], text_column: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_column]
        except ValueError:
            raise InputError(f"{file}, line {number}: not a JSON object a line.") from None
        except (KeyError, TypeError):
            raise InputError(
                f"{file}, line {number}: no {text_column!r} in it; name the text with --text_column."
            ) from None
        yield list(paragraphs(str(text).splitlines()))


def documents_of_parquet(file: Path, text_column: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file}: to read Parquet, pip install pyarrow.") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_column not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise InputError(f"{file}: no column {text_column!r}, only {columns}; name one with --text_column.")
        for batch in table.iter_batches(columns=[text_column]):
            for text in batch.column(0).to_pylist():
                yield list(paragraphs((text or "").splitlines()))
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} can't be read as Parquet ({reason_of(error)}).") from None


def documents_of_extractor(lines: Iterable[str]) -> Iterator[Document]:
    """<doc id=... title=...>, the title, a blank line, a paragraph a line, </doc>."""
    title, document = "", []
    for line in map(str.strip, lines):
        if line.startswith("<doc "):
            match = re.search(r'title="([^"]*)"', line)
            title, document = match.group(1) if match else "", []
        elif line == "</doc>":
            yield document
        elif line and line != title:
            document.append(line)


def documents_of_dataset(name: str, config: str | None, split: str, text_column: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"--dataset {name}: to read data sets, pip install datasets.") from None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # each loader has errors of its own
        raise InputError(f"--dataset {name}: it could not be loaded ({reason_of(error)}).") from None
    for row in utils.progress_bar(iterable=rows, unit="row", desc="reading"):
        if text_column not in row:
            raise InputError(f"--dataset {name}: no {text_column!r}, only {', '.join(row)}; see --text_column.")
        yield list(paragraphs(row[text_column].splitlines()))


def documents_of_documentation(seen: Counter) -> Iterator[Document]:
    """The language's reference, then the docstrings of the standard library and of the packages installed here. What
    is code, a table or a list is left out, and a paragraph that has occurred before."""
    known: set[int] = set()

    def new_prose(text: str) -> list[str]:
        blocks = [block for block in re.split(r"\n\s*\n", text) if is_prose(block)]
        new = [" ".join(block.split()) for block in blocks if hash(block) not in known]
        known.update(map(hash, blocks))
        return new

    import pydoc_data.topics

    for text in pydoc_data.topics.topics.values():
        seen["files"] += 1
        yield new_prose(text)
    packages = Path(importlib.util.find_spec("numpy").origin).parents[1]
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    files += sorted(packages.rglob("*.py"))
    for file in utils.progress_bar(iterable=files, unit="file", desc="reading docstrings"):
        seen["files"] += 1
        yield list(itertools.chain.from_iterable(map(new_prose, docstrings(file))))


def docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's code
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # templates and tests that are no Python
            return
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (text := ast.get_docstring(node)):
            yield text


def is_prose(block: str) -> bool:
    lines = block.splitlines()
    words = block.split()
    if len(words) < FRAGMENT_WORDS or not block[0].isalpha() or ">>>" in block or block.rstrip()[-1] not in ".!?:)\"'":
        return False
    if any(line[:1] in " \t>|-*=" for line in lines):
        return False
    return len(re.findall(r"[A-Za-z][a-z']+", block)) > 0.75 * len(words)


# ----------------------------------------------------------------------------------------------- documents to sequences


def sentences(paragraph: str) -> list[str]:
    """Cuts after a full stop that is followed by a capital, but not after initials and common abbreviations."""
    parts, start = [], 0
    for end in SENTENCE_END.finditer(paragraph):
        if not ABBREVIATION.search(paragraph[start : end.end()].rstrip()):
            parts.append(paragraph[start : end.end()].strip())
            start = end.end()
    parts.append(paragraph[start:].strip())
    return [sentence for sentence in parts if sentence]


def sequences(document: Document, target: int, seen: Counter) -> Iterator[str]:
    """Packs a document's sentences into sequences of about even length, none above the target but single sentences."""
    kept = []
    for paragraph in document:
        n_words = len(WORD.findall(paragraph))
        if n_words < FRAGMENT_WORDS and paragraph[-1:] not in '.!?。！？"”':
            seen["fragments"] += 1
        else:
            kept += [(sentence, len(WORD.findall(sentence))) for sentence in sentences(paragraph)]
    seen["sentences"] += len(kept)
    total = sum(n for _, n in kept)
    enough = total / max(1, -(-total // target))  # so that no short rest is left at the end
    parts: list[str] = []
    length = 0
    for sentence, n_words in kept:
        if parts and (length + n_words > target or length >= enough):
            yield " ".join(parts)
            parts, length = [], 0
        parts.append(sentence)
        length += n_words
    if parts:
        yield " ".join(parts)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if args.target_length < args.min_length:
        raise InputError(f"--target_length {args.target_length} is below --min_length {args.min_length}.")
    utils.check_output_file(args.dump_file, "--dump_file")
    seen: Counter = Counter()
    if args.source:
        documents = documents_of_files(args.source, args.dump_file, args.text_column, args.documents == "file", seen)
    elif args.dataset:
        documents = documents_of_dataset(args.dataset, args.dataset_config, args.split, args.text_column)
    else:
        documents = documents_of_documentation(seen)
    limit = args.max_megabytes * 1e6 if args.max_megabytes else float("inf")
    n_bytes = 0
    with utils.atomic_write(args.dump_file) as out:
        for document in documents:
            seen["documents"] += 1
            for sequence in sequences(document, args.target_length, seen):
                if len(WORD.findall(sequence)) < args.min_length:
                    seen["short"] += 1
                    continue
                line = (sequence + "\n").encode()
                out.write(line)
                seen["sequences"] += 1
                n_bytes += len(line)
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
