"""The binarized corpus on disk: one file that is both a pickle for everyone and a memory map for us.

`pickle.load` on it returns a list of 1-D numpy arrays, one per sequence, with nothing but numpy installed. The toolkit
itself never unpickles it: behind the pickle's STOP opcode, where `pickle.load` stops reading, stands a footer that says
where the two buffers lie. The layout:

    head      pickle opcodes: numpy.split(numpy.frombuffer(
    tokens    n_tokens ids, uint16 or int32, little endian, aligned to 64 bytes
    middle    ), numpy.frombuffer(
    offsets   n_sequences + 1 int64: sequence i is tokens[offsets[i] : offsets[i + 1]]
    tail      , offsets[1:-1]))  STOP
    footer    JSON (see `TokenFileWriter`), its crc32 and length, a magic word

Lists of arrays or of lists pickled by other tools load too, through an unpickler that knows numpy arrays and plain
containers and nothing else.
"""

import contextlib
import hashlib
import json
import pickle
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

from utils import InputError, atomic_write, why_not_loaded

FORMAT = 1
MAGIC = b"DISTILTK"
TRAILER = struct.Struct("<IQ8s")  # crc32 of the JSON, its length, the magic word
ALIGNMENT = 64
CHUNK = 1 << 24  # bytes
SPECIAL_TOKENS = ("unk", "sep", "pad", "cls", "mask", "bos", "eos")


# ------------------------------------------------------------------------------------------------ what the tokenizer is


def load_tokenizer(name: str):
    """The tokenizer of a hub name or folder. Raises: InputError if there is none."""
    from transformers import AutoTokenizer  # seconds to import, and not needed to read files

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = why_not_loaded(name, error)
        raise InputError(f"no tokenizer in {name} ({reason}); name one with --tokenizer_name.") from None


