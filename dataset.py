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
    footer    JSON (see `corpus.token_writer`), its crc32 and length, a magic word

Lists of arrays or of lists pickled by other tools load too, through an unpickler that knows lists, tuples, numbers and
numpy arrays and nothing else.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files.json_reader import parse_json
from files.paths import check_input_file
from files.plain_pickle import load_plain_pickle
from utils import InputError, RunError, logger

FORMAT = 1
MAGIC = b"DISTILTK"
TRAILER = struct.Struct("<IQ8s")  # crc32 of the JSON, its length, the magic word
ALIGNMENT = 64
CHUNK = 1 << 24  # bytes
UNPACKED, MANY_TOKENS = 100, 1 << 20  # a pickle of another tool may unpack to so many tokens a byte, or so many in all
SLOW_BYTES = 1 << 27  # of a pickle of another tool; such a one takes minutes to load
FOOTER = {
    "format": int, "tokenizer": str, "vocab_size": int, "vocab_hash": str, "special_ids": {...: (int, None)},
    "dtype": str, "n_sequences": int, "n_tokens": int, "tokens_at": int, "offsets_at": int,
    "crc32": {"tokens": int, "offsets": int},
}  # fmt: skip
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
            break  # cut short, so that the sum is another one
        crc = zlib.crc32(data, crc)
        start += len(data)
    return crc


# --------------------------------------------------------------------------------------------------------------- reader


class TokenFile:
    """A corpus of token sequences: `len(file)`, `file[i]`, and blocks of many.

    What is asked for is read in place, from the page cache that all processes of a machine share. It is not read
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


class TokensOnDisk(TokenFile):
    """A file of ours."""

    def __init__(self, path: Path, footer: dict) -> None:
        super().__init__(path, footer["n_sequences"], footer["n_tokens"])
        self.footer = footer
        self.made_by = {key: footer[key] for key in ("tokenizer", "vocab_size", "vocab_hash", "special_ids")}
        self.dtype = np.dtype(footer["dtype"])
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as the object)

    def __reduce__(self):
        return open_token_file, (self.path,)  # a copy for another process opens the file itself

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
        data = os.pread(self._file.fileno(), size, at + first * dtype.itemsize)
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
    return _load_list_pickle(path)


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


def _load_list_pickle(path: Path) -> TokensInMemory:
    if path.stat().st_size > SLOW_BYTES:
        logger.info("%s is a pickle of another tool: scripts/merge_data.py makes a file of it that opens at once", path)
    sequences = load_plain_pickle(path)
    if isinstance(sequences, np.ndarray):
        sequences = list(np.atleast_1d(sequences))  # its rows
    if not isinstance(sequences, (list, tuple)) or len(sequences) == 0:
        raise InputError(f"{path} holds no list of token sequences, but a {type(sequences).__name__}.")
    if not all(map(is_of_integers, sequences)):
        raise InputError(f"{path} holds a list, but not of 1-D sequences of token ids.")
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(list(map(len, sequences)), out=offsets[1:])
    if offsets[-1] > max(MANY_TOKENS, UNPACKED * path.stat().st_size):  # a pickle can name one sequence many times
        raise InputError(f"{path} was refused: its {path.stat().st_size:,} bytes unpack to {offsets[-1]:,} tokens.")
    arrays = [np.asarray(sequence) for sequence in sequences]
    if any(array.size and array.dtype.kind not in "iu" for array in arrays):  # a list of integers beyond 64 bits
        raise InputError(f"{path} holds numbers that are not token ids (they have more than 64 bits).")
    tokens = np.concatenate(arrays)
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max):
        raise InputError(f"{path} holds numbers that are not token ids ({tokens.min()} to {tokens.max()}).")
    return TokensInMemory(path, tokens.astype(token_dtype(int(tokens.max(initial=0)) + 1), copy=False), offsets)


def is_of_integers(sequence: object) -> bool:
    """Whether it is flat and of integers only. Copies nothing: a nested list can be far larger than its file."""
    if isinstance(sequence, np.ndarray):
        return sequence.ndim == 1 and (not sequence.size or sequence.dtype.kind in "iu")
    return isinstance(sequence, (list, tuple)) and all(
        issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, sequence))
    )


def count_per_sequence(is_counted: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n_sequences,) int64, how often the (n_tokens,) booleans are true in each sequence of a block."""
    positions = np.flatnonzero(is_counted)
    sequences = np.searchsorted(offsets - offsets[0], positions, side="right") - 1
    return np.bincount(sequences, minlength=len(offsets) - 1)
