"""What readers show, as plain data."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Reader = Literal["sdk", "raw", "live", "lake", "streams"]

MISSING: Final = "missing"
"""In the place of a hash: the reader says that there is no such context."""


class SeenEvent(msgspec.Struct, frozen=True, gc=False):
    """An event as a reader shows it; ``order`` is its place among all events of that reader."""

    id: str
    sha256: str
    context: str | None
    order: int


class SeenVersion(msgspec.Struct, frozen=True, gc=False):
    """A version of a key as a reader shows it: the hash is of its body, empty for a tombstone."""

    key: str
    version: int
    ref: str | None
    sha256: str
    change_type: str | None = None


class View(msgspec.Struct):
    """What one reader shows.  A context may be there twice, which is what a checker looks for.

    ``is_whole``: whether everything acknowledged must be in it.
    """

    is_whole: bool
    contexts: list[tuple[str, str]] = []
    events: list[SeenEvent] = []
    versions: list[SeenVersion] = []
    errors: list[str] = []


class Placed(msgspec.Struct, frozen=True, gc=False):
    """What stands at a place of a stream: ``where`` is ``lake`` or ``stream``, ``identity`` names the content."""

    stream: str
    epoch: str
    seq: int
    identity: str
    where: Literal["lake", "stream"]


class Mark(msgspec.Struct, frozen=True):
    """Where archiving of a stream stands, and what the stream holds: two things that were read one after another."""

    stream: str
    epoch: str
    watermark_epoch: str | None
    watermark: int
    first_seq: int
    last_seq: int
    messages: int

    @property
    def archived(self) -> int:
        """Up to where the stream as it is now was archived: nothing of it, when the watermark is of an earlier one."""
        return self.watermark if self.watermark_epoch == self.epoch else 0


class Observation(msgspec.Struct):
    """Everything that was read, by reader."""

    namespaces: list[str]
    views: dict[Reader, View]
    placed: list[Placed] = []
    marks: list[Mark] = []
