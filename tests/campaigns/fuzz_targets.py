"""What the fuzz campaign feeds: one target for each way in, with what must hold whatever comes.

A target makes an input from a random generator and checks it.  A check returns what became of the input; a typed error
of Holdfast's is an answer like another, any other exception is a violation, and so is a broken property
(AssertionError).  Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from nats.aio.msg import Msg
from nats.errors import ProtocolError

from holdfast.client import key_ring
from holdfast.client.encryption import open_sealed
from holdfast.client.encryption import seal as encrypt
from holdfast.client.handler_control import decode_instruction
from holdfast.client.key_file import parse_key_file
from holdfast.client.lineage_context import from_dict, from_headers, from_traceparent, merge, to_headers
from holdfast.lake.columns import to_batch
from holdfast.lake.scan import Place, decode_cursor
from holdfast.ops.export_format import read_export
from holdfast.ops.settings import Settings, load_settings
from holdfast.schemas import limits
from holdfast.schemas.bodies import check_content_type, check_json, decode_body, encode_body, encode_json
from holdfast.schemas.errors import HoldfastError, IntegrityError
from holdfast.schemas.ids import is_canonical_uuid, normal_event_id, packed_event_id, unpacked_source_id
from holdfast.schemas.names import (
    check_agent,
    check_event_name,
    check_key,
    check_kind,
    check_namespace,
    decode_token,
    encode_token,
    is_token,
)
from holdfast.schemas.policies import decode_policies
from holdfast.schemas.refs import (
    JSON,
    compute_digest,
    digest_from_bytes,
    digest_to_bytes,
    format_ref,
    is_digest,
    parse_ref,
)
from holdfast.streams import wire
from holdfast.streams.codec import decode_manifest, join, reseal, seal, unseal
from holdfast.streams.dead import _escaped, _headers_json, _letter, _unescaped
from holdfast.streams.decode import decode_context, decode_event, decode_key_head, encode_key_version
from holdfast.streams.lean import Lean
from holdfast.streams.messages import StoredMessage, is_delivery, message_of_delivery, parse_time_ms
from holdfast.streams.publish import Refused, _acknowledged
from holdfast.streams.retry import NoResponderError
from holdfast.streams.service import ErrorBody, ErrorReply, decode_request
from holdfast.streams.tolerant_client import TolerantClient
from holdfast.workers import (
    control,
    key_requests,
    requests,
    resolver_conversations,
    resolver_receipts,
    resolver_snapshots,
    resolver_warm,
)
from tests.campaigns import fuzz_inputs as make

Check = Callable[[Any], str]
TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\Z")
_ASCII: Final = re.compile(r"[\x20-\x7e]*\Z")
MESSAGE_CHARS: Final = 4_000
"""Longest message of an error: it goes into replies, headers and logs."""


class Target(NamedTuple):
    """``make(rng)`` draws an input, ``check(input)`` says what became of it.  ``share``: of the inputs, relatively."""

    name: str
    make: Callable[[random.Random], Any]
    check: Check
    share: float = 1.0


def told(error: HoldfastError) -> str:
    """The code of an error that could be told to whoever asked, in a reply, a header and a dead letter."""
    message = str(error)
    assert message, "an error without a message"
    assert len(message) <= MESSAGE_CHARS, f"a message of {len(message)} characters"
    msgspec.json.encode(ErrorReply(ErrorBody.of(error)))
    assert _ASCII.match(_escaped(message[:1_000])), "a reason that no header holds"
    return error.code


def attempt(call: Callable[[], Any]) -> str:
    """What became of a call: ``ok``, or the code of the typed error it raised."""
    try:
        call()
    except HoldfastError as error:
        return told(error)
    return "ok"


def drive(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise AssertionError("it waits for something")


# refs and names


def make_ref(rng: random.Random) -> object:
    kind = rng.random()
    if kind < 0.4:
        digest = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz234567", k=32))
        return format_ref(make.good_name(rng) if kind < 0.3 else make.text(rng), digest)
    if kind < 0.9:
        return make.text(rng)
    return make.python_value(rng, 1)


def check_ref(given: object) -> str:
    def whole() -> None:
        kind, digest = parse_ref(given)
        assert format_ref(kind, digest) == given
        assert TOKEN.match(kind)
        raw = digest_to_bytes(digest)
        assert digest_from_bytes(raw) == digest
        assert len(raw) == 20

    return attempt(whole)


def make_name(rng: random.Random) -> tuple[str, str, str]:
    return make.text(rng), make.text(rng), make.token(rng)


def check_names(given: tuple[str, str, str]) -> str:
    first, second, token = given

    def encoded() -> None:
        made = encode_token(first)
        assert TOKEN.match(made), made[:80]
        assert is_token(made)
        assert decode_token(made) == first

    def decoded() -> None:
        name = decode_token(token)
        assert encode_token(name) == token, "two tokens of one name"

    def event() -> None:
        subject = wire.event_subject(first, second, second)
        assert all(TOKEN.match(part) for part in subject.split("."))
        assert len(subject) < 4_000
        assert wire.parse_event_subject(subject) == (first, second, second)

    def key() -> None:
        subject = wire.key_subject(check_namespace(first), second)
        assert all(TOKEN.match(part) for part in subject.removeprefix(wire.KEYS_PREFIX).split("."))
        assert len(subject) < 4_000
        assert wire.parse_key_subject(subject) == (first, second)

    def filed() -> None:
        filed_under = wire.namespace_token(f"ctx.{first}.event.x.y")
        assert TOKEN.match(filed_under)
        assert len(wire.dead_subject(filed_under, "CTX_EVENTS", "e" * 16, 2**63)) < 4_000

    def identity() -> None:
        event_id, source = normal_event_id("default", first)
        assert is_canonical_uuid(event_id)
        assert source == first or unpacked_source_id(first) == source
        packed = packed_event_id(first)
        assert packed is None or unpacked_source_id(packed) == first

    calls = (
        encoded,
        decoded,
        event,
        key,
        filed,
        identity,
        lambda: wire.parse_event_subject(f"ctx.{token}.event.{first}"),
    )
    checks = (check_namespace, check_agent, check_event_name, check_key, check_kind, check_content_type)
    outcomes = [attempt(call) for call in calls]
    for check in checks:
        attempt(partial(check, first))
    return outcomes[0]


# events and key versions

_EVENT_MEMBERS: Final = (
    "id", "event_id", "timestamp", "session_id", "correlation_id", "parent_event_id", "root_event_id", "event_depth",
    "client_id", "originator", "context_ref", "context", "context_kind", "data", "attributes", "source_id", "v",
)  # fmt: skip
_HEADERS: Final = (
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
    return subject, make.headers(rng, _HEADERS), body


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
    assert _ASCII.match(kept), "headers that no header holds"
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


# bodies and stored forms


def make_body(rng: random.Random) -> tuple[object, str | None]:
    kind = rng.random()
    if kind < 0.5:
        raw = make.payload(rng, make.good_json)
        return raw, JSON
    if kind < 0.52:
        return make.nested(rng.choice((63, 64, 65, 200))), None
    value = make.python_value(rng)
    return value, rng.choice((None, None, JSON, "text/plain", make.text(rng)))


def check_body(given: tuple[object, str | None]) -> str:
    body, content_type = given

    def whole() -> None:
        raw, chosen = encode_body(body, content_type)  # type: ignore[arg-type]
        try:
            value = decode_body(raw, chosen)
        except HoldfastError:
            # Only text that says of itself that it is other than UTF-8.
            assert chosen != JSON
            raise
        if chosen != JSON:
            return
        _strict_loads(raw)
        # The canonical form is one, however a body came; of a float that JSON cannot hold again there is none.
        once = encode_json(value)
        assert encode_json(decode_body(once, JSON)) == once, "no stable canonical form"

    return attempt(whole)


def _strict_loads(raw: bytes) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was let pass as JSON")

    # Whole numbers are read as text: another reader may have no room for them, and they are JSON all the same.
    json.loads(raw.decode(), parse_constant=refuse, parse_int=str)


class Sealed:
    """Stored forms to be tampered with."""

    @cached_property
    def samples(self) -> list[tuple[str, dict[str, str], bytes]]:
        made: list[tuple[str, dict[str, str], bytes]] = []
        variants: tuple[tuple[bytes, dict[str, Any]], ...] = (
            (b'{"a":1}', {}),
            (b"x" * 3_000, {"content_type": "text/plain; charset=utf-8"}),
            (b"[1,2]", {"expires_at_ms": 1_900_000_000_000}),
            (random.Random(1).randbytes(700_000), {"content_type": "application/octet-stream"}),
        )
        for body, changes in variants:
            made += [(form.digest, form.headers, form.payload) for form in seal("default", "note", body, **changes)]
        return made

    @cached_property
    def bombs(self) -> tuple[bytes, ...]:
        return make.bombs()

    @cached_property
    def ring(self) -> key_ring.KeyRing:
        return key_ring.KeyRing.of({"k1": bytes(range(32))}, "k1")

    @cached_property
    def envelope(self) -> bytes:
        return encrypt(self.ring, "default", "note", b'{"secret":1}', JSON)

    @cached_property
    def export(self) -> bytes:
        from holdfast.ops.export_format import ExportWriter

        file = io.BytesIO()
        writer = ExportWriter(file, "default", created_at_ms=1)
        row = unseal("default", self.samples[0][0], self.samples[0][1], self.samples[0][2], stored_at_ms=1)
        writer.write_context(row)
        writer.finish()
        return file.getvalue()

    @cached_property
    def records(self) -> list[Any]:
        return list(read_export(io.BytesIO(self.export), "the export"))


SEALED: Final = Sealed()


def make_envelope(rng: random.Random) -> tuple[str, Any]:
    kind = rng.random()
    if kind < 0.6:
        digest, given, payload = rng.choice(SEALED.samples[:3] if rng.random() < 0.98 else SEALED.samples)
        if rng.random() < 0.002:
            payload, given = rng.choice(SEALED.bombs), given | {"Hf-Enc": "zstd"}
        elif rng.random() < 0.5:
            payload = make.mutated(rng, payload)
        given = given | make.headers(rng, _HEADERS)
        return "stored", (digest if rng.random() < 0.8 else make.text(rng), given, payload)
    if kind < 0.7:
        chunks = [rng.choice((SEALED.samples[0][0], "a" * 32, make.text(rng))) for _ in range(rng.randrange(4))]
        size = rng.choice((0, 7, 14, 21, 2**40, -1, limits.BODY_BYTES, limits.BODY_BYTES + 1))
        raw = b'{"v":%d,"size":%d,"chunks":' % (rng.choice((1, 2, 3)), size)
        raw += json.dumps(chunks).encode() + b',"tail":' + make.string(rng) + b"}"
        return "manifest", raw if rng.random() < 0.6 else make.mutated(rng, raw)
    if kind < 0.8:
        return "sealed", make.mutated(rng, SEALED.envelope)
    if kind < 0.85:
        return "export", make.mutated(rng, SEALED.export)
    raw = make.payload(rng, lambda rng: make.members(rng, ("v", "active", "keys", "prefixes", "do"), _loose))
    return rng.choice(("keyfile", "policies", "instruction", "error")), raw


def _loose(rng: random.Random, name: str) -> bytes:
    if name == "prefixes":
        return b'{"a":' + make.members(rng, ("ttl_s", "max_versions", "encrypt"), _loose) + b"}"
    return make.json_text(rng) if rng.random() < 0.5 else rng.choice((b"1", b'"k1"', b"{}", b'"redeliver"'))


def check_envelope(given: tuple[str, Any]) -> str:
    kind, value = given

    def stored_form() -> None:
        digest, headers, payload = value
        row = decode_context(StoredMessage(f"{wire.HOT_PREFIX}default.{digest}", headers, payload, 7, 1, "e"))
        assert len(row.body) <= max(limits.CHUNK_BYTES, len(payload)), "inflated beyond its limit"
        if row.form != "manifest":
            said = compute_digest(
                "default", row.kind, row.body, content_type=row.content_type, expires_at_ms=row.expires_at_ms
            )
            assert said == digest, "served what its digest does not name"
            again_headers, again = reseal(row)
            assert unseal("default", digest, again_headers, again, stored_at_ms=1, epoch="e", seq=7) == row
        msgspec.json.encode(requests.context_reply(row, "hot"))

    def manifest() -> None:
        parsed = decode_manifest(value)
        assert 0 <= parsed.size <= limits.BODY_BYTES
        assert all(is_digest(chunk) for chunk in parsed.chunks)
        row = unseal("default", "a" * 32, {"Hf-Kind": "note", "Hf-Form": "manifest"}, value, stored_at_ms=1)
        whole = join(row, dict.fromkeys(parsed.chunks, b"1234567"))
        raise AssertionError(f"joined {whole.size} bytes that no digest names")

    def sealed() -> None:
        try:
            body = open_sealed(SEALED.ring, "default", "note", value)
        except IntegrityError:
            assert value != SEALED.envelope
            raise
        assert value == SEALED.envelope, "an altered envelope was opened"
        assert body == (b'{"secret":1}', JSON)

    def exported() -> None:
        # The line break of the last line may be missing: nothing else.
        assert list(read_export(io.BytesIO(value), "the export")) == SEALED.records, "an altered export was read"

    def error_reply() -> None:
        from holdfast.client.cold import _refusal

        raise _refusal(Msg(_client=None, data=value))  # type: ignore[arg-type]

    match kind:
        case "stored":
            return attempt(stored_form)
        case "manifest":
            return attempt(manifest)
        case "sealed":
            return attempt(sealed)
        case "export":
            return attempt(exported)
        case "keyfile":
            return attempt(lambda: parse_key_file(value, "the key file"))
        case "policies":
            return attempt(lambda: decode_policies(value).policy_for("a.b"))
        case "error":
            return attempt(error_reply)
        case _:
            return attempt(lambda: decode_instruction(value))


# requests, filters, lineage


def _requests() -> list[type[msgspec.Struct]]:
    found: dict[str, type[msgspec.Struct]] = {}
    for module in (requests, key_requests, control, resolver_conversations, resolver_receipts, resolver_snapshots,
                   resolver_warm):  # fmt: skip
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, msgspec.Struct) and name.endswith("Request")
        }
    return [found[name] for name in sorted(found)]


REQUESTS: Final = _requests()
_DECODERS: Final = {kind.__name__: msgspec.json.Decoder(kind) for kind in REQUESTS}
_FIELDS: Final = {kind.__name__: [field.name for field in msgspec.structs.fields(kind)] for kind in REQUESTS}


def request_value(rng: random.Random, name: str) -> bytes:
    """A value for a member of a request: mostly of the right type."""
    if rng.random() < 0.25:
        return make.json_text(rng, 2)
    match name:
        case (
            "limit" | "version" | "v1" | "v2" | "before" | "expected_version" | "older_than_s" | "most_versions" | "ttl"
        ):
            return rng.choice((b"1", b"20", b"1000", b"1001", b"0", b"-1", b"9223372036854775807", b"1.5", b'"never"'))
        case "since" | "until" | "as_of" | "expires_at":
            return rng.choice(
                (
                    b'"2026-01-31T09:30:00Z"',
                    b"1769851800123",
                    b'"0001-01-01T00:00:00+14:00"',
                    b'"9999-12-31T23:59:59-12:00"',
                )
            )
        case "refs" | "digests" | "fields" | "tags" | "deletes" | "event_ids" | "namespaces":
            return b"[" + b",".join(make.string(rng) for _ in range(rng.randrange(4))) + b"]"
        case "body" | "merge" | "item":
            return make.good_json(rng)
        case "bodies" | "expected":
            return b"{" + make.string(rng) + b":" + rng.choice((b"1", b"{}", b"0")) + b"}"
        case "receipts" | "cold" | "body_only":
            return rng.choice((b"true", b"false"))
        case "ref" | "context_ref":
            return b'"ctx_note_' + b"a" * 32 + b'"'
        case "cursor":
            return rng.choice((b'"eyJhIjoxfQ"', b'"WzEsImUiLDFd"', b'""', b'"=="', b'"\\u00e9"'))
        case _:
            return make.string(rng)


def make_request(rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(REQUESTS).__name__
    return kind, make.payload(rng, lambda rng: make.members(rng, _FIELDS[kind], request_value))


def check_request(given: tuple[str, bytes]) -> str:
    kind, payload = given

    def whole() -> None:
        request = decode_request(payload, _DECODERS[kind])
        for call in _uses(request):
            # What one use of a request refuses, another may take.
            attempt(call)

    return attempt(whole)


def _uses(request: Any) -> list[Callable[[], Any]]:
    calls: list[Callable[[], Any]] = []
    cursor = getattr(request, "cursor", None)
    match request:
        case requests.PutRequest():
            calls.append(lambda: requests.context_of_put("default", request))
        case requests.QueryRequest():
            calls += [
                lambda: requests.query_of("default", request),
                lambda: requests.check_fields(request.fields, requests.EVENT_FIELDS),
            ]
        case key_requests.KeyPutRequest():
            calls += [lambda: key_requests.body_of_put("default", request), lambda: key_requests.ttl_of(request.ttl)]
        case key_requests.KeyPatchRequest():
            calls.append(lambda: key_requests.merge_of(request.merge))
        case key_requests.KeyAppendRequest():
            calls.append(lambda: key_requests.decoded(request.item, "item"))
        case key_requests.KeyCommitRequest():
            calls += [partial(key_requests.decoded, body, "bodies") for body in request.bodies.values()]
        case _:
            pass
    for name in ("ref", "context_ref"):
        if getattr(request, name, None):
            calls.append(partial(parse_ref, getattr(request, name)))
    for name in ("since", "until", "as_of"):
        value = getattr(request, name, None)
        if isinstance(value, str | int):
            calls.append(partial(requests.time_ms, value, name))
    if isinstance(cursor, str):
        calls.append(lambda: decode_cursor(cursor))
    return calls


_LINEAGE: Final = (
    "event_id", "_event_id", "parent_event_id", "event_depth", "timestamp", "traceparent", "x", "context_ref",
)  # fmt: skip


def make_filter(rng: random.Random) -> tuple[str, str, str, dict[str, Any]]:
    lineage = {
        rng.choice(_LINEAGE):
        rng.choice((make.text(rng), rng.randrange(-2, 9), None, 1.5))
        for _ in range(rng.randrange(4))
    }  # fmt: skip
    cursor = make.text(rng) if rng.random() < 0.5 else _cursor(rng)
    return make.text(rng), make.text(rng), cursor, lineage


def _cursor(rng: random.Random) -> str:
    import base64

    raw = msgspec.json.encode(Place(rng.randrange(-5, 2**50), make.good_name(rng), rng.randrange(-2, 2**63)))
    if rng.random() < 0.6:
        raw = make.mutated(rng, raw)
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def check_filter(given: tuple[str, str, str, dict[str, Any]]) -> str:
    namespace, pattern, cursor, lineage = given

    def events() -> None:
        subject = wire.event_filter(namespace, pattern)
        tokens = subject.split(".")
        assert tokens[:4] == ["ctx", encode_token(namespace), "event", "*"], "it sees beyond its namespace"
        assert all(token in ("*", ">") or TOKEN.match(token) for token in tokens)

    def keys() -> None:
        subject = wire.key_filter(check_namespace(namespace), pattern)
        assert subject.startswith(f"{wire.KEYS_PREFIX}{encode_token(namespace)}.")
        assert all(TOKEN.match(token) for token in subject.removeprefix(wire.KEYS_PREFIX).split(".")[:-1])

    def place() -> None:
        found = decode_cursor(cursor)
        assert found.stored_at_ms >= 0
        assert 0 <= found.seq < 1 << 63

    def handed_on() -> None:
        normal = from_dict(lineage)
        assert from_dict(normal) == normal
        headers = to_headers(normal)
        assert all(_ASCII.match(value) for value in headers.values())
        assert from_headers(headers) == from_dict(json.loads(headers[next(iter(headers))]))
        merge(normal, {"session_id": "s"})

    outcomes = [attempt(call) for call in (events, keys, place, handed_on)]
    attempt(lambda: from_traceparent(pattern))
    attempt(lambda: from_headers({"hf-lineage": cursor, "Holdfast-Lineage": cursor, "traceparent": pattern}))
    attempt(lambda: wire.reply_subject(namespace, pattern))
    return outcomes[0]


# frames and headers


class Sink(TolerantClient):
    """A client that keeps what its parser hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[int, str, str, dict[str, str] | None, bytes]] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> None:
        read = await self._process_headers(headers)
        message = self._build_message(sid, subject, reply, data, read)
        self.messages.append((sid, message.subject, message.reply, message.headers, message.data))

    async def _process_ping(self) -> None:
        pass

    async def _process_pong(self) -> None:
        pass

    async def _process_err(self, err_msg: str) -> None:
        assert isinstance(err_msg, str)

    async def _process_info(self, info: Any, initial_connection: bool = False) -> None:
        assert isinstance(info, dict)


