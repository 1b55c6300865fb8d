"""The script that counts tokens: the right numbers, with one core or all."""

import json
import pickle
import shutil

import numpy as np
import token_counts
from workspace import run

from corpus import token_counts as counts
from corpus.token_counts import load_token_counts


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


def test_counting_without_a_known_vocabulary_asks_for_its_size(tmp_path, capsys):
    import pickle

    (tmp_path / "old.pickle").write_bytes(pickle.dumps([np.arange(9)]))
    flags = ["--data_file", tmp_path / "old.pickle", "--token_counts_dump", tmp_path / "counts.pickle"]
    run(token_counts, *flags, expect=2)
    assert "give --vocab_size" in capsys.readouterr().err
    run(token_counts, *flags, "--vocab_size", 12)
    assert pickle.loads((tmp_path / "counts.pickle").read_bytes()) == [1] * 9 + [0] * 3


def test_counts_are_those_of_the_tokens(tmp_path, path, sequences):
    import token_counts

    run(token_counts, "--data_file", path, "--token_counts_dump", tmp_path / "counts.pickle")
    with open(tmp_path / "counts.pickle", "rb") as file:
        counts = pickle.load(file)
    assert isinstance(counts, list)
    assert all(type(count) is int for count in counts)
    assert counts == np.bincount(np.concatenate(sequences), minlength=1000).tolist()
    assert load_token_counts(tmp_path / "counts.pickle", 1000).tolist() == counts


def test_shards_that_carry_their_counts_are_not_read(tmp_path, path):
    paths = [path, shutil.copy(path, tmp_path / "another.pickle")]
    flags = ["--data_file", *paths, "--token_counts_dump", tmp_path / "counts.pickle"]
    run(token_counts, *flags)
    expected = (tmp_path / "counts.pickle").read_bytes()
    for path in paths:
        counts.save_counts(path)
    content = path.read_bytes()
    path.write_bytes(content[:64] + b"\xff" * 64 + content[128:])  # so whoever reads the tokens fails
    run(token_counts, *flags)
    assert (tmp_path / "counts.pickle").read_bytes() == expected


def test_counts_of_another_file_are_not_believed(tmp_path, path, sequences, capsys):
    counts.save_counts(path)
    beside = path.with_name(f"{path.name}.counts")
    saved = json.loads(beside.read_text())
    flags = ["--data_file", path, "--token_counts_dump", tmp_path / "counts.pickle"]
    expected = np.bincount(np.concatenate(sequences), minlength=1000).tolist()
    for change in ({"crc32": 1}, {"counts": [1, *saved["counts"][1:]]}, {"counts": [*saved["counts"], 0]}):
        beside.write_text(json.dumps({**saved, **change}))
        run(token_counts, *flags)
        assert pickle.loads((tmp_path / "counts.pickle").read_bytes()) == expected
    beside.write_text("{")
    run(token_counts, *flags, expect=2)
    assert "remove it, so that the tokens are counted again" in capsys.readouterr().err
