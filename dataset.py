"""The binarized corpus on disk: one file that is a pickle for everyone, and is read in place by the toolkit.

`pickle.load` on it returns a list of 1-D numpy arrays, one per sequence, with nothing but numpy installed. The toolkit
itself never unpickles it: behind the pickle's STOP opcode, where `pickle.load` stops reading, comes a footer that says
where the two buffers lie. The pickle is the program `numpy.split(numpy.frombuffer(tokens), numpy.frombuffer(offsets))`,
so the file looks like this:

    head      opcodes: numpy.split(numpy.frombuffer(
    tokens    n_tokens ids, uint16 or int32, little endian, aligned to 64 bytes
    middle    opcodes: ), numpy.frombuffer(
    offsets   n_sequences + 1 int64: sequence i is tokens[offsets[i] : offsets[i + 1]]
    tail      opcodes: , offsets[1:-1]))  STOP
    footer    JSON (see `FOOTER`), its crc32 and length, a magic word

Lists of arrays or of lists pickled by other tools load too, through an unpickler that knows lists, tuples, numbers and
numpy arrays and nothing else.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files.atomic import fsync_folder, lock, write_json
from files.json_reader import parse_json, read_json
from files.paths import check_input_file
from files.plain_pickle import load_sequences
from utils import InputError, RunError, logger

FORMAT = 1
MAGIC = b"DISTILTK"
TRAILER = struct.Struct("<IQ8s")  # crc32 of the JSON, its length, the magic word
ALIGNMENT = 64
CHUNK = 1 << 24  # bytes
SLOW_BYTES = 1 << 27  # of a pickle of another tool; such a one takes minutes to load
FOOTER = {
    "format": int, "tokenizer": str, "vocab_size": int, "vocab_hash": str, "special_ids": {...: (int, None)},
    "dtype": str, "n_sequences": int, "n_tokens": int, "tokens_at": int, "offsets_at": int,
    "crc32": {"tokens": int, "offsets": int},
}  # fmt: skip
PROGRESS = "progress.json"  # in the folder of an unfinished file
STATE = {
    "made_by": dict,
    "n_sequences": int,
    "n_tokens": int,
    "crc32": {"tokens": int, "offsets": int},
    "progress": dict,
}
BLOCK_TOKENS, BLOCK_SEQUENCES = 1 << 22, 1 << 18  # at most so many of either are looked at together


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


# --------------------------------------------------------------------------------------------------------------- layout
#
# The opcodes are written by hand, since a pickler could not write a buffer of unknown length as a stream. Each function
# returns the bytes of one part of the layout above; the names in the comments are those of the module `pickletools`.


def head(tokens_bytes: int) -> bytes:
    """What comes before the tokens. Its length does not depend on their number, which is known only at the end."""
    start = b"\x80\x04" + b"cnumpy\nsplit\n" + b"cnumpy\nfrombuffer\n"  # PROTO 4, two GLOBALs
    return start + _padding(len(start)) + _buffer_header(tokens_bytes)


def middle(position: int, dtype: np.dtype, offsets_bytes: int) -> bytes:
    """What comes between the tokens, which end at `position`, and the offsets."""
    start = _text(dtype.str.encode()) + b"\x86R" + b"cnumpy\nfrombuffer\n" + b"("  # TUPLE2 REDUCE, GLOBAL, MARK
    return start + _padding(position + len(start)) + _buffer_header(offsets_bytes)


def tail(n_sequences: int) -> bytes:
    """What comes after the offsets. `numpy.split` wants the inner ones: all but the first and the last."""
    count = b"\x8a\x08" + struct.pack("<q", n_sequences - 1)  # LONG1
    skip = b"K\x08"  # BININT1
    return _text(b"<i8") + count + skip + b"tR" + b"\x86R" + b"."  # TUPLE REDUCE, TUPLE2 REDUCE, STOP


def _text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value  # BINUNICODE


def _padding(position: int) -> bytes:
    """A string that is pushed and popped, so that the buffer after it and its 9-byte header starts aligned."""
    empty = len(_text(b"") + b"0")
    return _text(b" " * (-(position + empty + 9) % ALIGNMENT)) + b"0"  # POP


def _buffer_header(n_bytes: int) -> bytes:
    return b"\x8e" + struct.pack("<Q", n_bytes)  # BINBYTES8


def partial_folder(path: str | Path) -> Path:
    """Where a file lies until it is finished."""
    return Path(f"{path}.partial")


def crc_of_file(file: BinaryIO, start: int, stop: int) -> int:
    """Of the bytes from `start` to `stop`, read chunk by chunk."""
    crc = 0
    file.seek(start)
    while start < stop:
        data = file.read(min(CHUNK, stop - start))
        if not data:
            break  # cut short, so the checksum differs
        crc = zlib.crc32(data, crc)
        start += len(data)
    return crc


# --------------------------------------------------------------------------------------------------------------- reader


class TokenFile:
    """A corpus of token sequences: `len(file)`, `file[i]`, and blocks of many.

    Reads go to the page cache, which all processes of a machine share. It is not read
    through a map, which would count every page touched, and those around it, to each process; and a file cut short
    under a running process is an error here, where a map would kill the process. For other uses, `tokens` and `offsets`
    are maps.

    Attributes:
        path: the file on disk.
        n_tokens: of all sequences.
        made_by: the description of the tokenizer that made it (`describe_tokenizer`); None for files of other tools.
    """

    def __init__(self, path: Path, n_sequences: int, n_tokens: int) -> None:
        self.path, self._n_sequences, self.n_tokens = path, n_sequences, n_tokens
        self.made_by: dict | None = None

    def __len__(self) -> int:
        return self._n_sequences

    def __getitem__(self, i: int) -> np.ndarray:
        """(length,) ids."""
        start, stop = self.read_offsets(range(len(self))[i], 2)
        return self.read(start, stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) ids, those of sequence i from offset i to offset i + 1."""
        raise NotImplementedError

    def read_offsets(self, first: int, n: int) -> np.ndarray:
        """(n,) int64, where sequences `first` and following begin; the last but one offset ends the last sequence."""
        raise NotImplementedError

    def blocks(self, tokens: bool = True) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """All sequences, some million tokens at a time.

        Yields: number of the first sequence; (n + 1,) int64 offsets of n sequences; their ids, if `tokens`.
        """
        first = 0
        while first < len(self):
            offsets = self.read_offsets(first, min(BLOCK_SEQUENCES, len(self) - first) + 1)
            n = max(1, int(np.searchsorted(offsets, offsets[0] + BLOCK_TOKENS, "right")) - 1)
            offsets = offsets[: n + 1]
            yield first, offsets, self.read(offsets[0], offsets[-1]) if tokens else None
            first += n

    def verify(self) -> None:
        """Raises InputError if a single bit has changed since the file was written (if it is ours)."""


