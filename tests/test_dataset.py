"""The file on disk: a pickle for everyone, read in place by us, and refused where anything is wrong."""

import os
import pickle
import sys
import tempfile

import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
from corpora import write
from hypothesis import given, settings
from processes import run_command

from dataset import open_token_file, write_token_file
from files.plain_pickle import load_plain_pickle
from utils import InputError

MADE_BY = {"tokenizer": "some", "vocab_size": 30522, "vocab_hash": "0", "special_ids": {"cls": 101, "sep": 102}}


@pytest.fixture
def sequences():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 30522, n) for n in generator.integers(2, 60, 50)]


@pytest.fixture
def path(tmp_path, sequences):
    return write(tmp_path / "text.pickle", sequences, MADE_BY)


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("vocab_size, dtype", [(30522, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_the_file_is_a_pickled_list_and_a_memory_map(tmp_path, sequences, n, vocab_size, dtype):
    path = tmp_path / "x.pickle"
    write(path, sequences[:n], {**MADE_BY, "vocab_size": vocab_size})
    with open(path, "rb") as file:
        unpickled = pickle.load(file)
    mapped = open_token_file(path)
    mapped.verify()
    assert isinstance(unpickled, list)
    assert len(unpickled) == len(mapped) == n
    assert isinstance(mapped.tokens, np.memmap)
    for i in range(n):
        assert unpickled[i].dtype == mapped[i].dtype == dtype
        assert np.array_equal(unpickled[i], sequences[i])
        assert np.array_equal(mapped[i], sequences[i])


def test_numpy_alone_reads_it(path):
    code = f"""
import pickle, sys
sequences = pickle.load(open({str(path)!r}, "rb"))
assert not any(name.split(".")[0] in ("torch", "transformers", "dataset") for name in sys.modules)
print(len(sequences), sequences[0].ndim)"""
    out = run_command([sys.executable, "-c", code], cwd="/")
    assert out.stdout.split() == ["50", "1"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(path, sequences):
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), write_token_file(path, MADE_BY) as writer:
        writer.append(sequences[0], np.array([len(sequences[0])]))
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_nothing_to_write_and_ids_outside_the_vocabulary_are_errors(tmp_path):
    with pytest.raises(InputError, match="there is no sequence"), write_token_file(tmp_path / "x", MADE_BY):
        pass
    with pytest.raises(InputError, match="30522"), write_token_file(tmp_path / "x", MADE_BY) as writer:
        writer.append(np.array([1, 70000]), np.array([2]))
    assert not os.listdir(tmp_path)


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for n in sorted({0, 1, 10, 60, 64, 65, 500, *range(len(whole) - 700, len(whole), 7), len(whole) - 1}):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError, match=r"text\.pickle"):
            open_token_file(path)


def test_a_flipped_byte_anywhere_is_found(path):
    whole = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for position in generator.choice(len(whole), 400, replace=False):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << generator.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(InputError, match=r"text\.pickle"):
            open_token_file(path).verify()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [list, np.uint16, np.int32])
def test_pickles_of_the_original_load(tmp_path, sequences, kind, protocol):
    path = tmp_path / "old.pickle"
    convert = (lambda s: s.tolist()) if kind is list else kind
    path.write_bytes(pickle.dumps([convert(sequence) for sequence in sequences], protocol))
    file = open_token_file(path)
    assert file.made_by is None
    assert all(np.array_equal(file[i], sequence) for i, sequence in enumerate(sequences))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps([Hostile()]), "system"),
        (b"just some text\n" * 100, "not a pickle"),
        (pickle.dumps({"a": 1}), "lists and arrays of numbers.*DICT"),
        (pickle.dumps(3), "int"),
        (pickle.dumps([[1, 2], [[3]]]), "1-D"),
        (pickle.dumps([["a"]]), "1-D"),
        (pickle.dumps([[1.5]]), "1-D"),
        (pickle.dumps([[-1]]), "not token ids"),
        (pickle.dumps([]), "no list"),
        (b"", "empty"),
    ],
)
def test_foreign_files_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pickle").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_token_file("x.pickle")
    assert not (tmp_path / "pwned").exists()


def call(name, *arguments):
    """The instructions that call a function."""
    return b"c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n" + b"(" + b"".join(arguments) + b"tR"


def number(n):
    return b"\x8a\x08" + n.to_bytes(8, "little", signed=True)


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


NDARRAY, RECONSTRUCT = b"cnumpy\nndarray\n", b"cnumpy._core.multiarray\n_reconstruct\n"
ARRAY = RECONSTRUCT + b"(" + NDARRAY + b"(K\x00tC\x01btR"  # an array without contents
DTYPE = call("numpy.dtype", text("i8"))
BYTES = b"C\x08" + bytes(range(8))
CONTENTS = b"(K\x01(" + number(1) + b"t" + DTYPE + b"\x89" + BYTES + b"tb"
LONG = (
    CONTENTS.replace(number(1), number(4096)).replace(b"i8", b"u1").replace(BYTES, b"B\x00\x10\x00\x00" + bytes(4096))
)
OBJECTS = pickle.dumps([np.array([1, "a", None], object)])


def nested(depth, pair=b"\x86"):
    """A list of a tuple of twice a tuple of twice a tuple, and so on."""
    return b"]" + b"K\x01" + b"".join(b"\x94h" + bytes([i]) + pair for i in range(depth)) + b"a."


