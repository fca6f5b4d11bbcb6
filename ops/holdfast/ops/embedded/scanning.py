"""Where the members of a JSON object stand in its text: for what must be put together again byte for byte."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:]', re.DOTALL)
_BLANK: Final = b" \t\r\n"


class Member(NamedTuple):
    """A member of an object: its name as written, without the quotes, and where its value stands."""

    name: bytes
    start: int
    end: int


def members_of(text: bytes, start: int = 0) -> list[Member]:
    """Returns the members of the object that begins at or behind ``start``, in order; a repeated name comes repeatedly.

    ``text`` must be valid JSON; values within the members are passed over.
    """
    members: list[Member] = []
    depth = 0
    name = b""
    value = -1
    for match in _TOKEN.finditer(text, start):
        character = text[match.start()]
        if character == 0x22:
            if depth == 1 and value < 0:
                name = match[0][1:-1]
        elif character in b"{[":
            depth += 1
        elif character in b"}]":
            depth -= 1
            if depth == 0:
                if value >= 0:
                    members.append(_member(text, name, value, match.start()))
                break
        elif depth == 1:
            if character == 0x3A:
                value = match.end()
            else:
                members.append(_member(text, name, value, match.start()))
                value = -1
    return members


def _member(text: bytes, name: bytes, start: int, end: int) -> Member:
    raw = text[start:end]
    return Member(name, start + len(raw) - len(raw.lstrip(_BLANK)), end - len(raw) + len(raw.rstrip(_BLANK)))
