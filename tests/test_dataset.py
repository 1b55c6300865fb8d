"""The file on disk: a pickle for everyone, read in place by us, and refused where anything is wrong."""

import os
import pickle
import sys

import numpy as np
import pytest
from corpora import write
from processes import run_command

from corpus.token_writer import write_token_file
from dataset import open_token_file
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
    with pytest.raises(InputError, match="not one sequence"), write_token_file(tmp_path / "x", MADE_BY):
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
        (pickle.dumps({"a": 1}), "dict"),
        (pickle.dumps([[1, 2], [[3]]]), "1-D"),
        (pickle.dumps([["a"]]), "1-D"),
        (pickle.dumps([[1.5]]), "1-D"),
        (pickle.dumps([[-1]]), "no token ids"),
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


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_token_file(tmp_path / "nothing")
    with pytest.raises(InputError, match="folder"):
        open_token_file(tmp_path)
