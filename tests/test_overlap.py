"""Long runs of words that stand in the training text and in evaluation sets are found, whatever form these have."""

import gzip
import json

import binarized_data
import corpus_doctor
import numpy as np
import pytest
from workspace import load_tokenizer, rows_of, run, train

from corpus import overlap
from corpus.files import open_corpus
from corpus.tokenization import describe_tokenizer
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError

N = 6


@pytest.fixture(scope="module")
def tokenizer(workspace):
    return load_tokenizer(workspace / "bert-base-uncased")


@pytest.fixture(scope="module")
def corpus(workspace):
    return open_corpus([str(workspace / "text.bert-base-uncased.pickle")])


def by_definition(lines: list[str], texts: list[str], n: int) -> set[int]:
    """Numbers of the lines that hold n words in a row of any of the texts."""
    words = lambda text: "".join(c if c.isalnum() else " " for c in text.lower()).split()
    ngrams = lambda text: {tuple(words(text)[i : i + n]) for i in range(len(words(text)) - n + 1)}
    wanted = set().union(*map(ngrams, texts))
    return {i for i, line in enumerate(lines) if ngrams(line) & wanted}


def test_they_are_those_of_the_definition(workspace, corpus, tokenizer, tmp_path):
    lines = (workspace / "dump.txt").read_text().splitlines()
    texts = ["The cat sees -- the LONG road, without a word.", "Near the harbour.", lines[7], "a ship " * 20]
    (tmp_path / "dev.tsv").write_text("".join(f"{i}\t{text}\t1\n" for i, text in enumerate(texts)))
    expected = by_definition(lines, texts, N)
    assert 1 < len(expected) < len(lines)
    found = overlap.find_overlaps(corpus, tokenizer, [str(tmp_path / "dev.tsv")], N)
    assert found.sequences.tolist() == sorted(expected)
    (file,) = found.files
    assert (file["texts"], file["found"], file["sequences"]) == (3, 2, len(expected))
    number, words = found.examples[0]
    assert words in "".join(c for c in lines[number].lower() if c.isalpha() or c == " ")


def test_shards_give_the_same_as_one_file(workspace, corpus, tokenizer, tmp_path, monkeypatch):
    for k in range(3):
        run(binarized_data, "--file_path", workspace / "dump.txt", "--tokenizer_name", workspace / "bert-base-uncased",
            "--dump_file", tmp_path / "text", "--shard_id", k, "--num_shards", 3)  # fmt: skip
    shards = open_corpus([str(tmp_path / "text.*.pickle")])
    assert len(shards.files) == 3
    lines = (workspace / "dump.txt").read_text().splitlines()
    (tmp_path / "dev.txt").write_text("\n".join(lines[5:200:40]))
    whole = overlap.find_overlaps(corpus, tokenizer, [str(tmp_path / "dev.txt")], N)
    monkeypatch.setattr(overlap, "PART_TOKENS", 500)
    in_shards = overlap.find_overlaps(shards, tokenizer, [str(tmp_path / "dev.txt")], N)
    assert in_shards.sequences.tolist() == whole.sequences.tolist() and len(whole.sequences) >= 5
    assert (in_shards.files, in_shards.examples) == (whole.files, whole.examples)


@pytest.mark.parametrize("name", ["dev.json", "dev.jsonl", "dev.tsv", "dev.txt"])
def test_every_form_of_an_evaluation_set_is_read(corpus, tokenizer, tmp_path, workspace, name):
    text = (workspace / "dump.txt").read_text().splitlines()[3]
    squad = {"data": [{"paragraphs": [{"context": text, "qas": [{"id": "1", "question": "Who?", "answers": []}]}]}]}
    contents = {
        "dev.json": json.dumps(squad),
        "dev.jsonl": json.dumps({"sentence": "no"}) + "\n" + json.dumps({"sentence": text}) + "\n",
        "dev.tsv": f"index\tsentence\tlabel\n0\t{text}\t1\n",
        "dev.txt": f"{text}\n",
    }
    (tmp_path / name).write_text(contents[name])
    assert 3 in overlap.find_overlaps(corpus, tokenizer, [str(tmp_path / name)], N).sequences


def test_what_is_listed_is_not_trained_on(workspace, corpus, tmp_path, capsys):
    lines = (workspace / "dump.txt").read_text().splitlines()
    (tmp_path / "dev.txt").write_text("\n".join(lines[:40]))
    flags = ("--data_file", workspace / "text.bert-base-uncased.pickle")
    run(corpus_doctor, *flags, "--tokenizer_name", workspace / "bert-base-uncased", "--against", tmp_path / "*.txt",
        "--ngram", 30, "--overlap_file", tmp_path / "overlap.json", "--n_examples", 0)  # fmt: skip
    assert "train.py --leave_out" in capsys.readouterr().out
    listed = json.loads((tmp_path / "overlap.json").read_text())["sequences"]
    assert listed == sorted(by_definition(lines, lines[:40], 30))
    train(workspace, tmp_path / "run", "--leave_out", tmp_path / "overlap.json", "--valid_share", 0)
    train(workspace, tmp_path / "whole", "--valid_share", 0)
    tokens = [rows_of(tmp_path / name)[-1]["tokens"] for name in ("run", "whole")]
    special_ids = describe_tokenizer(load_tokenizer(workspace / "bert-base-uncased"))["special_ids"]
    left_out = LmSeqsDataset(corpus.take(np.array(listed)), special_ids, 64)
    assert tokens[1] - tokens[0] == left_out.n_tokens > 0


def test_a_list_of_another_text_is_refused(workspace, corpus, tmp_path):
    found = overlap.Overlap(np.array([1, 2]), [], [])
    overlap.write_overlap(str(tmp_path / "list.json"), found, corpus.take(np.arange(5)), N)
    with pytest.raises(InputError, match=r"made for another text .* \(5 sequences"):
        overlap.load_overlap(str(tmp_path / "list.json"), corpus)
    (tmp_path / "list.json").write_text('{"sequences": "x"}')
    with pytest.raises(InputError, match="--overlap_file makes such a file"):
        overlap.load_overlap(str(tmp_path / "list.json"), corpus)


def test_a_damaged_evaluation_set_is_told_from_one_that_is_no_json(tmp_path):
    (tmp_path / "dev.tsv.gz").write_bytes(gzip.compress(b"a\tb\n" * 9999)[:60])
    with pytest.raises(InputError, match="is damaged or cut short"):
        overlap.read_texts(str(tmp_path / "dev.tsv.gz"))


@pytest.mark.parametrize("content", ["a\tb\n", ""])
def test_texts_that_are_too_short_to_be_looked_for_are_an_error(corpus, tokenizer, tmp_path, content):
    (tmp_path / "dev.tsv").write_text(content)
    with pytest.raises(InputError, match=r"no text .* has 6 words; give a smaller --ngram"):
        overlap.find_overlaps(corpus, tokenizer, [str(tmp_path / "dev.tsv")], N)
    (tmp_path / "dev.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        overlap.find_overlaps(corpus, tokenizer, [str(tmp_path / "dev.json")], N)