def describe_tokenizer(tokenizer) -> dict:
    """What a file must remember of the tokenizer that made it: name, size, special ids, a hash of the vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer": tokenizer_short_name(tokenizer.name_or_path),
        "vocab_size": len(tokenizer),
        "vocab_hash": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16],
        "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS},
    }


def tokenizer_short_name(name: str) -> str:
    """The last component of a hub name or path: `org/bert` and `/models/bert/` both give `bert`."""
    return Path(name).name


def boundary_ids(special_ids: dict) -> tuple[int, int]:
    """The ids that begin and end every sequence: [CLS] and [SEP], or for GPT-2 <|endoftext|> twice."""
    begin = special_ids["cls"] if special_ids["cls"] is not None else special_ids["bos"]
    end = special_ids["sep"] if special_ids["sep"] is not None else special_ids["eos"]
    if begin is None or end is None:
        raise InputError("this tokenizer has neither [CLS]/[SEP] nor bos/eos tokens to put around a sequence.")
    return begin, end


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


# ------------------------------------------------------------------------------------------------------- pickle opcodes


def _text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value  # BINUNICODE


def _padding(position: int) -> bytes:
    """A string that is pushed and popped, so that the buffer after it and its 9-byte header starts aligned."""
    empty = len(_text(b"") + b"0")
    return _text(b" " * (-(position + empty + 9) % ALIGNMENT)) + b"0"


def _buffer_header(n_bytes: int) -> bytes:
    return b"\x8e" + struct.pack("<Q", n_bytes)  # BINBYTES8


def _head(tokens_bytes: int) -> bytes:
    start = b"\x80\x04" + b"cnumpy\nsplit\n" + b"cnumpy\nfrombuffer\n"  # PROTO 4, two GLOBALs
    return start + _padding(len(start)) + _buffer_header(tokens_bytes)


def _middle(position: int, dtype: np.dtype, offsets_bytes: int) -> bytes:
    start = _text(dtype.str.encode()) + b"\x86R" + b"cnumpy\nfrombuffer\n" + b"("  # TUPLE2 REDUCE, GLOBAL, MARK
    return start + _padding(position + len(start)) + _buffer_header(offsets_bytes)


def _tail(n_sequences: int) -> bytes:
    count = b"\x8a\x08" + struct.pack("<q", n_sequences - 1)  # LONG1
    skip = b"K\x08"  # BININT1: leave out the first offset, 8 bytes
    return _text(b"<i8") + count + skip + b"tR" + b"\x86R" + b"."  # TUPLE REDUCE, TUPLE2 REDUCE, STOP


# --------------------------------------------------------------------------------------------------------------- writer


class TokenFileWriter(contextlib.AbstractContextManager):
    """Writes a binarized file as a stream; it appears under its name when the `with` block ends without an error.

    Memory does not grow with the text: tokens go straight to a temporary file beside `path`, offsets to a second one.

    Args:
        path: the file to make.
        tokenizer: what `describe_tokenizer` returns.
    """

    def __init__(self, path: str | Path, tokenizer: dict) -> None:
        self.path, self.tokenizer = Path(path), tokenizer
        self.dtype = token_dtype(tokenizer["vocab_size"])
        self.n_sequences = self.n_tokens = 0
        self._crc = {"tokens": 0, "offsets": 0}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "TokenFileWriter":
        self._file = self._stack.enter_context(atomic_write(self.path))
        self._offsets = self._stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
        self._file.write(_head(0))
        self._write_offsets(np.zeros(1, "<i8"))
        return self

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Adds `len(lengths)` sequences whose ids stand one after the other in `ids`, (sum(lengths),) integers."""
        assert ids.size == lengths.sum()
        if ids.size and not (ids.min() >= 0 and ids.max() < self.tokenizer["vocab_size"]):
            raise InputError(
                f"{self.path}: token ids run from {ids.min()} to {ids.max()}, "
                f"but the vocabulary has {self.tokenizer['vocab_size']} entries."
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

    def _finish(self) -> None:
        file, tokens_bytes = self._file, self.n_tokens * self.dtype.itemsize
        offsets_bytes = (self.n_sequences + 1) * 8
        tokens_at = len(_head(0))
        file.write(_middle(tokens_at + tokens_bytes, self.dtype, offsets_bytes))
        offsets_at = file.tell()
        self._offsets.seek(0)
        shutil.copyfileobj(self._offsets, file, CHUNK)
        file.write(_tail(self.n_sequences))
        footer = {
            "format": FORMAT,
            **self.tokenizer,
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
        file.write(_head(tokens_bytes))  # the length is known only now

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            if self.n_sequences == 0:
                raise InputError(f"{self.path} was not written: there is not one sequence to put into it.")
            self._finish()


# --------------------------------------------------------------------------------------------------------------- reader


class TokenFile:
    """A corpus of token sequences: `len(file)`, `file[i]`, and the two flat arrays beneath.

    Attributes:
        path: the file on disk.
        tokens: (n_tokens,) ids; a memory map, or an array for files of other tools.
        offsets: (n_sequences + 1,) int64; sequence i is tokens[offsets[i] : offsets[i + 1]].
        tokenizer: what `describe_tokenizer` said when the file was made; None for files of other tools.
    """

    def __init__(self, path: Path, tokens: np.ndarray, offsets: np.ndarray, footer: dict | None = None) -> None:
        self.path, self.tokens, self.offsets, self.footer = path, tokens, offsets, footer
        keys = ("tokenizer", "vocab_size", "vocab_hash", "special_ids")
        self.tokenizer = {key: footer[key] for key in keys} if footer else None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @property
    def identity(self) -> dict:
        """Tells this corpus from another one: its size and the checksum of its tokens."""
        crc = self.footer["crc32"]["tokens"] if self.footer else zlib.crc32(self.tokens)
        return {"sequences": len(self), "tokens": len(self.tokens), "crc32": crc}

    def verify(self) -> None:
        """Reads everything once (some GB/s) and raises InputError if a single bit has changed since it was written."""
        if self.footer is None:
            return
        for name, array in (("tokens", self.tokens), ("offsets", self.offsets)):
            crc, step = 0, CHUNK // array.itemsize
            for start in range(0, len(array), step):
                crc = zlib.crc32(array[start : start + step], crc)
            if crc != self.footer["crc32"][name]:
                raise InputError(
                    f"{self.path} is damaged: the checksum of its {name} does not match; copy or binarize it again."
                )


def open_token_file(path: str | Path) -> TokenFile:
    """Opens a binarized corpus: ours in milliseconds whatever its size, another tool's by loading it whole.

    Raises: InputError if it is missing, empty, cut short, or no pickled list of token sequences.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; scripts/binarized_data.py makes it from a text file.")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file of binarized text.")
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty; make it again with scripts/binarized_data.py.")
    with open(path, "rb") as file:
        start = file.read(len(_head(0)))
        file.seek(max(0, size - TRAILER.size))
        end = file.read()
    ours = start.startswith(_head(0)[:-8])  # all but the number of token bytes
    if end.endswith(MAGIC):
        return _open_mapped(path, size)
    if ours:
        raise InputError(f"{path} is cut short: its end is missing; copy or binarize it again.")
    return _load_list_pickle(path)


def _open_mapped(path: Path, size: int) -> TokenFile:
    damaged = InputError(f"{path} is damaged: its parts do not fit together; copy or binarize it again.")
    with open(path, "rb") as file:

        def read(at: int, n: int) -> bytes:
            file.seek(at)
            return file.read(n)

        crc, length, _ = TRAILER.unpack(read(size - TRAILER.size, TRAILER.size))
        footer_at = size - TRAILER.size - length
        data = read(footer_at, length) if footer_at > 0 else b""
        if zlib.crc32(data) != crc:
            raise damaged
        footer = json.loads(data)
        if footer["format"] != FORMAT:
            raise InputError(f"{path} is of format {footer['format']}, this toolkit reads {FORMAT}; binarize it again.")
        dtype = np.dtype(footer["dtype"])
        n_tokens, n_sequences = footer["n_tokens"], footer["n_sequences"]
        tokens_at, offsets_at = footer["tokens_at"], footer["offsets_at"]
        tokens_bytes, offsets_bytes = n_tokens * dtype.itemsize, (n_sequences + 1) * 8
        tokens_end, offsets_end = tokens_at + tokens_bytes, offsets_at + offsets_bytes
        # The opcodes around the buffers follow from the footer, so every byte outside the buffers is checked here.
        if (
            read(0, tokens_at) != _head(tokens_bytes)
            or read(tokens_end, offsets_at - tokens_end) != _middle(tokens_end, dtype, offsets_bytes)
            or read(offsets_end, footer_at - offsets_end) != _tail(n_sequences)
        ):
            raise damaged
    tokens = np.memmap(path, dtype, "r", tokens_at, n_tokens)
    offsets = np.memmap(path, "<i8", "r", offsets_at, n_sequences + 1)
    if offsets[0] != 0 or offsets[-1] != n_tokens:
        raise damaged
    return TokenFile(path, tokens, offsets, footer)


# ----------------------------------------------------------------------------------------------- pickles of other tools


class RestrictedUnpickler(pickle.Unpickler):
    """Loads plain containers, numbers and numpy arrays; refuses every other name, so that no code can run."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how protocol 2 writes bytes
    } | {
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (
            (f"{package}.multiarray", "_reconstruct"),
            (f"{package}.multiarray", "scalar"),
            (f"{package}.numeric", "_frombuffer"),
        )
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise InputError(f"it asks for {module}.{name}, which is not data; it could run code and was not loaded")
        return super().find_class(module, name)


def load_plain_pickle(path: str | Path):
    """A pickle of plain containers, numbers and numpy arrays. Raises: InputError if it is anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file.")
    with open(path, "rb") as file:
        try:
            return RestrictedUnpickler(file).load()
        except InputError as error:
            raise InputError(f"{path} was refused: {error}.") from None
        except Exception as error:  # a pickle of garbage can raise nearly anything
            raise InputError(f"{path} is not a pickle, or cut short ({type(error).__name__}: {error}).") from None


def _load_list_pickle(path: Path) -> TokenFile:
    sequences = load_plain_pickle(path)
    if not isinstance(sequences, (list, tuple, np.ndarray)) or len(sequences) == 0:
        raise InputError(f"{path} holds no list of token sequences, but a {type(sequences).__name__}.")
    try:
        arrays = [np.asarray(sequence) for sequence in sequences]
    except ValueError:  # ragged
        arrays = [np.asarray("ragged")]
    if any(array.ndim != 1 or (array.size and array.dtype.kind not in "iu") for array in arrays):
        raise InputError(f"{path} holds a list, but not of 1-D sequences of token ids.")
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([array.size for array in arrays], out=offsets[1:])
    tokens = np.concatenate(arrays)
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max):
        raise InputError(f"{path} holds numbers that are no token ids ({tokens.min()} to {tokens.max()}).")
    return TokenFile(path, tokens.astype(token_dtype(int(tokens.max(initial=0)) + 1)), offsets)


# --------------------------------------------------------------------------------------------------------------- counts


def count_tokens(file: TokenFile, vocab_size: int) -> np.ndarray:
    """(vocab_size,) int64 occurrences of each token in a corpus, block by block from the memory map.

    Raises: InputError if an id lies outside the vocabulary.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(file.tokens), CHUNK):
        found = np.bincount(file.tokens[start : start + CHUNK], minlength=vocab_size)
        if len(found) > vocab_size:
            raise InputError(
                f"{file.path}: it holds token id {len(found) - 1}, but the vocabulary has only {vocab_size} entries; "
                f"was it binarized with another tokenizer?"
            )
        counts += found
    return counts


def load_token_counts(path: str | Path, vocab_size: int) -> np.ndarray:
    """(vocab_size,) int64 occurrences of each token. Raises: InputError if they are of another vocabulary."""
    counts = load_plain_pickle(path)
    if not isinstance(counts, (list, np.ndarray)) or np.asarray(counts).ndim != 1:
        raise InputError(f"{path} holds no list of counts, one per token; scripts/token_counts.py makes one.")
    counts = np.asarray(counts)
    if counts.dtype.kind not in "iu" or (counts.size and counts.min() < 0):
        raise InputError(f"{path} holds something other than counts; scripts/token_counts.py makes them.")
    if len(counts) != vocab_size:
        raise InputError(
            f"{path} counts a vocabulary of {len(counts)} tokens, but the tokenizer has {vocab_size}; "
            f"make it again with scripts/token_counts.py from this run's data file."
        )
    return counts.astype(np.int64)
