"""What stands in a checkpoint, decided without touching anything: from a stream's message to an item, and back.

Server time is new after a restore.  So whatever an item takes from its place in the stream is written into it when it
goes back: the id of an event that has none, the time of an event or version that gives none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client.checkpoint_file import CONTEXTS, DEAD, EVENTS, KEYS, STREAMS, Header, Item
from holdfast.client.checkpoint_scratch import fingerprint
from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.ids import iso_from_ms
from holdfast.schemas.refs import Digest, digest_to_bytes, parse_ref
from holdfast.schemas.rows import ContextRow, EventRow, KeyVersionRow, Row
from holdfast.streams.codec import StoredForm, decode_manifest
from holdfast.streams.decode import (
    decode_context,
    decode_event,
    decode_key_version,
    encode_key_version,
    timestamps_agree,
)
from holdfast.streams.messages import StoredMessage
from holdfast.streams.publish import Outgoing
from holdfast.streams.wire import H_EXPECT_SUBJECT_SEQ, H_MSG_ID, key_subject, message_id

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

_SERVER_HEADERS: Final = "nats-"
_SENDABLE: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ROW: Final = msgspec.msgpack.Encoder()


class Decoded(msgspec.Struct, frozen=True):
    """An item and what it holds: a row, nothing (a dead letter), or why it is neither."""

    item: Item
    row: Row | HoldfastError | None
    is_inline: bool = False
    """Of an event: its context came with it, and is stored by whoever reads it."""


def item_of(stream: int, message: StoredMessage) -> Decoded:
    """Returns the item of a message of ``STREAMS[stream]``, and what it holds.

    Headers of the server's are left out: they were about storing it, once.  An event's id is what readers know it by.
    """
    headers = {
        name: value
        for name, value in message.headers.items()
        if name == H_MSG_ID or not name.lower().startswith(_SERVER_HEADERS)
    }
    item = Item(stream, message.subject, message.seq, message.stored_at_ms, headers, message.payload)
    decoded = _decode(item, message)
    if isinstance(decoded.row, EventRow):
        return msgspec.structs.replace(decoded, item=msgspec.structs.replace(item, event_id=decoded.row.id))
    return decoded


def decode_item(header: Header, item: Item) -> Decoded:
    """Returns what an item of a file holds, a context checked against its digest."""
    return _decode(item, message_of(header, item))


def decode_items(header: Header, items: Iterable[Item]) -> list[Decoded]:
    """As :func:`decode_item`, of many."""
    return [decode_item(header, item) for item in items]


def message_of(header: Header, item: Item) -> StoredMessage:
    """Returns the message that an item was, where it was."""
    return StoredMessage(
        subject=item.subject,
        headers=item.headers,
        payload=item.payload,
        seq=item.seq,
        stored_at_ms=item.stored_at_ms,
        epoch=header.points[item.stream].epoch,
    )


def form_of(decoded: Decoded) -> StoredForm:
    """Returns the stored form of a context's item."""
    assert isinstance(decoded.row, ContextRow)
    return StoredForm(decoded.row.digest, _sendable(decoded.item.headers), decoded.item.payload)


def event_message(decoded: Decoded) -> Outgoing:
    """Returns the message that stores an event again, under the id and with the time that it has.

    An event that leaves no room for its time keeps none, and gets that of its new place.
    """
    row, item = decoded.row, decoded.item
    assert isinstance(row, EventRow)
    members = _MEMBERS.decode(item.payload)
    headers = _sendable(item.headers)
    prefix = message_id(row.namespace, "")
    given = item.headers.get(H_MSG_ID, "").removeprefix(prefix)
    # An id in the payload comes before the header's, which is then free to be the one that repetitions are told by.
    if not given or _has(members, "id") or _has(members, "event_id"):
        given = row.id
    headers[H_MSG_ID] = prefix + given
    payload = item.payload
    if not _has(members, "timestamp") and not timestamps_agree(row.id, row.timestamp_ms):
        members["timestamp"] = msgspec.Raw(msgspec.json.encode(iso_from_ms(row.timestamp_ms)))
        timed = msgspec.json.encode(members)
        payload = timed if len(timed) <= limits.EVENT_BYTES else payload
    return Outgoing(item.subject, headers, payload)


def version_message(row: KeyVersionRow, after_seq: int | None) -> Outgoing:
    """Returns the message that stores a version again, behind a sequence of its key (None: behind the one before)."""
    headers = {} if after_seq is None else {H_EXPECT_SUBJECT_SEQ: str(after_seq)}
    # Where the parts of its body stood is not where they stand now.
    return Outgoing(key_subject(row.namespace, row.key), headers, encode_key_version(row))


def letter_message(item: Item) -> Outgoing:
    """Returns the message that stores a dead letter again, unless it is there."""
    return Outgoing(item.subject, _sendable(item.headers) | {H_EXPECT_SUBJECT_SEQ: "0"}, item.payload)


def refs_of(decoded: Decoded) -> Sequence[Digest]:
    """Returns the contexts that an item needs to be understood: what it refers to, or consists of."""
    row = decoded.row
    match row:
        case ContextRow(form="manifest"):
            return decode_manifest(row.body).chunks
        case EventRow() if row.context_ref is not None and not decoded.is_inline:
            return [_digest(row.context_ref)]
        case KeyVersionRow() if row.ref is not None:
            return [_digest(row.ref)]
        case _:
            return []


def digest_key(digest: Digest) -> bytes:
    """Returns what a digest is remembered by."""
    return b"c" + digest_to_bytes(digest)


def identity(row: EventRow | KeyVersionRow) -> bytes:
    """Returns what makes an event, or a version, the same one wherever it is met again."""
    if isinstance(row, EventRow):
        return b"e" + fingerprint(row.namespace, row.id)
    return b"v" + fingerprint(row.namespace, row.key, str(row.version))


def content(row: EventRow | KeyVersionRow) -> bytes:
    """Returns what stands for all that a row says, wherever and whenever it was stored."""
    return fingerprint(_ROW.encode(msgspec.structs.replace(row, seq=0, epoch="", stored_at_ms=0)))


def chain_key(row: KeyVersionRow) -> bytes:
    """Returns what a key is remembered by."""
    return b"k" + fingerprint(row.namespace, row.key)


def _decode(item: Item, message: StoredMessage) -> Decoded:
    try:
        if item.stream == CONTEXTS:
            return Decoded(item, decode_context(message))
        if item.stream == KEYS:
            return Decoded(item, decode_key_version(message))
        if item.stream == EVENTS:
            event = decode_event(message)
            return Decoded(item, event.row, event.inline is not None)
    except HoldfastError as error:
        return Decoded(item, error)
    return Decoded(item, None)


def _digest(ref: Ref) -> Digest:
    return parse_ref(ref).digest


def _has(members: dict[str, msgspec.Raw], name: str) -> bool:
    given = members.get(name)
    return given is not None and bytes(given).strip() != b"null"


def _sendable(headers: dict[str, str]) -> dict[str, str]:
    """Headers that a client of NATS sends: any publisher may have made up others."""
    return {name: value for name, value in headers.items() if _SENDABLE.match(name) and name != H_MSG_ID}


__all__ = ["CONTEXTS", "DEAD", "EVENTS", "KEYS", "STREAMS", "Decoded"]
