"""Documents stay whole wherever a source is cut, and sentences end where they end."""

import json

import pytest
from test_make_dump import FIRST, SECOND

from corpus import documents
from utils import InputError


def test_sentences_end_where_they_end():
    assert documents.sentences(FIRST) == [
        "The river rose in spring.",
        "Nobody had seen it so high.",
        "The bridge was closed for a week!",
        "Was it safe again?",
    ]
    assert documents.sentences(SECOND) == [
        "Mr. J. Smith sold the mill in 1899.",
        "He moved to St. Petersburg, e.g. for his health.",
        "There he died.",
    ]
    assert documents.sentences("no end") == ["no end"]


TEXTS = [
    f"{FIRST}\n{SECOND}",
    SECOND,
    f"{SECOND}\n\n{FIRST}",
    "Ünïcödé ends here… “Well,” he said. 你好。再见。 Yes.",
] * 5
SOURCES = {
    "plain": "\n\n".join(TEXTS),
    "plain, odd blank lines": " \t\n\n\n".join(TEXTS) + "\n\u00a0\n" + FIRST,
    "json": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "extractor": "".join(f'<doc id="1" title="T">\nT\n\n{text}\n</doc>\n' for text in TEXTS),
    "byte order mark": "\ufeff" + "\n\n".join(TEXTS),
    "empty": "",
}


@pytest.mark.parametrize("block", [8, 64, 1000])
@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_pieces_hold_whole_documents(tmp_path, monkeypatch, source, by_file, block):
    (tmp_path / "a.txt").write_text(SOURCES[source])

    def read() -> tuple[int, list[documents.Document]]:
        pieces = list(documents.pieces_of_file(tmp_path / "a.txt", by_file))
        assert sum(piece.progress for piece in pieces) == (tmp_path / "a.txt").stat().st_size
        assert sum(piece.n_files for piece in pieces) == 1
        return len(pieces), [document for piece in pieces for document in documents.documents_of(piece, "text")]

    n, whole = read()
    assert n == 1
    monkeypatch.setattr(documents, "BLOCK", block)
    n, cut = read()
    assert cut == whole
    assert n > 1 or by_file or block == 1000 or not SOURCES[source]


def test_a_wrong_line_has_its_number_in_every_piece(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 20 + "nonsense\n")
    monkeypatch.setattr(documents, "BLOCK", 30)
    with pytest.raises(InputError, match="line 21: it is not JSON"):
        for piece in documents.pieces_of_file(tmp_path / "a.jsonl", False):
            list(documents.documents_of(piece, "text"))
