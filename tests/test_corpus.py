"""Several files as one corpus, what is known of it, and that damage never goes unnoticed."""

import json
import os
import pickle
import sys

import binarized_data
import corpus_doctor
import merge_data
import numpy as np
import pytest
import token_counts
from conftest import ROOT, SPEED, run, train
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_command, run_together

import dataset
from corpus import token_counts as counts
from corpus.files import open_corpus
from corpus.statistics import hash_sequences, survey
from corpus.token_writer import write_token_file
from dataset import open_token_file
from evaluation.held_out import held_out_sequences
from lm_seqs_dataset import LmSeqsDataset
from training.distributed import World
from utils import InputError, RunError

SPECIAL = {"unk": 1, "cls": 2, "sep": 3, "pad": 0, "mask": 4, "bos": None, "eos": None}
TOKENIZER = {"tokenizer": "some", "vocab_size": 1000, "vocab_hash": "0", "special_ids": SPECIAL}


def make_sequences(n, seed=0):
    generator = np.random.default_rng(seed)
    return [np.concatenate([[2], generator.integers(5, 1000, k), [3]]) for k in generator.integers(0, 90, n)]


def write(path, sequences, tokenizer=TOKENIZER):
    with write_token_file(path, tokenizer) as writer:
        writer.append(np.concatenate(sequences), np.array([len(sequence) for sequence in sequences]))
    return path


@pytest.fixture
def sequences():
    return make_sequences(100)


@pytest.fixture
def path(tmp_path, sequences):
    return write(tmp_path / "text.pickle", sequences)


@pytest.fixture
def two(tmp_path, sequences):
    """The same corpus in two files, of which one is another tool's."""
    write(tmp_path / "part-1.pickle", sequences[:37])
    (tmp_path / "part-2.pickle").write_bytes(pickle.dumps([s.astype(np.uint16) for s in sequences[37:]]))
    return open_corpus([tmp_path / "part-*.pickle"])


# -------------------------------------------------------------------------------------------------------- several files


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
    other = write(tmp_path / "other.pickle", sequences, {**TOKENIZER, "vocab_hash": "1", "tokenizer": "another"})
    with pytest.raises(InputError, match=r"other\.pickle was binarized with the tokenizer another, but .* with some"):
        open_corpus([path, other])


def test_a_file_that_shrinks_in_use_is_an_error_not_a_crash(path):
    file = open_token_file(path)
    os.truncate(path, 500)
    with pytest.raises(RunError, match="cut short while it was in use"):
        file[99]


def test_reading_costs_no_memory(tmp_path):
    """1000 sequences all over a file of 60 MB: a map would count most of it to the process."""
    ids = np.tile(np.concatenate([[2], np.arange(5, 103), [3]]), 300_000)
    with write_token_file(tmp_path / "x.pickle", TOKENIZER) as writer:
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


def test_without_other_processes_nothing_is_written():
    made = {"a": np.arange(3)}
    assert World(device=None).make_once(lambda: made) is made


# ------------------------------------------------------------------------------------------- the same training, however