class TokensInMemory(TokenFile):
    """Sequences that are not a file of ours: a pickle of another tool, or a selection."""

    def __init__(self, path: Path, tokens: np.ndarray, offsets: np.ndarray) -> None:
        super().__init__(path, len(offsets) - 1, len(tokens))
        self.tokens, self.offsets = tokens, offsets

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def read_offsets(self, first: int, n: int) -> np.ndarray:
        return self.offsets[first : first + n]

    @property
    def crc(self) -> int:
        return zlib.crc32(self.tokens)


@functools.lru_cache(maxsize=256)
def _handle(path: Path, identity: tuple[int, int, int]) -> BinaryIO:
    """A file, open for reading. Of a corpus of a thousand files only those used last stay open: a process may not open
    many more. (A handle that is pushed out closes when its last reader is done.)

    Args:
        identity: the file's when it was opened first, as `_identity` gives it.
    """
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as someone holds it)
    if _identity(os.fstat(file.fileno())) != identity:
        raise RunError(f"{path} was replaced or cut short while it was in use; copy it again, then use --resume.")
    return file


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class TokensOnDisk(TokenFile):
    """A file of ours."""

    def __init__(self, path: Path, footer: dict) -> None:
        super().__init__(path, footer["n_sequences"], footer["n_tokens"])
        self.footer = footer
        self.made_by = {key: footer[key] for key in ("tokenizer", "vocab_size", "vocab_hash", "special_ids")}
        self.dtype = np.dtype(footer["dtype"])
        self._identity = _identity(path.stat())
        _handle(path, self._identity)  # so that a few files outlive their removal

    def __reduce__(self):
        return open_token_file, (self.path,)  # a copy for another process opens the file itself

    @property
    def _file(self) -> BinaryIO:
        return _handle(self.path, self._identity)

    @property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) ids, mapped."""
        return np.memmap(self._file, self.dtype, "r", self.footer["tokens_at"], self.n_tokens)

    @property
    def offsets(self) -> np.ndarray:
        """(n_sequences + 1,) int64, mapped; sequence i is tokens[offsets[i] : offsets[i + 1]]."""
        return np.memmap(self._file, "<i8", "r", self.footer["offsets_at"], len(self) + 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._read(self.footer["tokens_at"], self.dtype, int(start), int(stop - start))

    def read_offsets(self, first: int, n: int) -> np.ndarray:
        return self._read(self.footer["offsets_at"], np.dtype("<i8"), first, n)

    def _read(self, at: int, dtype: np.dtype, first: int, n: int) -> np.ndarray:
        size = n * dtype.itemsize
        file = self._file
        data = os.pread(file.fileno(), size, at + first * dtype.itemsize)
        if len(data) != size:
            raise RunError(f"{self.path} was cut short while it was in use; copy it again, and continue with --resume.")
        return np.frombuffer(data, dtype)

    @property
    def crc(self) -> int:
        return self.footer["crc32"]["tokens"]

    def verify(self) -> None:
        tokens_at, offsets_at = self.footer["tokens_at"], self.footer["offsets_at"]
        ends = {"tokens": tokens_at + self.n_tokens * self.dtype.itemsize, "offsets": offsets_at + 8 * (len(self) + 1)}
        for name, start in (("tokens", tokens_at), ("offsets", offsets_at)):
            if crc_of_file(self._file, start, ends[name]) != self.footer["crc32"][name]:
                raise InputError(
                    f"{self.path} is damaged: the checksum of its {name} does not match; copy or binarize it again."
                )


def open_token_file(path: str | Path) -> TokenFile:
    """Opens a binarized corpus: ours in milliseconds whatever its size, another tool's by loading it whole.

    Raises: InputError if it is missing, empty, cut short, or no pickled list of token sequences.
    """
    path = Path(path)
    if not path.exists():
        unfinished = f"; {partial_folder(path)} holds an unfinished one" if partial_folder(path).exists() else ""
        raise InputError(f"{path} does not exist{unfinished}; scripts/binarized_data.py makes it from a text file.")
    check_input_file(path)
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty; make it again with scripts/binarized_data.py.")
    with open(path, "rb") as file:
        start = file.read(len(head(0)))
        file.seek(max(0, size - TRAILER.size))
        end = file.read()
    ours = start.startswith(head(0)[:-8])  # all but the number of token bytes
    if end.endswith(MAGIC):
        return TokensOnDisk(path, _read_footer(path, size))
    if ours:
        raise InputError(f"{path} is cut short: its end is missing; copy or binarize it again.")
    if size > SLOW_BYTES:
        logger.info("%s is a pickle of another tool: scripts/merge_data.py makes it a file that opens at once", path)
    tokens, offsets = load_sequences(path)
    return TokensInMemory(path, tokens.astype(token_dtype(int(tokens.max(initial=0)) + 1), copy=False), offsets)


def _read_footer(path: Path, size: int) -> dict:
    damaged = InputError(f"{path} is damaged: its parts do not fit together; copy or binarize it again.")
    with open(path, "rb") as file:

        def read(at: int, n: int) -> bytes:
            file.seek(at)
            return file.read(n)

        crc, length, _ = TRAILER.unpack(read(size - TRAILER.size, TRAILER.size))
        footer_at = size - TRAILER.size - length
        data = read(footer_at, length) if footer_at > 0 else b""
        if not data or zlib.crc32(data) != crc:
            raise damaged
        footer = parse_json(data, f"the footer of {path}", FOOTER, "binarize it again")
        if footer["format"] != FORMAT:
            raise InputError(f"{path} is of format {footer['format']}, this toolkit reads {FORMAT}; binarize it again.")
        dtype = np.dtype(footer["dtype"])
        n_tokens, n_sequences = footer["n_tokens"], footer["n_sequences"]
        tokens_at, offsets_at = footer["tokens_at"], footer["offsets_at"]
        tokens_bytes, offsets_bytes = n_tokens * dtype.itemsize, (n_sequences + 1) * 8
        tokens_end, offsets_end = tokens_at + tokens_bytes, offsets_at + offsets_bytes
        if not tokens_end <= offsets_at <= offsets_end <= footer_at:
            raise damaged
        # The opcodes around the buffers follow from the footer, so every byte outside the buffers is checked here.
        if (
            read(0, tokens_at) != head(tokens_bytes)
            or read(tokens_end, offsets_at - tokens_end) != middle(tokens_end, dtype, offsets_bytes)
            or read(offsets_end, footer_at - offsets_end) != tail(n_sequences)
            or read(offsets_at, 8) != bytes(8)
            or read(offsets_end - 8, 8) != struct.pack("<q", n_tokens)
        ):
            raise damaged
    return footer


def count_per_sequence(is_counted: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n_sequences,) int64, how often the (n_tokens,) booleans are true in each sequence of a block."""
    positions = np.flatnonzero(is_counted)
    sequences = np.searchsorted(offsets - offsets[0], positions, side="right") - 1
    return np.bincount(sequences, minlength=len(offsets) - 1)


