"""What a restore writes, decided page by page; what it must remember of other pages is in a :class:`Scratch`.

Kept are, by the first byte of the key: ``e`` and ``v``, where an event or a version stands first in the file and what
it says; ``k``, from which version on the chain of a key has no gap; ``t`` before one of these, what the store held
before the restore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client.checkpoint_items import Decoded, chain_key, content, decode_items, identity, item_of
from holdfast.schemas.errors import ConflictError
from holdfast.schemas.rows import EventRow, KeyVersionRow

if TYPE_CHECKING:
    from holdfast.client.checkpoint_file import Header, Item
    from holdfast.client.checkpoint_scratch import Scratch
    from holdfast.streams.messages import StoredMessage

_CONTENT_BYTES: Final = 16
_UNKNOWN, _SAME, _FOREIGN = range(3)


class _Chain(msgspec.Struct, array_like=True):
    """Of a key: the oldest version of the file that no other is missing behind, and the newest."""

    start: int
    last: int


class _Target(msgspec.Struct, array_like=True):
    """Of a key that the store had before: its newest version, and whether the file's chain is the same one."""

    version: int
    content: bytes
    state: int = 0


_CHAIN: Final = msgspec.msgpack.Decoder(_Chain)
_TARGET: Final = msgspec.msgpack.Decoder(_Target)


class EventPlan(msgspec.Struct):
    """Events that are to be published, those that contradict another one of their id, and counts of the rest."""

    new: list[Decoded] = []
    contradicting: list[Decoded] = []
    present: int = 0
    repeated: int = 0


def plan_events(decoded: Sequence[Decoded], scratch: Scratch) -> EventPlan:
    """Returns what is to be done with a page of events."""
    plan = EventPlan()
    rows = [(item, item.row, identity(item.row)) for item in decoded if isinstance(item.row, EventRow)]
    first = scratch.find([key for _, _, key in rows])
    there = scratch.find([b"t" + key for _, _, key in rows])
    for item, row, key in rows:
        if first[key][_CONTENT_BYTES:] != _seq_bytes(item.item.seq):
            if first[key][:_CONTENT_BYTES] == content(row):
                plan.repeated += 1
            else:
                plan.contradicting.append(_contradiction(item, row))
        elif b"t" + key in there:
            plan.present += 1
        else:
            plan.new.append(item)
    return plan


class VersionPlan(msgspec.Struct):
    """Versions that are to be written, keys whose chain is another one, and counts of the rest."""

    rows: list[KeyVersionRow] = []
    contradicting: list[Decoded] = []
    foreign: list[str] = []
    present: int = 0
    repeated: int = 0
    skipped: int = 0


def plan_versions(decoded: Sequence[Decoded], scratch: Scratch) -> VersionPlan:
    """Which versions of a page are to be written; remembers of keys that were there which chain they have."""
    plan = VersionPlan()
    rows = [(item, item.row) for item in decoded if isinstance(item.row, KeyVersionRow)]
    chains = [chain_key(row) for _, row in rows]
    starts = scratch.find(chains)
    first = scratch.find([identity(row) for _, row in rows])
    there = {key: _TARGET.decode(raw) for key, raw in scratch.find([b"t" + key for key in chains]).items()}
    for (item, row), chain in zip(rows, chains, strict=True):
        told = first[identity(row)]
        if told[_CONTENT_BYTES:] != _seq_bytes(item.item.seq):
            if told[:_CONTENT_BYTES] == content(row):
                plan.repeated += 1
            else:
                plan.contradicting.append(_contradiction(item, row))
            continue
        if row.version < _CHAIN.decode(starts[chain]).start:
            # The rest of the chain was trimmed while it was captured: what the store holds of it is always its end.
            plan.skipped += 1
            continue
        target = there.get(b"t" + chain)
        if target is None:
            plan.rows.append(row)
        elif target.state != _FOREIGN and row.version < target.version:
            plan.present += 1
        elif target.state == _UNKNOWN and row.version == target.version and target.content == content(row):
            target.state = _SAME
            plan.present += 1
        elif target.state == _SAME:
            plan.rows.append(row)
        else:
            if target.state != _FOREIGN:
                plan.foreign.append(row.key)
            target.state = _FOREIGN
            plan.skipped += 1
    scratch.put((key, msgspec.msgpack.encode(target)) for key, target in there.items())
    return plan


def _contradiction(item: Decoded, row: EventRow | KeyVersionRow) -> Decoded:
    name = row.id if isinstance(row, EventRow) else f"version {row.version} of {row.key}"
    error = ConflictError(
        f"{name} of namespace {row.namespace} names another content already",
        field="id",
        hint="ids must be unique; publish it again under a new id",
    )
    return msgspec.structs.replace(item, row=error)


def note_page(header: Header, page: Sequence[Item], scratch: Scratch) -> None:
    """Remembers of each event and version where it stands first, and of each key from where on its chain is whole."""
    decoded = decode_items(header, page)
    rows = [(item.item.seq, item.row) for item in decoded if isinstance(item.row, EventRow | KeyVersionRow)]
    scratch.add((identity(row), content(row) + _seq_bytes(seq)) for seq, row in rows)
    versions = [row for _, row in rows if isinstance(row, KeyVersionRow)]
    if not versions:
        return
    chains = {key: _CHAIN.decode(raw) for key, raw in scratch.find([chain_key(row) for row in versions]).items()}
    for row in versions:
        chain = chains.get(chain_key(row))
        if chain is None:
            chains[chain_key(row)] = _Chain(row.version, row.version)
        elif row.version > chain.last:
            if row.version != chain.last + 1:
                chain.start = row.version
            chain.last = row.version
    scratch.put((key, msgspec.msgpack.encode(chain)) for key, chain in chains.items())


def note_target(stream: int, messages: Sequence[StoredMessage], scratch: Scratch) -> None:
    """Remembers events, and the newest version of each key, of messages of a stream of the store."""
    known = [item_of(stream, message).row for message in messages]
    scratch.put((b"t" + identity(row), b"") for row in known if isinstance(row, EventRow))
    heads = {
        b"t" + chain_key(row): msgspec.msgpack.encode(_Target(row.version, content(row)))
        for row in known
        if isinstance(row, KeyVersionRow)
    }
    scratch.put(heads.items())


def _seq_bytes(seq: int) -> bytes:
    return seq.to_bytes(8, "little")