def losses_of(folder):
    return [slim(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def slim(line):
    return {key: value for key, value in json.loads(line).items() if key not in SPEED}


def test_old_pickle_shards_and_our_file_give_the_same_training(tmp_path, workspace):
    data = workspace / "text.bert-base-uncased.pickle"
    with open(data, "rb") as file:
        (tmp_path / "old.pickle").write_bytes(pickle.dumps([np.array(sequence) for sequence in pickle.load(file)]))
    for k in range(3):
        run(binarized_data, "--file_path", workspace / "dump.txt", "--dump_file", tmp_path / "text",
            "--tokenizer_name", workspace / "bert-base-uncased", "--shard_id", k, "--num_shards", 3)  # fmt: skip
    sources = {"ours": [data], "old": [tmp_path / "old.pickle"], "shards": [tmp_path / "text.*-of-00003.pickle"]}
    for name, files in sources.items():
        train(workspace, tmp_path / name, "--data_file", *files, "--log_interval", 1)
    assert losses_of(tmp_path / "old") == losses_of(tmp_path / "ours") == losses_of(tmp_path / "shards")
    assert len(losses_of(tmp_path / "ours")) > 3


def test_processes_of_a_machine_share_what_is_made_once(tmp_path, workspace):
    """Only the first process of a machine makes the index; its files are gone afterwards."""
    code = f"""
import numpy as np
from training.distributed import init_world
world = init_world(0)
calls = []
def make():
    calls.append(1)
    return {{"a": np.arange(1000), "empty": np.zeros(0, np.int32)}}
arrays = world.make_once(make)
assert arrays["a"].sum() == 499500 and len(arrays["empty"]) == 0
open({str(tmp_path)!r} + f"/made-{{world.rank}}", "w").write(str(len(calls)))
world.close()"""
    (tmp_path / "share.py").write_text(code)
    (tmp_path / "tmp").mkdir()
    results = run_together(2, tmp_path / "share.py", PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path / "tmp"))
    assert [result.returncode for result in results] == [0, 0], results
    assert [(tmp_path / f"made-{rank}").read_text() for rank in (0, 1)] == ["1", "0"]
    assert not list((tmp_path / "tmp").glob("distil-*"))


# --------------------------------------------------------------------------------------------------------------- counts


def test_all_cores_count_the_same(tmp_path, path, two, sequences, monkeypatch):
    expected = np.bincount(np.concatenate(sequences), minlength=1000).tolist()
    for worth in (1, 1 << 40):
        monkeypatch.setattr(token_counts, "WORTH_A_POOL", worth)
        monkeypatch.setattr(counts, "SPAN", 1000)
        run(token_counts, "--data_file", path, "--token_counts_dump", tmp_path / "counts.pickle")
        assert pickle.loads((tmp_path / "counts.pickle").read_bytes()) == expected
    files = [file.path for file in two.files]
    run(token_counts, "--data_file", *files, "--token_counts_dump", tmp_path / "counts.pickle")
    assert pickle.loads((tmp_path / "counts.pickle").read_bytes()) == expected


def test_counting_a_damaged_file_says_so(tmp_path, path, capsys):
    content = bytearray(path.read_bytes())
    content[64:66] = b"\xff\xff"  # an id outside the vocabulary, too
    path.write_bytes(content)
    run(token_counts, "--data_file", path, "--token_counts_dump", tmp_path / "counts.pickle", expect=2)
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "counts.pickle").exists()


# -------------------------------------------------------------------------------------------------------------- merging


def test_an_old_pickle_becomes_a_file_of_ours(tmp_path, workspace, capsys):
    data = workspace / "text.bert-base-uncased.pickle"
    with open(data, "rb") as file:
        (tmp_path / "old.pickle").write_bytes(pickle.dumps(pickle.load(file), protocol=2))
    flags = ["--data_file", tmp_path / "old.pickle", "--dump_file", tmp_path / "new.pickle"]
    run(merge_data, *flags, expect=2)
    assert "give --tokenizer_name" in capsys.readouterr().err
    run(merge_data, *flags, "--tokenizer_name", workspace / "bert-base-uncased")
    assert (tmp_path / "new.pickle").read_bytes() == data.read_bytes()


def test_merging_refuses_what_would_be_wrong(tmp_path, path, workspace, capsys):
    run(merge_data, "--data_file", path, "--dump_file", path, expect=2)
    assert "is also a --data_file" in capsys.readouterr().err
    (tmp_path / "old.pickle").write_bytes(pickle.dumps([[7, 8, 9]]))
    flags = ["--data_file", tmp_path / "old.pickle", "--tokenizer_name", workspace / "bert-base-uncased"]
    run(merge_data, *flags, "--dump_file", tmp_path / "new.pickle", expect=2)
    assert "sequence 0 does not begin with id" in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))


# --------------------------------------------------------------------------------------------------------------- doctor


def test_the_survey_finds_what_was_put_in(tmp_path):
    body = lambda *ids: np.array([2, *ids, 3])
    sequences = [body(7, 8), body(7, 9), body(7, 8), body(1, 1, 5, 4), np.array([7, 8]), body(7, 8), body(9, 7)]
    found = survey(open_corpus([write(tmp_path / "x.pickle", sequences)]), SPECIAL)
    assert found.lengths.tolist() == [4, 4, 4, 6, 2, 4, 4]
    assert found.counts[[1, 2, 3, 7, 8]].tolist() == [2, 6, 6, 6, 4]
    assert found.distinct == 5
    assert found.most_repeated == (0, 3)
    assert found.unknown.tolist() == [0, 0, 0, pytest.approx(1 / 3), 0, 0, 0]
    assert found.misplaced.tolist() == [4]
    assert found.special_inside == {"mask": 1}


