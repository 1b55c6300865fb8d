"""Text to binarized file: the right ids, from every source, in shards, and after any interruption the same bytes."""

import bz2
import errno
import gzip
import io
import lzma
import os
import pickle
import signal
import sys
import time

import binarized_data
import merge_data
import numpy as np
import pytest
from processes import run_together, running
from transformers import AutoTokenizer
from workspace import ROOT, make_text, run

import dataset
from corpus import text_reader
from corpus.files import open_corpus
from corpus.tokenization import LineEncoder
from dataset import open_token_file

NAME = "text.bert-base-uncased.pickle"


@pytest.fixture
def binarize(tmp_path, workspace):
    """Calls the script with the workspace's tokenizer; the output is <tmp_path>/text.bert-base-uncased.pickle."""

    def call(*arguments, expect=0, name="text"):
        run(binarized_data, "--tokenizer_name", workspace / "bert-base-uncased", "--dump_file", tmp_path / name,
            "--file_path", *arguments, expect=expect)  # fmt: skip

    return call


@pytest.fixture
def text(tmp_path):
    """A text of several blocks, with empty lines and without a newline at its end."""
    path = tmp_path / "dump.txt"
    path.write_text(make_text(400, seed=1).replace("old days", "old days\n") + "the cat sees")
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(text_reader, "BLOCK", 1 << 12)
    monkeypatch.setattr(binarized_data, "CHECKPOINT_SECONDS", 0)


# ------------------------------------------------------------------------------------------------------------------ ids


def test_ids_are_those_of_encoding_line_by_line(tmp_path, binarize, tokenizer, text):
    binarize(text)
    file = open_token_file(tmp_path / NAME)
    lines = [line for line in text.read_text().split("\n") if line.strip()]
    assert len(file) == len(lines)
    for i, line in enumerate(lines):
        assert file[i].tolist() == tokenizer.encode(line)
    assert file.made_by["tokenizer"] == "bert-base-uncased"
    assert file.made_by["vocab_size"] == len(tokenizer)


def test_plain_ascii_takes_a_shorter_way_to_the_same_ids(tokenizer):
    """Printable ASCII skips the normalizer (see LineEncoder); every other character must not."""
    generator = np.random.default_rng(0)
    alphabets = ([chr(i) for i in range(32, 127)], list("abzABZ éÜß中文\u00a0\u200b\x7f\t.,'İ"))
    lines = ["".join(generator.choice(alphabets[i % 2], size=generator.integers(1, 90))) for i in range(2000)]
    lines = [line.strip() or "x" for line in lines]
    expected = [tokenizer.encode(line) for line in lines]
    encode = LineEncoder(tokenizer)
    assert encode.plain_backend is not None
    ids, lengths = encode(lines)
    assert lengths.tolist() == [len(line) for line in expected]
    assert ids.tolist() == [id_ for line in expected for id_ in line]


def test_special_tokens_in_the_text_are_text(tmp_path, binarize, tokenizer):
    (tmp_path / "dump.txt").write_text("the cat [SEP] a dog [MASK] [CLS].\n")
    binarize(tmp_path / "dump.txt")
    ids = open_token_file(tmp_path / NAME)[0].tolist()
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert not set(ids[1:-1]) & {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id}