_NOT_IN_SUBJECT: Final = bytes.maketrans(b" \t\r\n", b"____")


def make_frames(rng: random.Random) -> tuple[str, Any, list[int]]:
    frames: list[tuple[bytes, int, bytes, bytes, bytes]] = []
    for _ in range(rng.randrange(1, 4)):
        raw = (
            make.text(rng).encode("utf-8", "surrogatepass")
            if rng.random() < 0.7
            else rng.randbytes(rng.randrange(1, 9))
        )
        subject = raw.translate(_NOT_IN_SUBJECT)[:4_000] or b"a"
        reply = b"" if rng.random() < 0.5 else make.text(rng).encode("utf-8", "replace").translate(_NOT_IN_SUBJECT)[:99]
        block = b"" if rng.random() < 0.5 else header_block(rng)
        frames.append((subject, rng.randrange(1, 99), reply, block, make.mutated(rng, b'{"a":1}\r\nMSG x 1 1\r\n')))
    wire_bytes = b"".join(framed(frame) for frame in frames)
    cuts = sorted(rng.randrange(len(wire_bytes) + 1) for _ in range(rng.randrange(4)))
    kind = rng.random()
    if kind < 0.5:
        return "whole", frames, cuts
    if kind < 0.55:
        words = (b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"-ERR\r\n", b"-ERR 'x'\r\n", b"INFO {}\r\n", b"INFO [1]\r\n",
                 b'INFO {"connect_urls":[1]}\r\n', b"INFO " + b"[" * 5_000 + b"\r\n")  # fmt: skip
        return "bytes", rng.choice(words) + wire_bytes, cuts
    if kind < 0.7:
        return "reply", (make.text(rng), make.headers(rng, _HEADERS), make.json_text(rng)), cuts
    return "bytes", make.mutated(rng, wire_bytes), cuts


