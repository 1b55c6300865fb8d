"""What models guess for a masked word."""

import fill_mask
import pytest
from transformers import pipeline
from workspace import run


def test_the_guesses_are_those_of_the_librarys_pipeline(workspace, capsys):
    name = str(workspace / "bert-base-uncased")
    run(fill_mask, "--models", name, name, "--text", "the [MASK] sat.", "--top", 3)
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert header == ["bert-base-uncased"] * 2
    expected = pipeline("fill-mask", name)("the [MASK] sat.", top_k=3)
    assert rows == [[f"{guess['token_str']} {guess['score']:.0%}"] * 2 for guess in expected]


@pytest.mark.parametrize(
    "text, message",
    [("no mask", "has 0 masks"), ("[MASK] [MASK]", "has 2 masks"), ("the " * 2000 + "[MASK]", "tokens, but")],
)
def test_wrong_texts_are_told(workspace, capsys, text, message):
    run(fill_mask, "--models", workspace / "bert-base-uncased", "--text", text, expect=2)
    assert message in capsys.readouterr().err
