"""Files of other tools become files of ours. (That joined shards are the whole: test_binarized_data.py.)"""

import pickle

import merge_data
from workspace import run


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