def framed(frame: tuple[bytes, int, bytes, bytes, bytes]) -> bytes:
    """A message as the server writes it."""
    subject, sid, reply, block, data = frame
    middle = b"%b %d " % (subject, sid) + (reply + b" " if reply else b"")
    if block:
        return b"HMSG %b%d %d\r\n%b%b\r\n" % (middle, len(block), len(block) + len(data), block, data)
    return b"MSG %b%d\r\n%b\r\n" % (middle, len(data), data)


def header_block(rng: random.Random) -> bytes:
    lines = [
        make.text(rng).encode("utf-8", "replace")
        if rng.random() < 0.3
        else rng.choice(_HEADERS).encode() + b": " + make.text(rng).encode("utf-8", "surrogatepass")
        for _ in range(rng.randrange(4))
    ]  # fmt: skip
    block = (
        b"NATS/1.0"
        + rng.choice((b"", b"", b" 404", b" 503", b" 100 Idle", b" x"))
        + b"\r\n"
        + b"\r\n".join(lines)
        + b"\r\n\r\n"
    )
    return block if rng.random() < 0.7 else make.mutated(rng, block)


def check_frames(given: tuple[str, Any, list[int]]) -> str:
    kind, value, cuts = given
    if kind == "reply":
        return check_reply(value)
    sink = Sink()
    raw = b"".join(map(framed, value)) if kind == "whole" else value
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    try:
        for piece in pieces:
            drive(sink._ps.parse(piece))
    except ProtocolError:
        assert kind != "whole", "a frame of the server's was refused"
        return "protocol"
    if kind == "whole":
        found = [(sid, subject, reply, data) for sid, subject, reply, _, data in sink.messages]
        sent = [
            (sid, subject.decode("utf-8", "replace"), reply.decode("utf-8", "replace"), data)
            for subject, sid, reply, _, data in value
        ]
        assert found == sent, f"sent {sent}, found {found}"
    return "ok"


