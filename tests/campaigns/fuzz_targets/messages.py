"""Messages of the streams: an event and a version of a key become a row, or a dead letter that holds them as they came.

Holds no tests itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Final

import msgspec

from holdfast.lake.columns import to_batch
from holdfast.schemas import limits
from holdfast.schemas.bodies import check_json
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.ids import is_canonical_uuid
from holdfast.schemas.refs import compute_digest, format_ref, parse_ref
from holdfast.streams import wire
from holdfast.streams.dead import _escaped, _headers_json, _letter, _unescaped
from holdfast.streams.decode import decode_event, decode_key_head, encode_key_version
from holdfast.streams.messages import StoredMessage
from holdfast.workers import key_requests, requests
from tests.campaigns import fuzz_inputs as make
from tests.campaigns.fuzz_targets.target import ASCII, TOKEN, attempt, told

_EVENT_MEMBERS: Final = (
    "id", "event_id", "timestamp", "session_id", "correlation_id", "parent_event_id", "root_event_id", "event_depth",
    "client_id", "originator", "context_ref", "context", "context_kind", "data", "attributes", "source_id", "v",
)  # fmt: skip
HEADERS: Final = (
    *("Nats-Msg-Id", "traceparent", "Nats-Rollup", "Nats-Expected-Last-Subject-Sequence", "Nats-TTL", "Nats-Sequence"),
    *("Nats-Subject", "Nats-Time-Stamp", "Status", "Hf-Kind", "Hf-Type", "Hf-Exp", "Hf-Enc", "Hf-Form", "Hf-Parts"),
    *("Hf-V", "hf-lineage", "Hf-Lineage", "Nats-Batch-Id", "Nats-Schedule", ""),
)


def _event_value(rng: random.Random, name: str) -> bytes:
    if rng.random() < 0.35:
        return make.json_text(rng, 2)
    match name:
        case "timestamp":
            return rng.choice((b'"2026-01-31T09:30:00Z"', b"1769851800", b"1769851800123", b"1.5", b'"2026-01-31"'))
        case "event_depth" | "v":
            return rng.choice((b"1", b"0", b"64", b"2147483647"))
        case "context_ref":
            return b'"ctx_note_' + b"a" * 32 + b'"'
        case "context" | "data" | "attributes":
            return make.good_json(rng, 2)
        case _:
            return b'"' + make.good_name(rng).encode() + b'"'


def make_event(rng: random.Random) -> tuple[str, dict[str, str], bytes]:
    subject = f"ctx.{make.token(rng)}.event.{make.token(rng)}.{make.token(rng)}"
    if rng.random() < 0.05:
        subject = make.text(rng)
    subject = arrived(subject)
    if rng.randrange(5_000) == 0:
        size = limits.EVENT_BYTES - 11 + rng.choice((-1, 0, 1))
        return subject, {}, b'{"data":"' + b"x" * size + b'"}'
    body = make.payload(rng, lambda rng: make.members(rng, _EVENT_MEMBERS, _event_value))
    return subject, make.headers(rng, HEADERS), body


def arrived(subject: str) -> str:
    """A subject as a client sees it: bytes that are not UTF-8 have been replaced."""
    return subject.encode("utf-8", "replace").decode()


def stored(given: tuple[str, Mapping[str, str], bytes]) -> StoredMessage:
    return StoredMessage(given[0], given[1], given[2], 7, 1_769_851_800_123, "e" * 16)


def check_event(given: tuple[str, dict[str, str], bytes]) -> str:
    message = stored(given)
    try:
        event = decode_event(message)
    except HoldfastError as error:
        code = told(error)
        check_burial(message)
        return code
    assert decode_event(message) == event, "another row the second time"
    row = event.row
    assert wire.event_subject(row.namespace, row.agent_id, row.name) == message.subject
    assert is_canonical_uuid(row.id)
    for raw in (row.data, row.extra):
        if raw is not None:
            check_json(raw)
    if event.inline is not None:
        assert row.context_ref == format_ref(
            event.inline.kind, compute_digest(row.namespace, event.inline.kind, event.inline.body)
        )
        check_json(event.inline.body)
    elif row.context_ref is not None:
        parse_ref(row.context_ref)
    json.loads(msgspec.json.encode(requests.event_reply(row)))
    if len(message.payload) % 16 == 0:
        to_batch("events", [row])
    return "ok"


def check_burial(message: StoredMessage) -> None:
    """A message that is refused can be kept as a dead letter, and read again as it came."""
    kept = _headers_json(message.headers)
    assert ASCII.match(kept), "headers that no header holds"
    if len(message.subject) < 1_000:
        assert _unescaped(_escaped(message.subject)) == message.subject
    headers = {wire.H_ORIGIN_HEADERS: kept, wire.H_ORIGIN_SUBJECT: _escaped(message.subject), wire.H_CODE: "x"}
    token = wire.namespace_token(message.subject)
    assert TOKEN.match(token)
    subject = wire.dead_subject(token, wire.EVENTS_STREAM, message.epoch, message.seq)
    letter = _letter(StoredMessage(subject, headers, message.payload, 1, 1, "d"), b"")
    assert letter is not None
    assert letter.payload == message.payload


_VERSION_MEMBERS: Final = (
    "version", "op", "ref", "event_id", "changed_by", "change_type", "tags", "session_id", "agent_id", "timestamp_ms",
    "expires_at_ms", "source", "confidence", "proposed_by", "approved_by", "approved_at_ms", "at", "v",
)  # fmt: skip


def _version_value(rng: random.Random, name: str) -> bytes:
    if rng.random() < 0.3:
        return make.json_text(rng, 2)
    match name:
        case "op":
            return rng.choice((b'"put"', b'"patch"', b'"delete"', b'"expire"', b'"rollback"'))
        case "version" | "v" | "timestamp_ms" | "expires_at_ms" | "approved_at_ms":
            return rng.choice((b"1", b"1769851800123", b"9223372036854775807", b"253402300799999"))
        case "tags":
            return rng.choice((b"[]", b'["a","b"]', b"[" + b",".join([b'"t"'] * 65) + b"]"))
        case "at":
            return rng.choice((b"[]", b"[5,1,2]", b"[-1]", b"[" + b"9" * 25 + b"]"))
        case "confidence":
            return rng.choice((b"0.5", b"1", b"-1e308", b"1e-320"))
        case "ref":
            return b'"ctx_note_' + b"a" * 32 + b'"'
        case _:
            return make.string(rng)


def make_version(rng: random.Random) -> tuple[str, dict[str, str], bytes]:
    subject = arrived(f"{wire.KEYS_PREFIX}{make.token(rng)}.{make.token(rng)}")

    def good(rng: random.Random) -> bytes:
        rest = make.members(rng, _VERSION_MEMBERS, _version_value)
        return b'{"version":3,"op":"put"' + (b"," if len(rest) > 2 else b"") + rest[1:]

    return subject, {}, make.payload(rng, good)


def check_version(given: tuple[str, dict[str, str], bytes]) -> str:
    message = stored(given)
    try:
        row, at = decode_key_head(message)
    except HoldfastError as error:
        code = told(error)
        check_burial(message)
        return code
    assert wire.key_subject(row.namespace, row.key) == message.subject
    again = StoredMessage(message.subject, {}, encode_key_version(row, at), 7, message.stored_at_ms, message.epoch)
    assert decode_key_head(again) == (row, at), "another version after encoding"
    msgspec.json.encode(key_requests.version_members(row))
    if len(message.payload) % 16 == 0:
        attempt(lambda: to_batch("key_versions", [row]))
    return "ok"