# --------------------------------------------------------------------------------------------------------------- writer


@contextlib.contextmanager
def write_token_file(path: str | Path, made_by: dict, resume: bool = False) -> Iterator["TokenFileWriter"]:
    """Opens a file for writing that appears under its name when the `with` block ends without an error.

    Memory does not grow with it: tokens and offsets go straight to the folder `<path>.partial`. What was written up to
    a call of the writer's `checkpoint` outlives any end of the process. The finished bytes depend on the sequences and
    the tokenizer alone, not on how often the writing was interrupted.

    Args:
        path: the file to make.
        made_by: the description of the tokenizer (`describe_tokenizer`).
        resume: continue from the last checkpoint, if there is one; otherwise start over.

    Raises:
        InputError: the file can't be written there; another process is writing it; the unfinished file is damaged.
        RunError: no room is left on the disk.
    """
    writer = TokenFileWriter(Path(path), made_by, resume)
    try:
        yield writer
        writer.finish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"no room is left on the disk for {path}; make room, then continue.") from None
    finally:
        writer.close()


class TokenFileWriter:
    """See `write_token_file`, which makes and ends it.

    Attributes:
        progress: what the last `checkpoint` was given, if the writing is resumed; otherwise None.
        n_sequences, n_tokens: written so far.
    """

    def __init__(self, path: Path, made_by: dict, resume: bool) -> None:
        self.path, self.made_by = path, made_by
        self.folder = partial_folder(path)
        self.dtype = token_dtype(made_by["vocab_size"])
        self.n_sequences = self.n_tokens = 0
        self.progress: dict | None = None
        self._crc = {"tokens": 0, "offsets": 0}
        if path.is_dir():
            raise InputError(f"{path} is a folder; give another name for the file to make.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file, self._offsets = (self._open(name) for name in ("tokens", "offsets"))
        except OSError as error:
            raise InputError(f"{path} can't be written ({error.strerror}); choose another place.") from None
        lock(self._file, path)
        if resume and self.has_checkpoint:
            self._continue()
            return
        if self.has_checkpoint:
            logger.info("starting over: discarding what an interrupted run left in %s", self.folder)
        self._begin()

    def _open(self, name: str) -> BinaryIO:
        return os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # empties nothing

    @property
    def has_checkpoint(self) -> bool:
        return (self.folder / PROGRESS).is_file()

    def _begin(self) -> None:
        (self.folder / PROGRESS).unlink(missing_ok=True)
        for file in (self._file, self._offsets):
            file.truncate(0)
        self._file.write(head(0))
        self._write_offsets(np.zeros(1, "<i8"))

    def _continue(self) -> None:
        state = read_json(self.folder / PROGRESS, STATE, "start over without --resume", "--resume:")
        self.n_sequences, self.n_tokens, self._crc = state["n_sequences"], state["n_tokens"], state["crc32"]
        self.progress = state["progress"]
        if state["made_by"] != self.made_by:
            raise InputError(f"--resume: {self.folder} was made with another tokenizer; leave out --resume.")
        begin = {"tokens": len(head(0)), "offsets": 0}
        end = {"tokens": begin["tokens"] + self.n_tokens * self.dtype.itemsize, "offsets": (self.n_sequences + 1) * 8}
        for name, file in (("tokens", self._file), ("offsets", self._offsets)):
            if file.seek(0, os.SEEK_END) < end[name] or crc_of_file(file, begin[name], end[name]) != self._crc[name]:
                raise InputError(f"--resume: {self.folder / name} is damaged; start over without --resume.")
            file.truncate(end[name])
            file.seek(end[name])

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Adds `len(lengths)` sequences whose ids follow one another in `ids`, (sum(lengths),) integers."""
        assert ids.size == lengths.sum()
        if ids.size and not (ids.min() >= 0 and ids.max() < self.made_by["vocab_size"]):
            raise InputError(
                f"{self.path}: token ids run from {ids.min()} to {ids.max()}, "
                f"but the vocabulary has {self.made_by['vocab_size']} entries."
            )
        data = np.ascontiguousarray(ids, self.dtype)
        self._file.write(data)
        self._crc["tokens"] = zlib.crc32(data, self._crc["tokens"])
        self._write_offsets(self.n_tokens + np.cumsum(lengths, dtype="<i8"))
        self.n_tokens += ids.size
        self.n_sequences += len(lengths)

    def _write_offsets(self, offsets: np.ndarray) -> None:
        self._offsets.write(offsets)
        self._crc["offsets"] = zlib.crc32(offsets, self._crc["offsets"])

    def checkpoint(self, progress: dict) -> None:
        """Makes sure that writing can continue from here; `progress` is for the caller to know where that is."""
        for file in (self._file, self._offsets):
            file.flush()
            os.fsync(file.fileno())
        state = {"made_by": self.made_by, "n_sequences": self.n_sequences, "n_tokens": self.n_tokens}
        write_json(self.folder / PROGRESS, {**state, "crc32": self._crc, "progress": progress})

    def finish(self) -> None:
        """Puts the parts together under the file's name: the tokens lie already behind a head of the right length."""
        if self.n_sequences == 0:
            raise InputError(f"{self.path} was not written: there is no sequence to put into it.")
        file, tokens_bytes = self._file, self.n_tokens * self.dtype.itemsize
        offsets_bytes = (self.n_sequences + 1) * 8
        tokens_at = len(head(0))
        file.write(middle(tokens_at + tokens_bytes, self.dtype, offsets_bytes))
        offsets_at = file.tell()
        self._offsets.seek(0)
        shutil.copyfileobj(self._offsets, file, CHUNK)
        file.write(tail(self.n_sequences))
        footer = {
            "format": FORMAT,
            **self.made_by,
            "dtype": self.dtype.str,
            "n_sequences": self.n_sequences,
            "n_tokens": self.n_tokens,
            "tokens_at": tokens_at,
            "offsets_at": offsets_at,
            "crc32": self._crc,
        }
        data = json.dumps(footer).encode()
        file.write(data + TRAILER.pack(zlib.crc32(data), len(data), MAGIC))
        file.seek(0)
        file.write(head(tokens_bytes))  # the length is known only now
        file.flush()
        os.fsync(file.fileno())
        os.replace(self.folder / "tokens", self.path)
        fsync_folder(self.path.parent)

    def close(self) -> None:
        for file in (self._file, self._offsets):
            with contextlib.suppress(
                OSError
            ):  # the last flush hits the full disk again, which we have already reported
                file.close()
        if self.has_checkpoint and is_unfinished(self.path):
            logger.warning("unfinished: what is done lies in %s, and --resume continues from there", self.folder)
        else:
            shutil.rmtree(self.folder)


def is_unfinished(path: str | Path) -> bool:
    """Whether the writing of this file was begun and interrupted."""
    return (partial_folder(path) / "tokens").exists()
