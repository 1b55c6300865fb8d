"""Lines of text from files of any size, plain or compressed, all of them or one shard's, from any position.

A position is (number of the span, byte of the uncompressed text), always at the beginning of a line. The same files
give the same lines in the same order wherever reading is interrupted, and however many shards they are divided into:
the shards' lines, one shard after the other, are the lines of the whole.
"""

import bz2
import codecs
import contextlib
import gzip
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils import InputError, logger

STDIN = "-"
BLOCK = 1 << 20  # bytes read at once
MAX_LINE = 4 << 20  # bytes; a longer one is not a sequence, and would not leave memory bounded
SHOWN_WARNINGS = 5
LOOKED_AT = 8192  # bytes, to tell whether a file is text
MAX_WRONG = 0.1  # share of them that need not be valid UTF-8
CONTROL = [bytes([i]) for i in range(32) if chr(i) not in "\t\n\r\f\b\x1b"]
DOCUMENT_MARKS = (b"%PDF", b"{\\rtf")
COMPRESSIONS = {  # how such a file begins, and what decompresses it
    ".gz": (re.compile(rb"\x1f\x8b\x08"), gzip.open),
    ".bz2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.open),
    ".xz": (re.compile(rb"\xfd7zXZ\0"), lzma.open),
}


@contextlib.contextmanager
def open_text(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The uncompressed text of a file ("-": standard input), and the file itself, whose position shows progress.

    Raises: InputError if the file is damaged or cut short, at the place where reading comes upon it.
    """
    if path == STDIN:
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    try:
        with open(path, "rb") as file:
            if opener := _opener(path, file):
                with opener(file) as text:
                    yield text, file
            else:
                yield file, file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, str(error)) from None  # how bz2 says it


def _opener(path: str, file: BinaryIO):
    """What decompresses a file, detected from its first bytes, whatever its name; None for plain text."""
    start = file.read(10)
    file.seek(0)
    opener = next((opener for magic, opener in COMPRESSIONS.values() if magic.match(start)), None)
    if not opener and (suffix := Path(path).suffix) in COMPRESSIONS:
        raise _damaged(path, f"not a {suffix} file")
    return opener


def _damaged(path: str, reason: str) -> InputError:
    return InputError(f"{path} is damaged or cut short ({reason.rstrip('.')}); copy it again.")


# --------------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Span:
    """The lines of a file that begin at byte `start` or later, and before `stop` (None: up to the end)."""

    path: str
    start: int
    stop: int | None


def spans_of(paths: list[str], shard_id: int = 0, num_shards: int = 1) -> list[Span]:
    """What shard `shard_id` of `num_shards` reads: an even part of the bytes of all files, one after the other.

    The size of a compressed text is known only once it is decompressed: with several shards, each does that first.
    """
    if num_shards == 1:
        return [Span(path, 0, None if path == STDIN or _is_compressed(path) else _size(path)) for path in paths]
    sizes = [_uncompressed_size(path) for path in paths]
    first, last = (sum(sizes) * k // num_shards for k in (shard_id, shard_id + 1))
    spans, at = [], 0  # `at`: where the file begins among all bytes
    for path, size in zip(paths, sizes, strict=True):
        start, stop = max(first - at, 0), min(last - at, size)
        if start < stop:
            spans.append(Span(path, start, stop))
        at += size
    return spans


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return _opener(path, file) is not None


def _uncompressed_size(path: str) -> int:
    if not _is_compressed(path):
        return _size(path)
    logger.info("decompressing %s once to know its size", path)
    with open_text(path) as (text, _):
        return text.seek(0, 2)


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Block:
    """Some consecutive lines."""

    lines: list[str]  # stripped, without the empty ones
    position: tuple[int, int]  # of what comes after them
    n_bytes: int  # of text, this block
    total_bytes: int | None  # of text, all spans; an estimate where files are compressed; None for standard input


class TextReader:
    """The lines of `spans`, as blocks of about BLOCK bytes.

    Args:
        spans: what to read.
        strict: a line that isn't UTF-8 is an error; else its bad bytes become U+FFFD, with a warning.
    """

    def __init__(self, spans: list[Span], strict: bool = False) -> None:
        self.spans, self.strict = spans, strict
        self.n_bad = 0

    def blocks(self, position: tuple[int, int] | None = None) -> Iterator[Block]:
        """All lines from `position` on. Raises: InputError for what is not text."""
        first, at = position or (0, None)
        for i in range(first, len(self.spans)):
            span = self.spans[i]
            begin = None  # where the first line is that is read here
            with open_text(span.path) as (text, file):
                for raw, start, line in _line_blocks(text, span, at if i == first and at else span.start):
                    begin = start if begin is None else begin
                    text_bytes = raw if start else raw.removeprefix(codecs.BOM_UTF8)
                    lines = self._decode(text_bytes, span.path, begin, line)
                    stop = start + len(raw)
                    yield Block(lines, (i, stop), len(raw), self._estimate(stop, file))
        if self.n_bad > SHOWN_WARNINGS:
            logger.warning("%d lines in all are not UTF-8", self.n_bad)

    def _estimate(self, at: int, file: BinaryIO) -> int | None:
        """The length of the text of all spans, if the rest compresses as well as the current file so far."""
        if self.spans[0].path == STDIN:
            return None
        known = sum(span.stop - span.start for span in self.spans if span.stop is not None)
        compressed = sum(_size(span.path) for span in self.spans if span.stop is None)
        return known + (int(compressed * at / file.tell()) if compressed else 0)

    def _decode(self, raw: bytes, path: str, begin: int, line: int) -> list[str]:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = "\n".join(self._decode_line(data, path, begin, line + i) for i, data in enumerate(raw.split(b"\n")))
        return [stripped for text_line in text.split("\n") if (stripped := text_line.strip())]

    def _decode_line(self, data: bytes, path: str, begin: int, line: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self.n_bad += 1
            if self.strict or self.n_bad <= SHOWN_WARNINGS:
                where = f"{path}, line {_lines_before(path, begin) + line}: not UTF-8 ({error.reason})"
                if self.strict:
                    raise InputError(f"{where}; fix it, or leave out --encoding_errors strict.") from None
                logger.warning("%s; replaced by U+FFFD", where)
            return data.decode("utf-8", "replace")


def _line_blocks(text: BinaryIO, span: Span, at: int) -> Iterator[tuple[bytes, int, int]]:
    """Whole lines of a span from byte `at` on: (lines, where they begin, number of the first, counting from 1)."""
    if at:
        text.seek(at - 1)
        at += len(text.readline()) - 1  # a line belongs to the span in which it begins
    rest, line = b"", 1  # `rest`: a line that is not read to its end
    while span.stop is None or at < span.stop:
        data = text.read(BLOCK)
        block = rest + data
        if not block:
            return
        if at == 0:
            check_is_text(block, span.path)
        end = block.rfind(b"\n") + 1 if data else len(block)
        if not end:
            if len(block) > MAX_LINE:
                raise InputError(
                    f"{span.path}: the line at byte {at} is longer than {MAX_LINE >> 20} MiB, but a line is to be one "
                    f"sequence; scripts/make_dump.py makes such lines."
                )
            rest = block
            continue
        if span.stop is not None and at + end > span.stop:
            last = block.find(b"\n", span.stop - 1 - at, end)  # the end of the last line that begins before
            end = last + 1 if last >= 0 else end
        block, rest = block[:end], block[end:]
        yield block, at, line
        at += end
        line += block.count(b"\n")


def check_is_text(start: bytes, path: str | Path) -> None:
    """Raises InputError if a file that starts with these bytes is not text in UTF-8, judging by LOOKED_AT bytes.

    A few wrong bytes, which old texts have, are left to the reader, which replaces them.
    """
    start = start[:LOOKED_AT]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
        raise InputError(f"{path} is not UTF-8 text, but binary or UTF-16 (`iconv -t utf-8` converts that).")
    if start.startswith(DOCUMENT_MARKS):
        raise InputError(f"{path} is not UTF-8 text, but a document; take the text out of it first (`pdftotext`).")
    control = sum(start.count(byte) for byte in CONTROL)
    wrong = start.decode("utf-8", "replace").count("\ufffd")
    if control + wrong > MAX_WRONG * len(start) + 3:  # the last character may be cut
        raise InputError(f"{path} is not UTF-8 text, but binary or of another encoding (see `iconv`).")


def _lines_before(path: str, position: int) -> int:
    """How many lines end before a byte of the uncompressed text."""
    n, left = 0, position
    if left:
        with open_text(path) as (text, _):
            while data := text.read(min(BLOCK, left)):
                n += data.count(b"\n")
                left -= len(data)
    return n
