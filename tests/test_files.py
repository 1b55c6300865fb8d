"""Several files as one corpus, and that damage never goes unnoticed."""

import os
import pickle
import sys

import numpy as np
import pytest
from corpora import MADE_BY, SPECIAL, make_sequences, write
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_command
from workspace import ROOT

import dataset
from corpus.files import open_corpus
from dataset import open_token_file, write_token_file
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError, RunError


def test_several_files_are_one_corpus(two, path, sequences, monkeypatch):
    one = open_corpus([path])
    assert len(one) == len(two) == len(sequences)
    assert one.n_tokens == two.n_tokens
    assert all(np.array_equal(two[i], sequence) for i, sequence in enumerate(sequences))
    assert np.array_equal(two[-1], sequences[-1])
    with pytest.raises(IndexError):
        two[len(sequences)]
    taken = two.take(np.array([3, 40, 99]))
    assert [taken[i].tolist() for i in range(3)] == [sequences[i].tolist() for i in (3, 40, 99)]
    for max_length in (512, 20):
        for exclude in (None, np.array([0, 36, 37, 99])):
            a, b = (LmSeqsDataset(corpus, SPECIAL, max_length, exclude) for corpus in (one, two))
            assert a.dropped == b.dropped
            assert [a[i].tolist() for i in range(len(a))] == [b[i].tolist() for i in range(len(b))]
    monkeypatch.setattr(dataset, "BLOCK_TOKENS", 50)
    monkeypatch.setattr(dataset, "BLOCK_SEQUENCES", 7)
    c = LmSeqsDataset(two, SPECIAL, 20, np.array([0, 36, 37, 99]))  # block by block
    assert c.dropped == b.dropped
    assert np.array_equal(c.lengths, b.lengths)


def test_blocks_are_bounded_and_complete(path, sequences, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK_TOKENS", 100)
    found = list(open_corpus([path]).blocks())
    assert len(found) > 10
    assert np.array_equal(np.concatenate([ids for _, _, ids in found]), np.concatenate(sequences))
    for first, offsets, ids in found:
        assert len(ids) == offsets[-1] - offsets[0]
        assert len(ids) <= 100 or len(offsets) == 2
        assert len(sequences[first]) == offsets[1] - offsets[0]


def test_files_of_different_tokenizers_do_not_mix(tmp_path, path, sequences):
    other = write(tmp_path / "other.pickle", sequences, {**MADE_BY, "vocab_hash": "1", "tokenizer": "another"})
    with pytest.raises(InputError, match=r"other\.pickle was binarized with the tokenizer another, but .* with some"):
        open_corpus([path, other])


def test_a_file_that_shrinks_in_use_is_an_error_not_a_crash(path):
    file = open_token_file(path)
    os.truncate(path, 500)
    with pytest.raises(RunError, match="cut short while it was in use"):
        file[99]


def test_more_shards_than_a_process_may_open_at_once(tmp_path, path, sequences):
    for k in range(400):
        os.link(path, tmp_path / f"shard-{k:03d}.pickle")
    code = f"""
import resource
from corpus.files import open_corpus
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
corpus = open_corpus([{str(tmp_path / "shard-*.pickle")!r}])
assert len(corpus.files) == 400
for _ in range(2):
    print(sum(int(file[0].sum()) for file in corpus.files))"""
    result = run_command([sys.executable, "-c", code], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(400 * int(sequences[0].sum()))] * 2


def test_a_shard_that_was_replaced_is_not_read_on(tmp_path, path, sequences):
    file = open_token_file(path)
    dataset._handle.cache_clear()  # as if many others had been read since
    write(path, sequences[1:], MADE_BY)
    with pytest.raises(RunError, match="replaced or cut short while it was in use"):
        file[0]


def test_reading_costs_no_memory(tmp_path):
    """1000 sequences all over a file of 60 MB: a map would count most of it to the process."""
    ids = np.tile(np.concatenate([[2], np.arange(5, 103), [3]]), 300_000)
    with write_token_file(tmp_path / "x.pickle", MADE_BY) as writer:
        writer.append(ids, np.full(300_000, 100))
    code = f"""
import psutil, numpy as np
from corpus.files import open_corpus
file = open_corpus([{str(tmp_path / "x.pickle")!r}])
order = np.random.default_rng(0).integers(len(file), size=1000)
before = psutil.Process().memory_info().rss
assert all(len(file[i]) == 100 for i in order)
print(psutil.Process().memory_info().rss - before)"""
    result = run_command([sys.executable, "-c", code], cwd=ROOT)
    assert int(result.stdout) < 3e6


def test_another_process_opens_the_file_itself(path):
    assert len(pickle.dumps(open_corpus([path]))) < 2000
    assert np.array_equal(pickle.loads(pickle.dumps(open_corpus([path])))[5], open_corpus([path])[5])


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("fuzz") / "x.pickle", make_sequences(40))
    return path, path.read_bytes(), [sequence.tolist() for sequence in make_sequences(40)]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_damage_crashes_or_gives_wrong_tokens(intact, data):
    """Whatever is cut, changed, inserted or put together: the right tokens, or one clear error."""
    path, whole, expected = intact
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        n = data.draw(st.integers(1, 40))
        kind = data.draw(st.sampled_from(["cut", "drop", "flip", "zero", "insert", "repeat"]))
        if kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + n]
        elif kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "zero":
            content[at : at + n] = bytes(len(content[at : at + n]))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            content[at:at] = content[at : at + n]
    damaged = path.with_name("damaged.pickle")
    damaged.write_bytes(content)
    try:
        corpus = open_corpus([damaged])
        corpus.verify()
        found = [corpus[i].tolist() for i in range(len(corpus))]
    except InputError as error:
        assert "damaged.pickle" in str(error)
        assert "\n" not in str(error)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:200] + content[3000:],  # the middle is missing, so the parts overlap
        lambda content: content[:-20] + bytes(12) + content[-8:],  # a footer of no length, whose checksum is right
    ],
)
def test_damage_that_the_fuzzer_found(intact, damage):
    path = intact[0].with_name("damaged.pickle")
    path.write_bytes(damage(intact[1]))
    with pytest.raises(InputError, match=r"damaged\.pickle is damaged"):
        open_corpus([path])
