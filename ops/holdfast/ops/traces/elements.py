"""JSON documents cut into their elements as the bytes arrive, so that no document is ever held as a whole."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Final

from holdfast.ops.traces.model import Malformed
from holdfast.ops.traces.sources import BLANK, Numbered, Source
from holdfast.schemas import limits

ELEMENT_BYTES: Final = 256 * limits.MIB
"""Largest element of a document, such as one whole session: it is decoded in one piece."""

# A string that ends in this piece, or a character that structure depends on; a quote alone opens a string that does
# not end here.
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
_STRING_REST: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def read_elements(source: Source, limit_bytes: int = ELEMENT_BYTES) -> Iterator[Numbered | Malformed]:
    """Yields the elements of the arrays at the top level, and the top-level values that are not arrays.

    Only strings, brackets and commas are looked at: an element that is broken within itself costs that element alone.
    A file that ends too early gives the elements that were whole, then one Malformed.
    """
    cutter = _Cutter(source, limit_bytes)
    try:
        for chunk in source.chunks():
            yield from cutter.feed(chunk)
    except (OSError, zlib.error) as error:
        yield source.malformed(cutter.line, f"cannot be read further: {error}")
        return
    yield from cutter.finish()


class _Cutter:
    """Scans each byte once.  Holds the element in hand, up to the limit, and the piece being scanned."""

    def __init__(self, source: Source, limit_bytes: int) -> None:
        self.line = 1
        """Line of the first byte of the element in hand, or of the blanks before it."""
        self._source = source
        self._limit_bytes = limit_bytes
        # The element in hand: what earlier pieces held of it, and where in this piece it goes on.
        self._parts: list[bytes] = []
        self._size_bytes = 0
        self._start = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._in_array = False
        self._after_comma = False
        self._found = False

    def feed(self, chunk: bytes) -> Iterator[Numbered | Malformed]:
        self._start = 0
        position = self._end_string(chunk, 0) if self._in_string else 0
        while position < len(chunk):
            match = _TOKEN.search(chunk, position)
            if match is None:
                break
            position = match.end()
            if position - match.start() > 1:
                continue
            character = chunk[position - 1]
            if character == 0x22:
                self._in_string = True
                position = self._end_string(chunk, position)
            elif character in b"[{":
                self._open(chunk, position)
            elif character == 0x2C:
                yield from self._comma(chunk, position)
            else:
                yield from self._close(chunk, position)
        self._hold(chunk[self._start :])

    def finish(self) -> Iterator[Numbered | Malformed]:
        if self._in_string or self._depth or self._in_array:
            yield self._source.malformed(self.line, "the file ends before its JSON does")
            return
        yield from self._take(b"", must_exist=False)
        if not self._found:
            yield self._source.malformed(1, "the file is empty")

    def _end_string(self, chunk: bytes, position: int) -> int:
        """Returns where scanning goes on: behind the string, or at the end of the piece when the string goes on."""
        match = _STRING_REST.match(chunk, position + self._escaped)
        end = len(chunk) if match is None else match.end()
        # What stops the match but a quote is a backslash at the very end: what it escapes is in the next piece.
        self._escaped = chunk[end : end + 1] == b"\\"
        if chunk[end : end + 1] != b'"':
            return len(chunk)
        self._in_string = False
        return end + 1

    def _open(self, chunk: bytes, position: int) -> None:
        at_top = not self._depth and not self._in_array
        if at_top and chunk[position - 1 : position] == b"[" and self._is_blank(chunk[self._start : position - 1]):
            self._in_array = self._found = True
            self._begin(chunk, position)
        else:
            self._depth += 1

    def _comma(self, chunk: bytes, position: int) -> Iterator[Numbered | Malformed]:
        if self._in_array and not self._depth:
            yield from self._take(chunk[self._start : position - 1], must_exist=True)
            self._begin(chunk, position)
            self._after_comma = True

    def _close(self, chunk: bytes, position: int) -> Iterator[Numbered | Malformed]:
        if self._depth:
            self._depth -= 1
            if not self._depth and not self._in_array:
                yield from self._take(chunk[self._start : position], must_exist=False)
                self._begin(chunk, position)
        elif self._in_array and chunk[position - 1 : position] == b"]":
            yield from self._take(chunk[self._start : position - 1], must_exist=self._after_comma)
            self._begin(chunk, position)
            self._in_array = self._after_comma = False

    def _take(self, last: bytes, *, must_exist: bool) -> Iterator[Numbered | Malformed]:
        size_bytes = self._size_bytes + len(last)
        if size_bytes > self._limit_bytes:
            self._found = True
            yield self._source.malformed(
                self.line, f"the element has {size_bytes} bytes, the limit is {self._limit_bytes}"
            )
            return
        raw = b"".join((*self._parts, last))
        element = raw.lstrip(BLANK)
        if element:
            self._found = True
            yield self.line + raw.count(b"\n", 0, len(raw) - len(element)), element.rstrip(BLANK)
        elif must_exist:
            yield self._source.malformed(self.line, "an element is missing at a comma")

    def _begin(self, chunk: bytes, position: int) -> None:
        self.line += sum(part.count(b"\n") for part in self._parts) + chunk.count(b"\n", self._start, position)
        self._parts.clear()
        self._size_bytes = 0
        self._start = position

    def _hold(self, rest: bytes) -> None:
        if not self._size_bytes and self._is_blank(rest):
            # Blanks between elements are not part of any.
            self.line += rest.count(b"\n")
            return
        self._size_bytes += len(rest)
        if self._size_bytes > self._limit_bytes:
            # Scanning goes on to find the end, but nothing is kept; only the lines still count.
            self.line += sum(part.count(b"\n") for part in self._parts) + rest.count(b"\n")
            self._parts.clear()
        else:
            self._parts.append(rest)

    def _is_blank(self, text: bytes) -> bool:
        return not self._size_bytes and not text.strip(BLANK)
