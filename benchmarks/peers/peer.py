"""What every peer is asked to do.  Bodies are bytes already encoded, where Holdfast encodes, hashes and seals too.

Each of them stores a body once: a context is one row or one value, and so is the newest version of a key; the write of
the next version moves what was there to the versions before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ConflictError(Exception):
    """A version was written by somebody else meanwhile: read again and try again."""


class Peer(Protocol):
    """A store to compare with.  Writes return when they are durable."""

    name: str
    what: str
    """In words, durability included."""

    async def put(self, key: str, body: bytes) -> None:
        """Stores a new context."""
        ...

    async def put_many(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Stores new contexts in one call."""
        ...

    async def get(self, key: str) -> bytes:
        """Returns a context from the fastest tier that has it."""
        ...

    async def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """Returns contexts in one call."""
        ...

    async def update(self, key: str, body: bytes, expected: int) -> None:
        """Writes the version after ``expected`` and keeps the earlier ones; raises ConflictError when it is taken."""
        ...

    async def patch(self, key: str, members: bytes) -> None:
        """Merges members into the newest version of a key, as the next version, where the store itself can do that:
        it then takes one writer after the other, and none has to come again."""
        ...

    async def history(self, key: str) -> list[bytes]:
        """Returns every version of a key, the oldest first.  Nothing measures it: it shows that they are all kept."""
        ...

    async def bytes_in_memory(self) -> int:
        """Returns the memory of what keeps contexts at hand."""
        ...
