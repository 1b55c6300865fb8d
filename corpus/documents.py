"""Text of any form -> documents -> sequences of whole sentences.

A source is cut into pieces, each of some whole documents. What becomes of a piece depends on nothing else, so the
pieces of a text can be divided among processes.
"""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import NamedTuple

from corpus.text_reader import BLOCK, open_text
from files.json_reader import parse_json
from utils import InputError

WORD = re.compile(r"\w+|[^\w\s]")  # as BERT's basic tokenizer counts them; a word has some 1.15 tokens
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+(?=[\"'“‘«(\[]*[^\W_a-z])|[。！？]+")
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Z]|[Ee]\.g|[Ii]\.e|[A-Z]\.[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Lt|Capt|Sgt|Rev|Jr|Sr|vs|etc|cf|No|"
    r"Vol|Fig|Inc|Ltd|Co|Corp|approx|ca|Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec)\.$"
)
ABBREVIATION_LENGTH = 16  # characters; more than the longest of them and its context
FRAGMENT_WORDS = 8  # a paragraph shorter than this and without a full stop is a heading or an item of a list
Document = list[str]  # its paragraphs

PLAIN, ONE_DOCUMENT, JSON_LINES, EXTRACTOR, TEXTS, DOCUMENTS = range(6)  # forms of a piece
BOUNDARY = {  # after which a file of this form may be cut; not all such places need be found
    PLAIN: re.compile(rb"\n[ \t\r]*\n"),
    JSON_LINES: re.compile(rb"\n"),
    EXTRACTOR: re.compile(rb"^</doc>[ \t\r]*\n", re.MULTILINE),
}


@dataclass(frozen=True)
class Piece:
    """Some whole documents of a source.

    Attributes:
        form: PLAIN (a blank line ends a document), ONE_DOCUMENT, JSON_LINES, EXTRACTOR (what the Wikipedia extractors
            write), TEXTS or DOCUMENTS.
        content: bytes of a file; for TEXTS a list of strings, for DOCUMENTS of documents.
        source, line: the file, and the number of its line that comes first here; for error messages.
        progress: how much of the source is done after this piece, in whatever unit.
        n_files: how many files begin here.
    """

    form: int
    content: bytes | list[str] | list[Document]
    source: str = ""
    line: int = 1
    progress: int = 1
    n_files: int = 0


class Packed(NamedTuple):
    """What a document was turned into."""

    text: bytes  # its sequences, one a line
    n_sequences: int
    n_sentences: int
    n_fragments: int  # dropped
    n_short: int  # sequences dropped


class PackedPiece(NamedTuple):
    documents: list[Packed]
    progress: int
    n_files: int


# ---------------------------------------------------------------------------------------------------- files to pieces


def pieces_of_file(file: Path, by_file: bool) -> Iterator[Piece]:
    """A file of text, whatever it is compressed with. Raises: InputError if it is damaged.

    Args:
        by_file: plain text is one document.
    """
    with open_text(str(file)) as (text, raw):
        rest = bytearray(text.read(BLOCK))  # what is not handed out yet
        form = _form(rest, by_file)
        position, line, n_files = 0, 1, 1
        while True:
            data = text.read(BLOCK)
            end = _last_boundary(rest, form) if data else len(rest)
            if end or not data:
                content = bytes(rest[:end])
                here = raw.tell()
                yield Piece(form, content, str(file), line, here - position, n_files)
                position, line, n_files = here, line + content.count(b"\n"), 0
                del rest[:end]
            if not data:
                return
            rest += data


def _form(start: bytes, by_file: bool) -> int:
    start = start.removeprefix(codecs.BOM_UTF8)
    if start.split(b"\n", 1)[0].lstrip().startswith(b"{"):
        return JSON_LINES
    if start.startswith(b"<doc "):
        return EXTRACTOR
    return ONE_DOCUMENT if by_file else PLAIN


def _last_boundary(text: bytearray, form: int) -> int:
    """The end of the last whole document of `text`; 0 if there is none in its last block."""
    if form == ONE_DOCUMENT:
        return 0
    start = text.rfind(b"\n", 0, max(0, len(text) - BLOCK)) + 1  # what comes before was looked through already
    end = 0
    for match in BOUNDARY[form].finditer(text, start):
        end = match.end()
    return end


