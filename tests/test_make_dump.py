"""Texts of every form become one sequence a line."""

import bz2
import gzip
import json
import lzma

import make_dump
import pytest
from workspace import run

from corpus import documents

FIRST = "The river rose in spring. Nobody had seen it so high. The bridge was closed for a week! Was it safe again?"
SECOND = "Mr. J. Smith sold the mill in 1899. He moved to St. Petersburg, e.g. for his health. There he died."


def dump(tmp_path, *arguments, expect=0):
    run(make_dump, *arguments, "--dump_file", tmp_path / "dump.txt", expect=expect)
    return (tmp_path / "dump.txt").read_text().splitlines() if expect == 0 else None


def test_documents_are_never_mixed_and_nothing_is_lost(tmp_path):
    (tmp_path / "a.txt").write_text(f"{FIRST}\n{FIRST}\n\n{SECOND}\n")
    lines = dump(tmp_path, "--source", tmp_path / "a.txt", "--target_length", 30)
    assert " ".join(lines) == f"{FIRST} {FIRST} {SECOND}"
    of_first, of_second = ("river", "bridge", "safe"), ("Smith", "died")
    assert all(any(word in line for word in of_first) != any(word in line for word in of_second) for line in lines)
    assert all(len(documents.WORD.findall(line)) <= 30 for line in lines)
    assert all(line[-1] in ".!?" for line in lines)


def test_sequences_of_a_document_are_of_about_even_length(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"This is sentence number {i}." for i in range(100)))
    lengths = [len(documents.WORD.findall(line)) for line in dump(tmp_path, "--source", tmp_path / "a.txt")]
    assert max(lengths) <= 110
    assert min(lengths) >= 80


@pytest.mark.parametrize(
    "form", ["txt", "gz", "bz2", "xz", "jsonl", "parquet", "extractor", "folder", "wrapped", "file"]
)
def test_every_form_of_text_is_read(tmp_path, form):
    source, flags = tmp_path / "in", []
    plain = f"{FIRST}\n\n{SECOND}\n".encode()
    source.mkdir()
    if form in ("gz", "bz2", "xz"):
        (source / f"a.txt.{form}").write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[form].compress(plain))
    elif form == "jsonl":
        (source / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in (FIRST, SECOND)))
        flags = ["--text_column", "body"]
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [FIRST, SECOND]}), source / "a.parquet")
    elif form == "extractor":
        documents = [
            f'<doc id="{i}" url="u" title="T {i}">\nT {i}\n\n{text}\n</doc>\n' for i, text in enumerate((FIRST, SECOND))
        ]
        (source / "AA").mkdir()
        (source / "AA" / "wiki_00").write_text("".join(documents))
    elif form == "folder":
        (source / "b").mkdir()
        (source / "a.txt").write_text(FIRST)
        (source / "b" / "c.txt").write_text(SECOND)
    elif form == "wrapped":
        (source / "a.txt").write_text(FIRST.replace(" high", "\nhigh") + "\n\n" + SECOND.replace(" for", "\nfor"))
    elif form == "file":
        (source / "a.txt").write_bytes(plain)
        flags = ["--documents", "file"]
    else:
        (source / "a.txt").write_bytes(plain)
    assert dump(tmp_path, "--source", source, *flags) == ([f"{FIRST} {SECOND}"] if form == "file" else [FIRST, SECOND])


