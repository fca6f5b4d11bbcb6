"""A stream's message as read from it: where it stands, when it was stored, what it holds."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class StoredMessage(msgspec.Struct, frozen=True):
    """One message at one position of one life of a stream.  ``stored_at_ms`` is the server's time, floored."""

    subject: str
    headers: Mapping[str, str]
    payload: bytes
    seq: int
    stored_at_ms: int
    epoch: str