@pytest.mark.parametrize(
    "program, message",
    [
        # an array of objects over the bytes of the file, which are then pointers
        (b"]" + call("numpy.ndarray", b"K\x01\x85", text("O"), BYTES) + b"a.", "calls numpy.ndarray"),
        (b"]" + ARRAY + b"(K\x01(" + number(1) + b"t" + call("numpy.dtype", text("O8")) + b"\x89" + BYTES + b"tba.",
         "array of objects; save a plain list"),
        (OBJECTS, "array of objects; save a plain list"),
        (pickle.dumps([np.zeros(2, [("a", "O")])]), "something else than numbers"),
        (pickle.dumps([np.zeros(2, "V8")]), "something else than numbers"),
        # more than there is
        (b"]" + ARRAY + CONTENTS.replace(number(1), number(1 << 60)) + b"a.", "not a pickle"),
        (b"]" + ARRAY + CONTENTS.replace(number(1), number(-1)) + b"a.", "not token ids"),
        (b"]K\x01r" + b"\xff\xff\xff\x7f" + b"a.", "1-D"),  # an index for which memory could be reserved
        (b"]" + b"\x8e" + number(1 << 40)[2:] + b"a.", "1-D|not a pickle"),
        (b"\x80\x05]" + b"\x96" + number(1 << 40)[2:] + b"a.", "1-D|not a pickle"),
        (ARRAY + LONG + b"q\x000](" + b"h\x00" * 5000 + b"e.", "bytes unpack to 20,480,000 tokens"),
        (nested(60), "1-D"),
        (b"(" * 100_000, "not a pickle"),
        # a state for what has none, or twice
        (b"]" + b"cnumpy._core.numeric\n_frombuffer\n" + b"N}\x86" + b"ba.", "DICT"),
        (b"]" + b"cnumpy._core.numeric\n_frombuffer\n" + b"Nba.", "a state"),
        (b"]" + ARRAY + CONTENTS + CONTENTS + b"a.", "twice"),
        (b"]" + ARRAY + b"Nba.", "not a pickle"),
        # other callables, and other arguments of those that are known
        (b"]" + call("_codecs.encode", text("a" * 99), text("zip")) + b"a.", "zip"),
        (b"]" + call("numpy.zeros", number(1 << 60)) + b"a.", "numpy.zeros"),
        (b"]" + call("numpy._core.numeric._frombuffer", ARRAY, DTYPE, b"K\x01\x85", text("C")) + b"a.", "not bytes"),
        (b"cnumpy\ndtype\n)\x81.", "NEWOBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"Pname\n.", "PERSID"),
    ],
)  # fmt: skip
def test_hostile_programs_are_refused(tmp_path, program, message):
    path = tmp_path / "x.pickle"
    path.write_bytes(program)
    with pytest.raises(InputError, match=message):
        open_token_file(path)


PIECES = [
    NDARRAY, RECONSTRUCT, ARRAY, DTYPE, BYTES, CONTENTS, call("numpy.dtype", text("O8")), text("O"), text("<"),
    text("C"), text("latin1"), b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"cnumpy.core.multiarray\nscalar\n",
    b"cnumpy.core.numeric\n_frombuffer\n", number(1), number(-1), number(1 << 62), b"K\x01", b"N", b"\x88", b"(", b")",
    b"t", b"\x85", b"\x86", b"\x87", b"]", b"l", b"a", b"e", b"R", b"b", b"0", b"1", b"2", b"q\x00", b"h\x00", b"q\x01",
    b"h\x01", b"\x94", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 8,
    b"\x80\x04", b"\x95" + b"\xff" * 8, b"}", b"s", b"u", b"\x81", b"\x92", b"o", b"Q", b"\x93", b"\x97", b"\x98", b".",
]  # fmt: skip


@settings(max_examples=int(os.environ.get("PICKLE_PROGRAMS", 300)), deadline=5000, database=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30), st.binary(max_size=8))
def test_any_program_is_refused_or_gives_plain_data(pieces, rest):
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(pieces) + rest + b".")
        file.flush()
        try:
            loaded = open_token_file(file.name)
        except InputError:
            return
        assert loaded.n_tokens <= 1 << 20
        assert all(loaded[i].dtype in (np.uint16, np.int32) for i in range(len(loaded)))


DTYPES = st.sampled_from(["<i8", ">i4", "u1", "<u2", "i2", "f4", "?"])
SHAPES = st.tuples(st.integers(0, 5)) | st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just(())
PLAIN = st.recursive(
    st.integers()
    | st.sampled_from([None, True, False, "", "ä", b"", b"x", 1.5, -0.0])
    | hypothesis.extra.numpy.arrays(DTYPES, SHAPES, elements=st.sampled_from([0, 1])),
    lambda values: st.lists(values, max_size=4) | st.lists(values, max_size=4).map(tuple),
)


@settings(max_examples=100, deadline=5000, database=None)
@given(PLAIN, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_data_loads_as_python_loads_it(value, protocol):
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps(value, protocol))
        file.flush()
        assert_same(load_plain_pickle(file.name), value)


def assert_same(loaded, value):
    if isinstance(value, np.ndarray):
        assert isinstance(loaded, np.ndarray)
        np.testing.assert_array_equal(loaded, value)
        assert loaded.dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
    elif isinstance(value, (list, tuple)):
        assert type(loaded) is type(value) and len(loaded) == len(value)
        for one, other in zip(loaded, value, strict=True):
            assert_same(one, other)
    else:
        assert loaded == value and type(loaded) is type(value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_token_file(tmp_path / "nothing")
    with pytest.raises(InputError, match="folder"):
        open_token_file(tmp_path)