def test_headings_are_dropped_and_reported(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"Early life\n\n{FIRST}\n\nShort one.\n")
    assert dump(tmp_path, "--source", tmp_path / "a.txt") == [FIRST]
    assert "dropped 1 headings and fragments, 1 sequences under 10 words" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "none.txt does not exist"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: it has no 'text'; name the text with --text_column"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', "line 2: it is not JSON"),
        ("a.txt.gz", gzip.compress(FIRST.encode() * 50)[:60], "damaged or cut short"),
        ("a.txt.xz", lzma.compress(FIRST.encode() * 50)[:60], "damaged or cut short"),
        ("a.txt.gz", FIRST.encode(), "damaged or cut short"),
        ("a.bin", b"\0\1\2" * 100, "is not UTF-8 text"),
        ("a.txt", b"", "there is no text"),
    ],
)
def test_bad_sources_are_named(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    dump(tmp_path, "--source", tmp_path / name, expect=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "dump.txt").exists()


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [{"a": 1}], [0.5], [b"x"], [True]])
def test_a_column_of_anything_else_is_told(tmp_path, capsys, values):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    dump(tmp_path, "--source", tmp_path / "a.parquet", expect=2)
    error = capsys.readouterr().err
    assert f"a.parquet: 'text' holds no text, but {type(values[0]).__name__}s; name the text with" in error


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
NO_TEXTS = {
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj <</Type /Catalog>>\n", "but a document"),
    "a.rtf": (b"{\\rtf1\\ansi hello}", "but a document"),
    "a.png": (PNG + bytes(range(256)) * 20, "but binary or UTF-16"),
    "a.jpg": (b"\xff\xd8\xff\xe1" + bytes(range(1, 256)) * 20, "but binary or of another encoding"),
    "utf-16.txt": (FIRST.encode("utf-16"), "but binary or UTF-16"),
    "greek.txt": ("Μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος. ".encode().decode("latin-1").encode("cp1252", "ignore")
                  .replace(b"\xce", b"\xc3\xc3") * 9, "of another encoding"),
    "array.json": (json.dumps([{"text": FIRST}, {"text": SECOND}]).encode(), "is a JSON array"),
    "pretty.json": (json.dumps([FIRST, SECOND], indent=2).encode(), "is a JSON array"),
    "packed.txt.gz": (gzip.compress(PNG + bytes(range(256)) * 20), "but binary or UTF-16"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TEXTS)
def test_what_is_no_text_is_refused_by_name_and_left_out_of_a_folder(tmp_path, capsys, name):
    content, message = NO_TEXTS[name]
    source = tmp_path / "in"
    source.mkdir()
    (source / name).write_bytes(content)
    dump(tmp_path, "--source", source / name, expect=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"{name} is" in error
    assert message in error
    (source / "b.txt").write_text(SECOND)
    assert dump(tmp_path, "--source", source) == [SECOND]
    assert f"left out: {source / name}" in capsys.readouterr().err


def test_markup_is_told(tmp_path, capsys):
    page = f"<html><head><title>T</title></head><body class='x'>\n<p>{FIRST}</p>\n<p>{SECOND}</p></body></html>\n"
    (tmp_path / "a.html").write_text(page)
    dump(tmp_path, "--source", tmp_path / "a.html")
    assert "a.html looks like markup (<html> ...)" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text(f"{FIRST} We write <b> for bold, and a < b > c.\n{SECOND}\n")
    dump(tmp_path, "--source", tmp_path / "a.txt")
    assert "looks like markup" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "JSON lines", "extractor"])
def test_a_byte_order_mark_is_no_text(tmp_path, form):
    lines = {
        "text": f"{FIRST}\n",
        "JSON lines": json.dumps({"text": FIRST}) + "\n",
        "extractor": f'<doc id="1" url="u" title="T">\nT\n\n{FIRST}\n</doc>\n',
    }
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + lines[form].encode())
    assert dump(tmp_path, "--source", tmp_path / "a.txt") == [FIRST]


def test_the_output_is_not_read_when_it_lies_in_the_source(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(FIRST)
    for _ in range(2):
        assert dump(tmp_path, "--source", tmp_path) == [FIRST]
    assert "dump.txt, which is the --dump_file" in capsys.readouterr().err


def test_the_documentation_of_this_machine_is_prose(tmp_path):
    lines = dump(tmp_path, "--documentation", "--max_megabytes", 0.3)
    text = " ".join(lines)
    assert len(text) > 290_000  # characters; the limit is in bytes
    assert ">>>" not in text
    assert len(set(lines)) > 0.99 * len(lines)


@pytest.mark.parametrize("megabytes", [None, 0.003])
def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch, capsys, megabytes):
    monkeypatch.setattr(documents, "BLOCK", 500)
    (tmp_path / "a.txt").write_text(f"{FIRST}\n\n{SECOND}\n\n" * 40)
    (tmp_path / "b.txt").write_text(f"{SECOND}\n\nHeading\n\n" * 20)
    limit = ["--max_megabytes", megabytes] if megabytes else []
    seen = []
    for n in (0, 1, 2):
        lines = dump(tmp_path, "--source", tmp_path / "a.txt", tmp_path / "b.txt", "--num_workers", n, *limit)
        report = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
        seen.append((lines, report))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0][0]) == 100 or megabytes
