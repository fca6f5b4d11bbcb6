"""How far each stream was seen to reach, kept beside the lake: what a server that forgot its tail is held against.

A damaged block makes nats-server drop everything behind the damage when it recovers from a crash, without a word: the
stream simply ends earlier, and gives the sequences out again.  What was archived is in the lake, and its anchors show
the loss; for what was not, there is this mark: the last message seen, twice a second while the archiver runs.  What
was acknowledged after the last mark and lost before it was archived leaves no trace on one server.
"""

from __future__ import annotations

import logging
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from holdfast.lake.files import write_durably
from holdfast.streams.pull import StreamReader, read_one

if TYPE_CHECKING:
    from holdfast.schemas.rows import Position
    from holdfast.streams.connection import Connection
    from holdfast.streams.messages import StoredMessage
    from holdfast.streams.topology import StreamInfo

logger = logging.getLogger(__name__)

FILE: Final = ".streams.json"
_READ: Final = 2_000


class Mark(msgspec.Struct, frozen=True):
    """The last message seen of a stream: where it stood, when it was stored, and a digest of it."""

    epoch: str
    seq: int
    stored_at_ms: int
    digest: str


class _File(msgspec.Struct):
    streams: dict[str, Mark] = {}
    v: int = 1


class StreamMarks:
    """The marks of one lake.  The active archiver writes them; a file that cannot be read counts as none."""

    def __init__(self, lake: Path) -> None:
        self._path = lake / FILE

    def get(self, stream: str) -> Mark | None:
        """Returns a stream's mark."""
        return self._all().get(stream)

    def _all(self) -> dict[str, Mark]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_File).streams
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning(
                "the marks of the streams cannot be read: a tail lost before now would not show",
                extra={"action": "marks_unreadable", "path": str(self._path), "error": str(error)},
            )
            return {}

    def put(self, stream: str, mark: Mark) -> None:
        """Keeps a stream's mark, durably.  Raises OSError when the disk refuses."""
        marks = self._all() | {stream: mark}
        write_durably(self._path, msgspec.json.encode(_File(streams=marks)))


def mark_of(message: StoredMessage) -> Mark:
    """Returns the mark that a message makes."""
    digest = blake2b(message.subject.encode() + b"\n" + message.payload, digest_size=16).hexdigest()
    return Mark(message.epoch, message.seq, message.stored_at_ms, digest)


async def newest_mark(connection: Connection, info: StreamInfo, known: Mark | None) -> Mark | None:
    """Returns the mark of a stream's last message; None when it is known already, or there is no such message."""
    if not info.last_seq or (
        known is not None and (known.epoch, known.seq) == (info.epoch_at(info.last_seq), info.last_seq)
    ):
        return None
    message = await read_one(connection, info, info.last_seq)
    return None if message is None else mark_of(message)


async def _missing(connection: Connection, info: StreamInfo, first_seq: int, last_seq: int) -> list[tuple[int, int]]:
    """Returns the ranges of sequences at which a stream holds nothing that can be read."""
    missing: list[tuple[int, int]] = []
    expected = first_seq
    reader = StreamReader(connection, info.name, first_seq, allow_gaps=True)
    try:
        while reader.next_seq <= last_seq:
            messages, _ = await reader.read(limit=_READ, up_to=last_seq)
            if not messages:
                break
            for message in messages:
                if message.seq > expected:
                    missing.append((expected, message.seq - 1))
                expected = message.seq + 1
    finally:
        await reader.close()
    return missing if expected > last_seq else [*missing, (expected, last_seq)]


class Lost(NamedTuple):
    """What a stream has lost that was not archived; ``is_cut``: its end, so that sequences are given out again."""

    what: str
    is_cut: bool


async def lost_since(
    connection: Connection, info: StreamInfo, mark: Mark | None, watermark: Position | None, *, may_be_trimmed: bool
) -> Lost | None:
    """Returns what a stream has lost of what was seen and not archived; None when nothing.

    ``may_be_trimmed``: whether single messages may have left the stream rightly.
    """
    archived = watermark.seq if watermark is not None and watermark.epoch == info.epoch else 0
    if mark is None or mark.epoch != info.epoch or mark.seq <= archived:
        return None
    if info.last_seq < mark.seq:
        first = max(info.last_seq, archived) + 1
        what = f"{mark.seq - first + 1} messages, {first} to {mark.seq}, were stored and not archived, and are gone"
        return Lost(what, is_cut=True)
    if mark.seq < info.first_seq:
        return None  # purged: below a watermark that is read anew
    message = await read_one(connection, info, mark.seq)
    if message is None:
        if may_be_trimmed:
            return None
        # Stopped cleanly, the server believes its own account of a block that has lost its end.
        missing = await _missing(connection, info, max(archived + 1, info.first_seq), mark.seq)
        named = ", ".join(f"{first} to {last}" for first, last in missing)
        return Lost(f"{named} were stored and not archived, and cannot be read", is_cut=False)
    found = mark_of(message)
    if (found.stored_at_ms, found.digest) == (mark.stored_at_ms, mark.digest):
        return None
    what = (
        f"another message stands at {mark.seq}, which was stored and not archived: the stream lost its tail and went "
        f"on; some of {archived + 1} to {mark.seq} are gone"
    )
    return Lost(what, is_cut=True)
