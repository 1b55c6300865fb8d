"""Other tools' pickles: lists, tuples, numbers and numpy arrays, and nothing else.

A pickle is a program. Besides running code, a hostile one can have numpy follow a pointer of its choosing, or fill all
memory from a dozen bytes. So only the instructions that numbers, lists, tuples and numpy arrays need are run, and
numpy's functions are stand-ins that check what they are given.
"""

import mmap
import pickle
import pickletools
import re
import struct
from pathlib import Path
from typing import NoReturn

import numpy as np

from files.paths import check_input_file
from utils import InputError, reason_of

INSTRUCTIONS = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.PUT, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL,
    pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT,
    pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE,
    pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
    pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3,
)  # fmt: skip

UNPACKED, MANY_TOKENS = 100, 1 << 20  # a pickle of another tool may unpack to so many tokens a byte, or so many in all


class PlainDtype:
    """The stand-in for a dtype: numbers only, nothing that holds pointers."""

    def __init__(self, name: str, *_) -> None:
        if isinstance(name, str) and name.startswith("O"):
            raise InputError("it holds an array of objects; save a plain list of arrays instead")
        if not (isinstance(name, str) and re.fullmatch("[<>|=]?[biuf][1248]", name)):
            raise InputError("it holds an array of something else than numbers")
        self.dtype = np.dtype(name)

    def fill(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class PlainArray(np.ndarray):
    """An array that a pickle creates empty and fills with the next instruction."""

    filled = False

    def fill(self, state: tuple) -> None:
        _, shape, given, fortran, data = state
        if self.filled:
            raise InputError("it fills an array twice")
        array = array_of(data, given, shape, "F" if fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, bool(fortran), data))
        self.filled = True


def array_of(data: bytes, given: PlainDtype, shape: tuple, order: str) -> np.ndarray:
    """The stand-in for numpy's `_frombuffer`. Numpy checks that the data has the bytes that the shape needs."""
    if type(data) not in (bytes, bytearray) or type(given) is not PlainDtype:
        raise InputError("it holds an array whose data is not bytes")
    return np.frombuffer(data, given.dtype).reshape(shape, order=order)


def uncalled_ndarray(*_) -> NoReturn:
    """The stand-in for the type `numpy.ndarray`, which is only ever an argument of `_reconstruct`."""
    raise InputError("it calls numpy.ndarray, which can be given any part of the memory")


def empty_array(*_) -> PlainArray:
    """The stand-in for numpy's `_reconstruct`."""
    return PlainArray(0, "b")


def number_of(given: PlainDtype, data: bytes) -> np.generic:
    """The stand-in for numpy's `scalar`."""
    return array_of(data, given, (), "C")[()]


def latin1_bytes(text: str, encoding: str) -> bytes:
    """The stand-in for `_codecs.encode`, with which protocol 2 writes bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise InputError(f"it encodes text as {encoding!r}, which arrays don't need")
    return text.encode("latin1")


def empty_bytes() -> bytes:
    """The stand-in for `bytes`, which protocol 2 calls where an array is empty."""
    return b""


class Instructions(dict):
    """Code -> method."""

    def __missing__(self, code: int):
        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), None)
        if name:
            raise InputError(f"it has more in it than lists and arrays of numbers ({name})")
        raise ValueError(f"no pickle has the code {code}")


class PlainUnpickler(pickle._Unpickler):
    """Loads lists, tuples, numbers and numpy arrays of numbers, and refuses everything else.

    It is the unpickler that Python's library has in Python. The one in C can't leave out instructions, and reserves
    memory for any index that a file names; it is some ten times as fast.
    """

    NAMES = {
        ("numpy", "ndarray"): uncalled_ndarray,
        ("numpy", "dtype"): PlainDtype,
        ("_codecs", "encode"): latin1_bytes,
        ("__builtin__", "bytes"): empty_bytes,
    } | {
        (f"{package}.{module}", name): stand_in
        for package in ("numpy.core", "numpy._core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", empty_array),
            ("multiarray", "scalar", number_of),
            ("numeric", "_frombuffer", array_of),
        )
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.NAMES:
            raise InputError(f"it asks for {module}.{name}, which is not data; it could run code and was not loaded")
        return self.NAMES[module, name]

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (PlainArray, PlainDtype)):
            raise InputError("it gives a state to what has none")
        self.stack[-1].fill(state)

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch = Instructions({code[0]: pickle._Unpickler.dispatch[code[0]] for code in INSTRUCTIONS})
    dispatch |= {pickle.BUILD[0]: load_build, pickle.BYTEARRAY8[0]: load_bytearray8}


def load_plain_pickle(path: str | Path):
    """A pickle of lists, tuples, numbers and numpy arrays. Takes time and memory in proportion to its size.

    Raises: InputError if it is anything else.
    """
    check_input_file(path)
    with open(path, "rb") as file:
        try:
            # A map, unlike a file, never reserves more for a read than there is.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return PlainUnpickler(mapped).load()
        except InputError as error:
            raise InputError(f"{path} was refused: {error}.") from None
        except Exception as error:  # a pickle of garbage can raise nearly anything
            raise InputError(f"{path} is not a pickle, or cut short ({reason_of(error)}).") from None


def load_sequences(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A pickled list of sequences of token ids, as other tools write it.

    Returns: (n_tokens,) ids of all sequences; (n_sequences + 1,) int64, sequence i is ids[offsets[i] : offsets[i + 1]].

    Raises: InputError if it is anything else.
    """
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
    return tokens, offsets


def is_of_integers(sequence: object) -> bool:
    """Whether it is a flat list of integers. Copies nothing, since a nested list can be far larger than its file."""
    if isinstance(sequence, np.ndarray):
        return sequence.ndim == 1 and (not sequence.size or sequence.dtype.kind in "iu")
    return isinstance(sequence, (list, tuple)) and all(
        issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, sequence))
    )