class _Quiet:
    """As much of a client as replies to requests need."""

    def new_inbox(self) -> str:
        return "_INBOX.fuzz"

    def publish_now(self, *_: Any) -> bool:
        return True


LOOP: Final = asyncio.new_event_loop()


def check_reply(given: tuple[str, dict[str, str], bytes]) -> str:
    """A reply of any form ends a request with itself or a typed error, and is no acknowledgement unless it says so."""
    subject, headers, data = given

    async def asked() -> str:
        lean = Lean(_Quiet())  # type: ignore[arg-type]
        future = await lean.send("x", timeout_s=9.0)
        for address in (subject, "_INBOX.fuzz.9", "_INBOX.fuzz.1"):
            await lean._on_reply(Msg(_client=None, subject=address, data=data, headers=headers))  # type: ignore[arg-type]
        assert future.done()
        try:
            ack = _acknowledged(future.result())
        except (NoResponderError, Refused):
            return "refused"
        except HoldfastError as error:
            return told(error)
        assert isinstance(ack.seq, int)
        return "ok"

    delivered = f"$JS.ACK.{subject}"
    if is_delivery(delivered):
        attempt(lambda: message_of_delivery("a", headers, data, delivered, "e"))
    attempt(lambda: parse_time_ms(subject))
    return LOOP.run_until_complete(asked())


