"""JSON that may come from anywhere: a value of the shape that is asked for, or one sentence that says what is wrong.

A shape is a type, `None`, a tuple of shapes that are all right, `[shape]` for a list, or `{key: shape}` for an object
with at least these keys; the key `...` gives the shape of all other values. `float` takes whole numbers too, `object`
anything.
"""

import json
from pathlib import Path

from files.paths import check_input_file
from utils import InputError, reason_of

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", None: "null", list: "a list",
         dict: "an object", object: "anything"}  # fmt: skip
MAX_INTEGER = 2**63  # what numpy and PyTorch can hold


def read_json(path: str | Path, shape: object = object, way_out: str = "", flag: str = ""):
    """The value of a file.

    Args:
        shape: see above.
        way_out: what to do if the file is wrong.
        flag: that named it.

    Raises: InputError if there is no such file, or it does not have this shape.
    """
    check_input_file(path, flag, way_out)
    return parse_json(Path(path).read_bytes(), f"{flag} {path}".strip(), shape, way_out)


def read_json_lines(path: str | Path, shape: object = object, way_out: str = "", flag: str = "") -> list:
    """The value of each line of a file; a last line that a kill cut short, without its end, is left out.

    Raises: as `read_json`, with the number of the line.
    """
    check_input_file(path, flag, way_out)
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [parse_json(line, f"{flag} {path}, line {i}".strip(), shape, way_out) for i, line in enumerate(lines, 1)]


def parse_json(content: bytes | str, where: str, shape: object = object, way_out: str = ""):
    """The value of one JSON text. Half a pair of surrogates in it becomes U+FFFD, as bytes do that are not UTF-8.

    Args:
        where: the file, and the line if it has many, for a message.
        shape, way_out: as in `read_json`.

    Raises: InputError.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            value = _without_surrogates(value)
        problem = _mismatch(value, shape, "")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8; `iconv -t utf-8` converts other encodings"
    except RecursionError:
        problem = "it is nested too deep"
    except ValueError as error:
        problem = f"it is not JSON ({reason_of(error, 80)})"
    if problem:
        raise InputError(f"{where}: {problem}{f'; {way_out}' if way_out else ''}.")
    return value


def _mismatch(value: object, shape: object, at: str) -> str | None:
    """What differs from the shape; `at`: the path to the value, such as `data[3].title`."""
    kind, expected = _kind(value), []
    for option in shape if isinstance(shape, tuple) else (shape,):
        is_container = isinstance(option, (list, dict))
        if is_container and type(value) is type(option):
            return _mismatch_within(value, option, at)
        expected.append(KINDS[type(option) if is_container else option])
        if option is object or kind == expected[-1] or (option is float and kind == KINDS[int]):
            return None
    return f"{at or 'it'} is {kind}, but must be {' or '.join(expected)}"


def _mismatch_within(value: list | dict, shape: list | dict, at: str) -> str | None:
    if isinstance(value, list):
        problems = (_mismatch(part, shape[0], f"{at}[{i}]") for i, part in enumerate(value))
        return next(filter(None, problems), None)
    if missing := [key for key in shape if key not in value and key is not ...]:
        return f"{at or 'it'} has no {missing[0]!r}"
    known = {key: shape.get(key, shape.get(...)) for key in (value if ... in shape else shape)}
    problems = (_mismatch(value[key], expected, f"{at}.{key}".lstrip(".")) for key, expected in known.items())
    return next(filter(None, problems), None)


def _kind(value: object) -> str:
    if type(value) is int and abs(value) >= MAX_INTEGER:
        return "a number of more than 64 bits"
    return KINDS[None if value is None else type(value)]


def _without_surrogates(value):
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(part) for part in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(part) for key, part in value.items()}
    return value
