"""The headers of a message as the server sent them, read when somebody asks for them.

Of a stored context five headers arrive, of which three said how it was to be stored: whoever reads a stream by the
ten thousand looks at the others only, and those are the same in most messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from holdfast.streams.tolerant_client import read_headers

_MOST_KNOWN: Final = 256
_MOST_KNOWN_BYTES: Final = 256

_known: dict[bytes, dict[str, str]] = {}
"""What blocks begin with, up to the first header of the server's, and what it says."""

_SERVERS: Final = b"\r\nNats-"
_OWN: Final = b"Hf-"


class HeaderBlock(Mapping[str, str]):
    """A mapping of header names to values, parsed at the first look into it."""

    __slots__ = ("_block", "_headers")

    def __init__(self, block: bytes) -> None:
        self._block = block
        self._headers: dict[str, str] | None = None

    @property
    def size_bytes(self) -> int:
        """How many bytes they arrived in."""
        return len(self._block)

    @property
    def own(self) -> Mapping[str, str]:
        """At least the headers whose names begin with ``Hf-``, if there are any: cheaper than all of them."""
        end = self._block.find(_SERVERS)
        if end < 0 or self._block.find(_OWN, end) >= 0:
            return self._all()
        begin = self._block[:end]
        found = _known.get(begin)
        if found is None:
            found = read_headers(begin) or {}
            if len(_known) < _MOST_KNOWN and len(begin) <= _MOST_KNOWN_BYTES:
                _known[begin] = found
        return found

    def _all(self) -> dict[str, str]:
        if self._headers is None:
            self._headers = read_headers(self._block) or {}
        return self._headers

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


def size_of(headers: Mapping[str, str]) -> int:
    """Returns how many bytes some headers arrived in; 0 where that is not known."""
    return headers.size_bytes if isinstance(headers, HeaderBlock) else 0


def own_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Returns at least those of some headers whose names begin with ``Hf-``."""
    return headers.own if isinstance(headers, HeaderBlock) else headers
