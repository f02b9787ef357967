"""JSON as the server takes it: no key twice in an object, no NaN. A long text does not keep other threads waiting.

The library's scanner, written in C, lets no other thread run before it is done with a whole list, which for some MiB
takes from a quarter of a second to more than one. A long text is therefore walked in Python, and only runs of numbers,
and of short lists of them, go to that scanner, a piece at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.scanner import py_make_scanner  # type: ignore[attr-defined, unused-ignore]
from typing import Any

from louver.cloud.refusals import Refusal

__all__ = ["LONG", "decode_json", "decode_long"]

LONG = 2**16
"""Texts up to this many signs are read in one go: about a millisecond for what clients send."""

_MOST_OBJECTS = 4096
"""In a long text, which a tensor makes long and not its objects; each costs more there than a number does."""

_NUMBERS = re.compile(rf"[-+0-9eE., \t\r\n]{{1,{LONG}}}")
_ROWS = re.compile(r"(?:\[[-+0-9eE., \t\r\n]{0,512}\][ \t\r\n]*,){1,128}")
_SPACE = re.compile(r"[ \t\r\n]*")
_Scan = Callable[[str, int], tuple[Any, int]]


def decode_json(text: str) -> Any:  # noqa: ANN401 - it is anything
    """What the text says.

    Raises:
        Refusal: 400, a key twice, NaN or infinity, or too many objects in a long text.
        ValueError: it does not parse (`json.JSONDecodeError`), or a number is too long.
        RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(text) if len(text) <= LONG else decode_long(text)


def decode_long(text: str) -> Any:  # noqa: ANN401 - it is anything
    """The same as `decode_json`, whatever the length."""
    count = 0

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count > _MOST_OBJECTS:
            raise Refusal(400, f"expected at most {_MOST_OBJECTS} objects in JSON of more than {LONG} signs")
        return _once(pairs)

    decoder: Any = json.JSONDecoder(object_pairs_hook=once, parse_constant=_no_constant)
    decoder.parse_array = _array
    decoder.scan_once = py_make_scanner(decoder)
    return decoder.decode(text)


def _array(start: tuple[str, int], scan: _Scan) -> tuple[list[Any], int]:
    """The list that begins before this position, and where it ends."""
    text, position = start
    values: list[Any] = []
    position = _after_space(text, position)
    if text[position : position + 1] == "]":
        return values, position + 1
    while True:
        while run := _NUMBERS.match(text, position) or _ROWS.match(text, position):
            comma = text.rfind(",", position, run.end())
            if comma < 0:
                break
            values += _piece(text, position, comma)
            position = _after_space(text, comma + 1)
        try:
            value, position = scan(text, position)
        except StopIteration as error:
            raise json.JSONDecodeError("Expecting value", text, error.value) from None
        values.append(value)
        position = _after_space(text, position)
        sign = text[position : position + 1]
        if sign == "]":
            return values, position + 1
        if sign != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _after_space(text, position + 1)


def _piece(text: str, start: int, stop: int) -> list[Any]:
    """The values from one place to another, the first of them and the comma after the last."""
    try:
        found: list[Any] = _DECODER.decode(f"[{text[start:stop]}]")
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(error.msg, text, start + error.pos - 1) from None
    if not found:
        raise json.JSONDecodeError("Expecting value", text, start)
    return found


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refusal(400, "a key stands twice in one object of the JSON")
    return found


def _no_constant(name: str) -> float:
    raise Refusal(400, f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