# ------------------------------------------------------------------------------------------------ pieces to documents


def documents_of(piece: Piece, text_column: str) -> Iterator[Document]:
    """Raises: InputError for a line that is not a JSON object with a `text_column`."""
    if piece.form == DOCUMENTS:
        yield from piece.content
        return
    if piece.form == TEXTS:
        for text in piece.content:
            if not isinstance(text, (str, NoneType)):
                raise InputError(
                    f"{piece.source}: {text_column!r} holds no text, but {type(text).__name__}s; name the text with "
                    f"--text_column."
                )
            yield list(paragraphs((text or "").splitlines()))
        return
    lines = piece.content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").split("\n")
    if piece.form == JSON_LINES:
        yield from _documents_of_json(piece, lines, text_column)
    elif piece.form == EXTRACTOR:
        yield from _documents_of_extractor(lines)
    elif piece.form == ONE_DOCUMENT:
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


def _documents_of_json(piece: Piece, lines: list[str], text_column: str) -> Iterator[Document]:
    shape = {text_column: (str, None)}
    for number, line in enumerate(lines, piece.line):
        if not line.strip():
            continue
        record = parse_json(line, f"{piece.source}, line {number}", shape, "name the text with --text_column")
        yield list(paragraphs((record[text_column] or "").splitlines()))


def _documents_of_extractor(lines: Iterable[str]) -> Iterator[Document]:
    """The format: <doc id=... title=...>, the title, a blank line, one paragraph per line, </doc>."""
    title, document = "", []
    for line in map(str.strip, lines):
        if line.startswith("<doc "):
            match = re.search(r'title="([^"]*)"', line)
            title, document = match.group(1) if match else "", []
        elif line == "</doc>":
            yield document
        elif line and line != title:
            document.append(line)


# ----------------------------------------------------------------------------------------------- documents to sequences


def sentences(paragraph: str) -> list[str]:
    """Cuts after a full stop that is followed by a capital, but not after initials and common abbreviations."""
    parts, start = [], 0
    for end in SENTENCE_END.finditer(paragraph):
        sentence = paragraph[start : end.end()].strip()
        if not ABBREVIATION.search(sentence[-ABBREVIATION_LENGTH:]):
            parts.append(sentence)
            start = end.end()
    parts.append(paragraph[start:].strip())
    return [sentence for sentence in parts if sentence]


def pack(document: Document, target_length: int, min_length: int) -> Packed:
    """Packs a document's sentences into sequences of about even length.

    Args:
        target_length: maximum words and punctuation marks in a sequence; a longer sentence is a sequence by itself.
        min_length: sequences with fewer words are dropped.
    """
    kept: list[tuple[str, int]] = []  # sentences, and how many words they have
    n_fragments = 0
    for paragraph in document:
        counted = [(sentence, len(WORD.findall(sentence))) for sentence in sentences(paragraph)]
        if sum(n for _, n in counted) < FRAGMENT_WORDS and paragraph[-1:] not in '.!?。！？"”':
            n_fragments += 1
        else:
            kept += counted
    total = sum(n for _, n in kept)
    enough = total / max(1, -(-total // target_length))  # so that no short piece is left at the end
    sequences: list[tuple[list[str], int]] = []
    parts: list[str] = []
    length = 0
    for sentence, n_words in kept:
        if parts and (length + n_words > target_length or length >= enough):
            sequences.append((parts, length))
            parts, length = [], 0
        parts.append(sentence)
        length += n_words
    if parts:
        sequences.append((parts, length))
    long_enough = [" ".join(parts) + "\n" for parts, length in sequences if length >= min_length]
    n_short = len(sequences) - len(long_enough)
    return Packed("".join(long_enough).encode(), len(long_enough), len(kept), n_fragments, n_short)


def pack_piece(piece: Piece, text_column: str, target_length: int, min_length: int) -> PackedPiece:
    documents = [pack(document, target_length, min_length) for document in documents_of(piece, text_column)]
    return PackedPiece(documents, piece.progress, piece.n_files)