def check_headers(given: bytes) -> str:
    read = drive(Sink()._process_headers(given))
    if read is None:
        return "none"
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in read.items())
    message = stored(("ctx.a.event.b.c", read, b"{}"))
    check_event((message.subject, read, message.payload))
    attempt(lambda: unseal("default", "a" * 32, read, b"1", stored_at_ms=1))
    attempt(lambda: from_headers(read))
    return "ok"


# settings


class Toml:
    """A settings file, written anew for each input."""

    @cached_property
    def path(self) -> Path:
        folder = tempfile.mkdtemp(prefix="holdfast-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        return Path(folder) / "holdfast.toml"

    def remove(self) -> None:
        path: Path | None = self.__dict__.pop("path", None)
        if path is not None:
            path.unlink(missing_ok=True)
            path.parent.rmdir()


TOML: Final = Toml()
_SETTINGS: Final = [field.name for field in msgspec.structs.fields(Settings)]


def make_toml(rng: random.Random) -> bytes:
    lines: list[bytes] = []
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(_SETTINGS).encode() if rng.random() < 0.85 else make.text(rng).encode("utf-8", "replace")
        value = rng.choice((b"1", b"-1", b"0.5", b"nan", b"inf", b"true", b'"durable"', b'"x"', b"[1]", b"{a=1}",
                            b"2026-01-01", b"1e400", b"9" * 30, b"9" * 5_000, b'"\\u0000"', b'"nats://u:p@h:1"',
                            b'"' + b"x" * 5_000 + b'"'))  # fmt: skip
        lines.append(name + b" = " + value)
    raw = b"\n".join(lines)
    if rng.randrange(3_000) == 0:
        return b"a = " + b"[" * 100_000
    return raw if rng.random() < 0.7 else make.mutated(rng, raw)


def check_toml(given: bytes) -> str:
    TOML.path.write_bytes(given)

    def whole() -> None:
        loaded = load_settings(config=TOML.path, environ={}, cwd=TOML.path.parent)
        for value in msgspec.structs.astuple(loaded.settings):
            assert not isinstance(value, float) or math.isfinite(value), "a setting that is no number"

    return attempt(whole)


TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        Target("refs", make_ref, check_ref, 1.0),
        Target("names", make_name, check_names, 1.0),
        Target("events", make_event, check_event, 2.0),
        Target("keys", make_version, check_version, 1.0),
        Target("bodies", make_body, check_body, 1.0),
        Target("envelopes", make_envelope, check_envelope, 1.0),
        Target("requests", make_request, check_request, 1.5),
        Target("filters", make_filter, check_filter, 0.7),
        Target("frames", make_frames, check_frames, 1.5),
        Target("headers", header_block, check_headers, 1.0),
        Target("toml", make_toml, check_toml, 0.3),
    )
}
"""Every target, by name, in the order of the campaign."""
