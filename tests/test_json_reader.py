"""JSON in the shape that is asked for, or one sentence; nothing else comes out, whatever goes in."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from files.json_reader import parse_json, read_json, read_json_lines
from utils import InputError

SHAPE = {"name": str, "n": (int, None), "parts": [{"x": float}], ...: bool}
RIGHT = {"name": "a", "n": None, "parts": [{"x": 1}, {"x": 0.5, "y": []}], "more": True}


def test_what_has_the_shape_comes_out():
    assert parse_json(json.dumps(RIGHT), "f", SHAPE) == RIGHT
    assert parse_json("[1, null]", "f") == [1, None]
    assert parse_json('"\\ud83d\\ude00 \\ud83d x"', "f", str) == "\U0001f600 \ufffd x"
    assert parse_json(b"\xef\xbb\xbf[]", "f", list) == []


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "f: it is not JSON (Expecting value: line 1 column 1 (char 0)); do so."),
        ("[" * 100_000, "f: it is nested too deep; do so."),
        ("1" * 5000, "f: it is not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has "
                     "5000...); do so."),
        ('"é"'.encode("latin-1"), "f: byte 1 is not UTF-8; `iconv -t utf-8` converts other encodings; do so."),
        ("[]", "f: it is a list, but must be an object; do so."),
        ({"z": 1}, "f: it has no 'name'; do so."),
        ({"name": 1}, "f: name is a whole number, but must be text; do so."),
        ({"n": True}, "f: n is true or false, but must be a whole number or null; do so."),
        ({"n": 1 << 63}, "f: n is a number of more than 64 bits, but must be a whole number or null; do so."),
        ({"parts": {}}, "f: parts is an object, but must be a list; do so."),
        ({"parts": [{"x": 1}, {"x": "1"}]}, "f: parts[1].x is text, but must be a number; do so."),
        ({"parts": [None]}, "f: parts[0] is null, but must be an object; do so."),
        ({"more": 1.0}, "f: more is a number, but must be true or false; do so."),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_has_another_shape_is_one_sentence(content, problem):
    if isinstance(content, dict):
        content = json.dumps(content if content == {"z": 1} else RIGHT | content)
    with pytest.raises(InputError) as error:
        parse_json(content, "f", SHAPE, "do so")
    assert str(error.value) == problem


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from([*RIGHT, "z"]), part, max_size=5),
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(VALUES | st.binary() | st.text())
def test_anything_has_the_shape_or_is_refused(value):
    content = value if isinstance(value, bytes) else json.dumps(value)
    try:
        found = parse_json(content, "f", SHAPE)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 300
    else:
        assert isinstance(found["name"], str) and (found["n"] is None or type(found["n"]) is int)
        assert all(type(part["x"]) in (int, float) for part in found["parts"])
        json.dumps(found, ensure_ascii=False).encode()


def test_files_and_their_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n{"a": "b"}\n{"a":')
    assert [row["a"] for row in read_json_lines(file)] == [1, "b"]
    with pytest.raises(InputError, match=r"x\.jsonl, line 2: a is text, but must be a whole number; name another one"):
        read_json_lines(file, {"a": int}, "name another one")
    with pytest.raises(InputError, match=r"^--flag .*x\.jsonl: it is not JSON"):
        read_json(file, flag="--flag")
    with pytest.raises(InputError, match=r"--flag .* does not exist"):
        read_json(tmp_path / "y", flag="--flag")
