"""The page is whole, needs nothing from anywhere else, and shows what was measured."""

import json
import re
import shutil
from html.parser import HTMLParser

import report
from test_scores import ROWS
from workspace import run

from files.atomic import append_json_lines
from training.metrics_files import METRICS, read_metrics


class Page(HTMLParser):
    """The tags that are open at the end, all addresses, and the text."""

    VOID = ("meta", "br", "path", "use")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_what_was_measured_and_needs_nothing_else(tmp_path, workspace, student):
    for row in ROWS:
        renamed = {"teacher": "bert-base-uncased", "student": "student"}[row["model"]]
        append_json_lines(str(tmp_path / "glue.jsonl"), {**row, "model": renamed})
    (tmp_path / "speed.md").write_text("| form | <b> |\n| --- | ---: |\n| ONNX | 2.5x |\n\nMeasured & noted.\n")
    run(report, "--runs", student, "--scores", tmp_path / "glue.jsonl", "--tables", tmp_path / "speed.md", "--turns", 1,
        "--text", "the cat <sees> [MASK] garden", "--n_gpu", 0, "--output", tmp_path / "report.html")  # fmt: skip
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)  # parts of the pictures
    assert not re.search(r"url\((?!#)|@import|<script|<link", source)
    assert "prefers-color-scheme: dark" in source
    assert "width=device-width" in source
    agreement = [row for row in read_metrics(student / METRICS) if row["kind"] == "valid"][-1]["agreement"]
    assert f"{100 * agreement:.1f} %" in page.text
    assert "87.5 %" in page.text  # of the teacher's mean score, as in the table of scores
    assert "40.0 [30.0, 41.0]" in page.text
    assert "the cat <sees> [MASK] garden" in page.text
    assert "2.5x" in page.text
    assert "Measured & noted." in page.text
    assert "held-out: MLM loss" in page.text
    assert report.THEMED not in source
    assert "11 to 100" in page.text and "length of the sequence" in page.text
    assert "if it ended after layer" in page.text
    assert json.loads((student / "parameters.json").read_text())["command"] in page.text
    assert "torch 2" in page.text


def test_what_can_not_be_is_told(tmp_path, workspace, student, capsys, monkeypatch):
    run(report, "--runs", student, student, "--output", tmp_path / "x.html", expect=2)
    assert "have the same name" in capsys.readouterr().err
    run(report, "--runs", workspace, "--output", tmp_path / "x.html", expect=2)
    assert "give the dump_path of a run" in capsys.readouterr().err
    run(report, "--runs", student, "--tables", "no.md", "--output", tmp_path / "x.html", expect=2)
    assert "--tables no.md does not exist" in capsys.readouterr().err
    (tmp_path / "empty.md").write_text(" \n")
    run(report, "--runs", student, "--tables", tmp_path / "empty.md", "--output", tmp_path / "x.html", expect=2)
    assert "empty.md is empty; leave it out" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # the run was called from another folder, and names its text from there
    parameters = json.loads((student / "parameters.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(student, moved)
    parameters |= {"data_file": ["data/text.pickle"], "token_counts": None, "tokenizer_name": "data/tokenizer"}
    (moved / "parameters.json").write_text(json.dumps(parameters))
    flags = ["--runs", moved, "--teacher", workspace / "bert-base-uncased", "--turns", 1, "--n_gpu", 0]
    flags += ["--valid_data_file", workspace / "text.bert-base-uncased.pickle", "--output", tmp_path / "x.html"]
    run(report, *flags, expect=2)
    assert "or with --no-breakdown" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    run(report, *flags, "--no-breakdown")
    assert (tmp_path / "x.html").exists()
