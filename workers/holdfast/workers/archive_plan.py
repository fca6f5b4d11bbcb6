"""What to do with a run of messages, decided without touching anything: values in, values out."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

import msgspec

from holdfast.lake.joints import to_joint
from holdfast.schemas import limits
from holdfast.schemas.errors import ConflictError, HoldfastError, UnavailableError
from holdfast.schemas.refs import Digest
from holdfast.schemas.rows import Anchor, ContextRow, EventRow, KeyVersionRow, Row, Table
from holdfast.streams.decode import decode_context, decode_event, decode_key_version
from holdfast.streams.hot import NewContext
from holdfast.streams.messages import StoredMessage

ANCHOR_EVERY: Final = 1_000
"""An anchor for each thousand messages, and one for the last: what a lost tail is measured against."""

DECODED_BYTES: Final = 32 * limits.MIB
"""Most bytes decoded at once, bodies inflated: a thousandfold compressed, a small run could fill any memory."""

EventKey = tuple[str, str]
VersionKey = tuple[str, str, int]


class Rejected(msgspec.Struct, frozen=True):
    """A message that will be a dead letter, and why."""

    message: StoredMessage
    error: HoldfastError


class DecodedRun(msgspec.Struct, frozen=True):
    """A run of messages, decoded: rows in stream order, what came inline at which sequence, what is none of ours.

    ``taken`` says of how many messages: less than were given when they inflate beyond the bound.  ``size`` is what
    payloads and bodies have in bytes.
    """

    rows: list[Row]
    inline: list[tuple[int, NewContext]]
    rejected: list[Rejected]
    taken: int
    size: int


class Decided(msgspec.Struct):
    """What the earlier pieces of a run bring, which the later ones are measured against.

    ``digests`` of the contexts, ``chunks`` those of them that are chunks, ``by_key`` the events or key versions.
    """

    digests: set[Digest] = set()
    chunks: set[Digest] = set()
    by_key: dict[EventKey | VersionKey, Row] = {}


class Deduplicated(msgspec.Struct, frozen=True):
    """Rows to be committed, how many repetitions were left out, and rows that contradict an earlier one.

    ``contested`` are rows whose key the lake holds already: whether they repeat it or contradict it, its row tells.
    """

    rows: list[Row]
    repeated: int
    contested: list[Row]


def decode_run(table: Table, messages: Sequence[StoredMessage], *, max_bytes: int = DECODED_BYTES) -> DecodedRun:
    """Decodes a run, at least its first message, up to ``max_bytes``; never raises for what one holds."""
    rows: list[Row] = []
    inline: list[tuple[int, NewContext]] = []
    rejected: list[Rejected] = []
    size = taken = 0
    for message in messages:
        if size >= max_bytes:
            break
        taken += 1
        size += len(message.payload)
        try:
            if table == "contexts":
                context = decode_context(message)
                size += len(context.body)
                rows.append(context)
            elif table == "events":
                event = decode_event(message)
                rows.append(event.row)
                if event.inline is not None:
                    inline.append((message.seq, event.inline))
            else:
                rows.append(decode_key_version(message))
        except HoldfastError as error:
            rejected.append(Rejected(message, error))
    return DecodedRun(rows, inline, rejected, taken, size)


def deduplicate_contexts(rows: Sequence[Row], archived: Container[Digest], decided: Decided | None = None) -> list[Row]:
    """Returns the rows with each digest's body once: one that the lake, or an earlier row, holds becomes a touch.

    A context is stored again only after it had left the hot tier; retention then counts from the last storing.
    ``decided`` is what the run brought so far, and is brought up to it.
    """
    seen = Decided().digests if decided is None else decided.digests
    kept: list[Row] = []
    for row in rows:
        if not isinstance(row, ContextRow):
            raise TypeError(f"not a context: {type(row).__name__}")
        if row.digest in archived or row.digest in seen:
            kept.append(msgspec.structs.replace(row, form="touch", body=b""))
        else:
            seen.add(row.digest)
            kept.append(row)
    return kept


def join_contexts(rows: Sequence[Row], archived: Container[Digest], decided: Decided | None = None) -> list[Row]:
    """Returns the rows with chunks of chunks as joints, of which the lake holds, or gets with this run, every part.

    ``rows`` are deduplicated; ``archived`` tells of their parts as well.  ``decided`` is what the run brought so far,
    and is brought up to it.
    """
    contexts = [row for row in rows if isinstance(row, ContextRow)]
    brought = Decided().chunks if decided is None else decided.chunks
    brought.update(row.digest for row in contexts if row.form == "chunk")
    held = {digest for row in contexts for digest, _ in row.parts if digest in brought or digest in archived}
    return [to_joint(row, held) if isinstance(row, ContextRow) else row for row in rows]


def deduplicate_by_key(
    rows: Sequence[Row], archived: Container[EventKey | VersionKey], decided: Decided | None = None
) -> Deduplicated:
    """Returns events, or key versions, with each key once; a repetition is told from a contradiction by content.

    ``decided`` is what the run brought so far, and is brought up to it.
    """
    first = Decided().by_key if decided is None else decided.by_key
    kept: list[Row] = []
    repeated = 0
    contested: list[Row] = []
    for row in rows:
        key = key_of(row)
        earlier = first.get(key)
        if earlier is not None:
            if same_content(earlier, row):
                repeated += 1
            else:
                contested.append(row)
        elif key in archived:
            contested.append(row)
        else:
            first[key] = row
            kept.append(row)
    return Deduplicated(kept, repeated, contested)


def key_of(row: Row) -> EventKey | VersionKey:
    """What makes an event, or a key version, the same one wherever it is met again."""
    if isinstance(row, EventRow):
        return (row.namespace, row.id)
    if isinstance(row, KeyVersionRow):
        return (row.namespace, row.key, row.version)
    raise TypeError(f"contexts are keyed by their digest, not {type(row).__name__}")


def identity_key(row: Row) -> Digest | EventKey | VersionKey:
    """What the index knows any row by: a context by its digest, another as :func:`key_of` says."""
    return row.digest if isinstance(row, ContextRow) else key_of(row)


def same_content(one: Row, other: Row) -> bool:
    """Whether two rows say the same, wherever and whenever they were stored.

    An event without a time carries the server's, another one each time it is stored; restored from a checkpoint, it
    says the first of them.
    """
    if _carries_server_time(one) or _carries_server_time(other):
        one, other = (msgspec.structs.replace(row, timestamp_ms=0) for row in (one, other))
    return _content(one) == _content(other)


def contradiction(row: Row, message: StoredMessage) -> Rejected:
    """Returns the dead letter of a row whose key names another content already."""
    return Rejected(
        message,
        ConflictError(
            f"{' '.join(map(str, key_of(row)))} names another content already",
            field="id",
            hint="ids must be unique; publish it again under a new id",
        ),
    )


def anchors_of(rows: Sequence[Row]) -> list[Anchor]:
    """Returns the anchors of a run: each thousandth message by sequence, and the last."""
    chosen = [row for row in rows if row.seq % ANCHOR_EVERY == 0]
    if rows and (not chosen or chosen[-1].seq != rows[-1].seq):
        chosen.append(rows[-1])
    return [Anchor(row.seq, row.stored_at_ms, identity_of(row)) for row in chosen]


def continue_anchors(earlier: Sequence[Anchor], rows: Sequence[Row]) -> list[Anchor]:
    """Returns the anchors of a run of which ``earlier`` are those so far, and ``rows`` come next."""
    if not rows:
        return list(earlier)
    # The last one stood for the end, which is another one now.
    kept = earlier if not earlier or earlier[-1].seq % ANCHOR_EVERY == 0 else earlier[:-1]
    return [*kept, *anchors_of(rows)]


def identity_of(row: Row) -> str:
    """What an anchor remembers a row by."""
    if isinstance(row, ContextRow):
        return row.digest
    if isinstance(row, EventRow):
        return row.id
    return f"{row.key}/{row.version}"


def plan_purge(
    *,
    watermark: int,
    first_seq: int,
    last_seq: int,
    first_young_seq: int | None,
    messages: int,
    most_messages: int | None,
) -> int | None:
    """Returns the sequence below which a stream may be purged now, or None when nothing is to go.

    Only what is archived goes (up to ``watermark``): what is older than the hot window (below ``first_young_seq``; None
    when every message is), and the oldest beyond ``most_messages``.
    """
    by_age = last_seq if first_young_seq is None else first_young_seq - 1
    by_count = 0 if most_messages is None else first_seq + messages - most_messages - 1
    last = min(watermark, max(by_age, by_count))
    return last + 1 if messages and last >= first_seq else None


def _carries_server_time(row: Row) -> bool:
    return not isinstance(row, ContextRow) and row.timestamp_ms == row.stored_at_ms


def _content(row: Row) -> Row:
    return msgspec.structs.replace(row, seq=0, epoch="", stored_at_ms=0)


def lake_unavailable(error: OSError) -> HoldfastError:
    """Returns what to tell when the operating system refuses to write the lake."""
    return UnavailableError(
        f"the lake cannot be written: {error.strerror or error}",
        hint="free space or mend the disk; what is acknowledged stays in the streams meanwhile",
    )