def test_hashes_tell_sequences_apart_by_content_place_and_length():
    others = ([2, 0, 3], [2, 3], [2, 0, 0, 3], [])
    sequences = [*make_sequences(3000), *(np.array(ids, int) for ids in others)]
    lengths = np.array([len(sequence) for sequence in sequences])
    hashes = hash_sequences(np.concatenate(sequences), np.concatenate([[0], np.cumsum(lengths)]))
    assert len(np.unique(hashes)) == len({tuple(sequence) for sequence in sequences})
    alone = [hash_sequences(s, np.array([0, len(s)]))[0] for s in sequences[:100]]
    assert alone == hashes[:100].tolist()


@pytest.fixture(scope="module")
def trained(workspace, tmp_path_factory):
    """A teacher that has learnt something of the text, in some seconds."""
    folder = tmp_path_factory.mktemp("trained") / "teacher"
    train(workspace, folder, "--teacher_name", workspace / "bert-base-uncased", "--student_type", "bert",
          "--n_layers", 1, "--dim", 64, "--n_heads", 2, "--hidden_dim", 128, "--max_position_embeddings", 64,
          "--initializer_range", 0.05, "--alpha_ce", 0, "--alpha_cos", 0, "--mlm_smoothing", 0, "--n_epoch", 8,
          "--learning_rate", 0.003, "--gradient_accumulation_steps", 1, "--dropout", 0, "--attention_dropout", 0,
          "--log_interval", 100)  # fmt: skip
    return folder


def test_the_doctor_finds_a_corpus_fit(tmp_path, workspace, trained, capsys):
    run(corpus_doctor, "--data_file", workspace / "text.bert-base-uncased.pickle", "--teacher_name", trained,
        "--token_counts", workspace / "counts.pickle", "--plot", tmp_path / "x.png")  # fmt: skip
    out = capsys.readouterr().out
    assert "fit to train on" in out
    assert "checksum intact" in out
    assert "→ [MASK]}" in out
    assert "is not the count" not in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_doctor_tells_a_wrong_tokenizer_by_the_teachers_loss(tmp_path, workspace, trained, capsys):
    with open(workspace / "text.bert-base-uncased.pickle", "rb") as file:
        sequences = pickle.load(file)
    other_id = lambda ids: np.where(ids > 80, ids - 50, ids + 40)
    shifted = [np.array([s[0], *other_id(s[1:-1]), s[-1]]) for s in sequences]
    (tmp_path / "old.pickle").write_bytes(pickle.dumps(shifted))
    flags = ["--data_file", tmp_path / "old.pickle", "--teacher_name", trained]
    run(corpus_doctor, *flags, expect=1)
    assert "is worse than a guess by frequency" in capsys.readouterr().out


def test_the_doctor_names_missing_boundaries_and_foreign_ids(tmp_path, workspace, capsys):
    (tmp_path / "old.pickle").write_bytes(pickle.dumps([[7, 8, 9], [2, 7, 60000, 3]] * 30))
    flags = ["--data_file", tmp_path / "old.pickle", "--tokenizer_name", workspace / "bert-base-uncased"]
    run(corpus_doctor, *flags, expect=1)
    out = capsys.readouterr().out
    assert "lack their boundary tokens" in out
    assert "made with another tokenizer" in out
    run(corpus_doctor, "--data_file", tmp_path / "old.pickle", expect=2)
    assert "give --tokenizer_name" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- damage


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


def test_held_out_sequences_are_few_distinct_and_sorted():
    chosen = held_out_sequences(50_000_000, 0.01)
    assert len(np.unique(chosen)) == len(chosen) == 500
    assert np.array_equal(chosen, np.sort(chosen))


def test_counting_without_a_known_vocabulary_asks_for_its_size(tmp_path, capsys):
    import pickle

    (tmp_path / "old.pickle").write_bytes(pickle.dumps([np.arange(9)]))
    flags = ["--data_file", tmp_path / "old.pickle", "--token_counts_dump", tmp_path / "counts.pickle"]
    run(token_counts, *flags, expect=2)
    assert "give --vocab_size" in capsys.readouterr().err
    run(token_counts, *flags, "--vocab_size", 12)
    assert pickle.loads((tmp_path / "counts.pickle").read_bytes()) == [1] * 9 + [0] * 3
