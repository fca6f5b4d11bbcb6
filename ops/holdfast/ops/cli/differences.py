"""What a JSON Patch changes, told to a person: where, and the value before and after.

Pure: values in, lines out.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

import msgspec

Sign = Literal["~", "+", "-", "@", " "]
"""Of a line: a place that changed, what is new, what is gone, where in a long text it is, what stayed."""

_CONTEXT_LINES: Final = 2
_LONGEST: Final = 4_000
"""Lines of a value that are compared one by one: comparing takes the square of it at worst."""


class Line(NamedTuple):
    """One line of output."""

    sign: Sign
    text: str


def describe_changes(before: Any, operations: Sequence[dict[str, Any]]) -> Iterator[Line]:
    """Yields the lines that tell what ``operations`` (RFC 6902, in order) make of ``before``, which stays as it is.

    Each change is the JSON Pointer of its place, then the lines of the value that go and those that come.
    """
    document = copy.deepcopy(before)
    for operation in operations:
        place = operation["path"]
        name = place or "(the whole body)"
        match operation["op"]:
            case "add":
                # Adding a member that is there replaces it; in a list it makes room.
                replaced = _member_at(document, place)
                yield Line("~", name)
                yield from _lines_between(replaced, [operation["value"]])
            case "remove":
                yield Line("~", name)
                yield from _lines_between([_at(document, place)], [])
            case "replace":
                yield Line("~", name)
                yield from _lines_between([_at(document, place)], [operation["value"]])
            case "move" | "copy":
                yield Line("~", f"{operation['from']} {'moved' if operation['op'] == 'move' else 'copied'} to {name}")
            case _:  # "test" changes nothing
                continue
        document = _apply(document, operation)


def _lines_between(before: list[Any], after: list[Any]) -> Iterator[Line]:
    """Of no value or one on each side."""
    old = [line for value in before for line in _lines_of(value)]
    new = [line for value in after for line in _lines_of(value)]
    if min(len(old), len(new)) <= 1 or max(len(old), len(new)) > _LONGEST:
        yield from (Line("-", line) for line in old)
        yield from (Line("+", line) for line in new)
        return
    for number, line in enumerate(difflib.unified_diff(old, new, lineterm="", n=_CONTEXT_LINES)):
        if number < 2:
            continue  # the names of two files
        sign: Sign = "+" if line[0] == "+" else "-" if line[0] == "-" else "@" if line[0] == "@" else " "
        yield Line(sign, line if sign == "@" else line[1:])


def _lines_of(value: Any) -> list[str]:
    """Text of several lines as it is, anything else as JSON."""
    if isinstance(value, str) and "\n" in value:
        return value.splitlines()
    if isinstance(value, bytes):
        return [f"({len(value)} bytes that are no text)"]
    encoded = msgspec.json.encode(value)
    # What fits on a line is read at a glance there; the rest is spread out.
    return (encoded if len(encoded) <= 100 else msgspec.json.format(encoded, indent=2)).decode().splitlines()


def _tokens(pointer: str) -> list[str]:
    return [token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:]]


def _at(document: Any, pointer: str) -> Any:
    for token in _tokens(pointer):
        document = _child(document, token)
    return document


def _child(container: Any, token: str) -> Any:
    return cast("list[object]", container)[int(token)] if isinstance(container, list) else container[token]


def _member_at(document: Any, pointer: str) -> list[Any]:
    """The value that an addition replaces, if there is one."""
    if not pointer:
        return [document]
    *parents, last = _tokens(pointer)
    for token in parents:
        document = _child(document, token)
    return [document[last]] if isinstance(document, dict) and last in document else []


def _apply(document: Any, operation: dict[str, Any]) -> Any:
    match operation["op"]:
        case "add" | "replace":
            return _set(document, operation["path"], operation["value"], insert=operation["op"] == "add")
        case "remove":
            return _remove(document, operation["path"])
        case "move":
            moved = _at(document, operation["from"])
            return _set(_remove(document, operation["from"]), operation["path"], moved, insert=True)
        case "copy":
            return _set(document, operation["path"], _at(document, operation["from"]), insert=True)
        case _:
            return document


def _set(document: Any, pointer: str, value: Any, *, insert: bool) -> Any:
    value = copy.deepcopy(value)  # later operations may change what stands there
    if not pointer:
        return value
    parent, _, last = pointer.rpartition("/")
    container = _at(document, parent)
    (token,) = _tokens(f"/{last}")
    if not isinstance(container, list):
        container[token] = value
        return document
    items = cast("list[object]", container)
    if token == "-":  # noqa: S105  the end of a list, as RFC 6901 writes it
        items.append(value)
    elif insert:
        items.insert(int(token), value)
    else:
        items[int(token)] = value
    return document


def _remove(document: Any, pointer: str) -> Any:
    if not pointer:
        return None
    parent, _, last = pointer.rpartition("/")
    container = _at(document, parent)
    (token,) = _tokens(f"/{last}")
    if isinstance(container, list):
        del container[int(token)]
    else:
        del container[token]
    return document