def test_a_tokenizer_that_truncates_and_pads_does_neither_here(tmp_path, workspace, tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    tokenizer.save_pretrained(tmp_path / "cutting")
    (tmp_path / "dump.txt").write_text("the cat sees the garden in the morning without a word. " * 5 + "\n")
    run(binarized_data, "--file_path", tmp_path / "dump.txt", "--tokenizer_name", tmp_path / "cutting",
        "--dump_file", tmp_path / "text")  # fmt: skip
    file = open_token_file(tmp_path / "text.cutting.pickle")
    plain = AutoTokenizer.from_pretrained(workspace / "bert-base-uncased")
    assert file[0].tolist() == plain.encode((tmp_path / "dump.txt").read_text())


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("form", ["gz", "bz2", "xz", "misnamed", "stdin", "glob", "bom"])
def test_every_source_gives_the_same_bytes(tmp_path, binarize, text, form, monkeypatch):
    binarize(text)
    whole, content = (tmp_path / NAME).read_bytes(), text.read_bytes()
    source = tmp_path / f"other.{form}"
    if form in ("gz", "bz2", "xz", "misnamed"):
        packers = {"gz": gzip, "bz2": bz2, "xz": lzma, "misnamed": gzip}
        source.write_bytes(packers[form].compress(content))
    elif form == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        source = "-"
    elif form == "glob":
        cut = content.index(b"\n", len(content) // 2) + 1
        (tmp_path / "part-a").write_bytes(content[:cut])
        (tmp_path / "part-b.gz").write_bytes(gzip.compress(content[cut:]))
        source = tmp_path / "part-*"
    elif form == "bom":
        source.write_bytes(b"\xef\xbb\xbf" + content)
    binarize(source, name="again")
    assert (tmp_path / NAME.replace("text", "again")).read_bytes() == whole


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_shards_joined_are_the_whole(tmp_path, binarize, text, small_blocks, packed, n):
    binarize(text)
    half = text.read_bytes().index(b"\n", 9000) + 1
    first, second = tmp_path / "a.gz", tmp_path / "b"
    first.write_bytes(gzip.compress(text.read_bytes()[:half]))
    second.write_bytes(text.read_bytes()[half:])
    sources = (first, second) if packed else (text,)
    for k in range(n):
        binarize(*sources, "--shard_id", k, "--num_shards", n, name="part")
    pattern = tmp_path / f"part.bert-base-uncased-*-of-{n:05d}.pickle"
    run(merge_data, "--data_file", pattern, "--dump_file", tmp_path / "joined.pickle")
    assert (tmp_path / "joined.pickle").read_bytes() == (tmp_path / NAME).read_bytes()

    corpus, whole = open_corpus([pattern]), open_corpus([tmp_path / NAME])
    assert len(corpus.files) == n
    assert len(corpus) == len(whole)
    for i in range(len(whole)):
        assert np.array_equal(corpus[i], whole[i])


def test_processes_of_a_launcher_write_a_shard_each(tmp_path, workspace, text):
    results = run_together(2, ROOT / "scripts" / "binarized_data.py", "--file_path", text, "--tokenizer_name",
                           workspace / "bert-base-uncased", "--dump_file", tmp_path / "text")  # fmt: skip
    assert [result.returncode for result in results] == [0, 0], results
    shards = [f"text.bert-base-uncased-0000{k}-of-00002.pickle" for k in range(2)]
    counts = [f"{name}.counts" for name in shards]
    assert sorted(path.name for path in tmp_path.glob("text*")) == sorted(shards + counts)


def test_a_missing_shard_is_told(tmp_path, binarize, text, capsys):
    for k in (0, 2):
        binarize(text, "--shard_id", k, "--num_shards", 4)
    open_corpus([tmp_path / "text.*-of-00004.pickle"])
    assert "of 4 shards, these are not there: 1, 3" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- interruption


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


@pytest.mark.parametrize("place", ["append", "checkpoint", "fsync", "replace"])
def test_interrupted_anywhere_and_resumed_it_ends_in_the_same_bytes(
    tmp_path, binarize, text, small_blocks, monkeypatch, place
):
    binarize(text, name="whole")
    whole = (tmp_path / NAME.replace("text", "whole")).read_bytes()
    owner, name = {
        "append": (dataset.TokenFileWriter, "append"),
        "checkpoint": (dataset.TokenFileWriter, "checkpoint"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
    }[place]
    real, kills = getattr(owner, name), 0
    for survived in range(200):  # calls before the kill
        calls = 0

        def kill(*arguments, allowed=survived, **flags):
            nonlocal calls, kills
            calls += 1
            if calls > allowed:
                kills += 1
                raise Killed
            return real(*arguments, **flags)

        # Dying must not tidy up: a process that is killed doesn't.
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, kill)
            patch.setattr(dataset.TokenFileWriter, "close", release_only)
            try:
                binarize(text, "--resume")
                died = False
            except Killed:
                died = True
        if not died:
            break
    binarize(text, "--resume")
    assert kills >= 1
    assert (tmp_path / NAME).read_bytes() == whole
    assert not (tmp_path / f"{NAME}.partial").exists()


def release_only(writer):
    for file in (writer._file, writer._offsets):
        file.detach().close()  # what was not flushed is lost


def test_killed_and_resumed(tmp_path, workspace, binarize):
    """The same with SIGKILL, at moments told by the size of what is written."""
    text = tmp_path / "dump.txt"
    text.write_text(make_text(6000))
    binarize(text, name="whole")
    whole = (tmp_path / NAME.replace("text", "whole")).read_bytes()
    script = tmp_path / "often.py"
    script.write_text(
        "import binarized_data as b; from corpus import text_reader as t\n"
        "b.CHECKPOINT_SECONDS, t.BLOCK = 0, 1 << 12; b.main()"
    )
    flags = ["--file_path", text, "--dump_file", tmp_path / "text", "--resume",
             "--tokenizer_name", workspace / "bert-base-uncased"]  # fmt: skip
    written = tmp_path / f"{NAME}.partial" / "tokens"
    kills = 0
    for share in (0.2, 0.5, 0.8):
        with running(script, *flags, PYTHONPATH=f"{ROOT}:{ROOT / 'scripts'}") as binarizing:
            while binarizing.is_running and not (
                written.exists() and written.stat().st_size > share * len(whole) * 0.9
            ):
                time.sleep(0.001)
            binarizing.kill()
            kills += binarizing.result().returncode == -signal.SIGKILL
    assert kills == 3
    assert not (tmp_path / NAME).exists()
    binarize(text, "--resume")
    assert (tmp_path / NAME).read_bytes() == whole


def test_a_full_disk_costs_nothing_that_was_done(tmp_path, binarize, text, small_blocks, monkeypatch, capsys):
    binarize(text, name="whole")
    room = 20_000

    class Disk(io.FileIO):
        def write(self, data):
            nonlocal room
            if len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= len(data)
            return super().write(data)

    def open_there(writer, name):
        (writer.folder / name).touch()
        return io.BufferedRandom(Disk(writer.folder / name, "r+"))

    with monkeypatch.context() as patch:
        patch.setattr(dataset.TokenFileWriter, "_open", open_there)
        binarize(text, expect=1)
    error = capsys.readouterr().err
    assert error.count("\nerror: ") == 1
    assert f"no room is left on the disk for {tmp_path / NAME}" in error
    assert "--resume" in error
    assert not (tmp_path / NAME).exists()
    binarize(text, "--resume")
    assert "continuing after" in capsys.readouterr().err
    assert (tmp_path / NAME).read_bytes() == (tmp_path / NAME.replace("text", "whole")).read_bytes()


def test_resume_refuses_another_text_and_does_nothing_when_done(
    tmp_path, binarize, text, small_blocks, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(dataset.TokenFileWriter, "finish", lambda writer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            binarize(text)
    text.write_text(text.read_text() + "more\n")
    binarize(text, "--resume", expect=2)
    assert "the text or its shards are not what they were" in capsys.readouterr().err
    binarize(text)
    before = os.stat(tmp_path / NAME)
    binarize(text, "--resume")
    assert "nothing to do" in capsys.readouterr().err
    assert os.stat(tmp_path / NAME).st_mtime_ns == before.st_mtime_ns


def test_damage_to_an_unfinished_file_is_found(tmp_path, binarize, text, small_blocks, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(dataset.TokenFileWriter, "finish", lambda writer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            binarize(text)
    tokens = tmp_path / f"{NAME}.partial" / "tokens"
    content = bytearray(tokens.read_bytes())
    content[1000] ^= 1
    tokens.write_bytes(content)
    binarize(text, "--resume", expect=2)
    assert "tokens is damaged" in capsys.readouterr().err
    (tokens.parent / "progress.json").write_text("{")
    binarize(text, "--resume", expect=2)
    assert "progress.json: it is not JSON" in capsys.readouterr().err
    binarize(text)
    assert "what an interrupted run left" in capsys.readouterr().err


def test_two_processes_can_not_write_the_same_file(tmp_path, binarize, text, capsys):
    with dataset.write_token_file(tmp_path / NAME, {"vocab_size": 9}) as writer:
        binarize(text, expect=2)
        assert "being written by another process" in capsys.readouterr().err
        writer.append(np.arange(3), np.array([3]))
    assert pickle.loads((tmp_path / NAME).read_bytes())[0].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_bytes_are_reported_and_empty_lines_skipped(tmp_path, binarize, small_blocks, capsys):
    text = tmp_path / "dump.txt"
    text.write_bytes(b"BZh9 cat\n\n   \na \xff dog\nthe garden\n" + b"a dog\n" * 2000 + b"a \xc3( dog\n")
    binarize(text)
    assert len(open_token_file(tmp_path / NAME)) == 2004
    error = capsys.readouterr().err
    assert "dump.txt, line 4: not UTF-8" in error
    assert "dump.txt, line 2006: not UTF-8" in error
    binarize(text, "--encoding_errors", "strict", expect=2)
    assert "dump.txt, line 4: not UTF-8" in capsys.readouterr().err
    binarize(text, "--shard_id", 1, "--num_shards", 2)
    assert "dump.txt, line 2006: not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (None, ["nothing.txt"], "nothing.txt does not exist"),
        (None, ["{t}"], "is a folder"),
        (None, ["{t}/*.nothing"], "no file matches"),
        (None, ["-", "{t}/x.txt"], "can't be mixed"),
        (None, ["-", "--resume"], "standard input can neither be divided into shards nor resumed"),
        (b"the cat\n", ["{t}/x.txt", "{t}/x.txt"], "given twice"),
        (b"the cat\n", ["{t}/x.txt", "--tokenizer_name", "no-such-tokenizer"], "no-such-tokenizer"),
        (b"the cat\n", ["{t}/x.txt", "--num_shards", "2"], "go together"),
        (b"the cat\n", ["{t}/x.txt", "--num_shards", "2", "--shard_id", "2"], "the first one is 0"),
        (b"the cat\n", ["{t}/x.txt", "--num_shards", "90", "--shard_id", "0"], "use fewer shards"),
        (b"the cat\n", ["{t}/x.txt", "--dump_file", "/proc/x"], "can't be written"),
        (b"\n\n", ["{t}/x.txt"], "there is no sequence"),
        (pickle.dumps([np.arange(9)] * 9), ["{t}/x.txt"], "is not UTF-8 text"),
        ("the cat".encode("utf-16"), ["{t}/x.txt"], "is not UTF-8 text"),
        (b"the cat " * (1 << 20), ["{t}/x.txt"], "longer than 4 MiB"),
        (gzip.compress(b"the cat\n" * 999)[:-9], ["{t}/x.txt"], "damaged or cut short"),
        (bz2.compress(b"the cat\n" * 999)[:-9], ["{t}/x.txt"], "damaged or cut short"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, workspace, capsys, content, flags, message):
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    given = ["--tokenizer_name", workspace / "bert-base-uncased", "--dump_file", tmp_path / "out", "--file_path"]
    run(binarized_data, *given, *[flag.format(t=tmp_path) for flag in flags], expect=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not list(tmp_path.glob("out*"))
