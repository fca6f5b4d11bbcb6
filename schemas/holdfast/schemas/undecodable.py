"""What msgspec raises over bytes that somebody else wrote.

Besides its own errors, it lets through Python's over text that is not UTF-8 and over brackets nested a thousand deep:
whoever decodes what came from outside has to expect all three.
"""

from __future__ import annotations

from typing import Final

import msgspec

UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""For an ``except`` around a decoder of bytes from outside; a ValidationError is a DecodeError."""
