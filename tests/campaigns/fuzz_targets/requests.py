"""Requests to the resolver, and what they carry: filters, cursors, moments and lineage.

Holds no tests itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from holdfast.client.lineage_context import from_dict, from_headers, from_traceparent, merge, to_headers
from holdfast.lake.scan import Place, decode_cursor
from holdfast.schemas.names import check_namespace, encode_token
from holdfast.schemas.refs import parse_ref
from holdfast.streams import wire
from holdfast.streams.service import decode_request
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
from tests.campaigns.fuzz_targets.target import ASCII, TOKEN, attempt


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
        assert all(ASCII.match(value) for value in headers.values())
        assert from_headers(headers) == from_dict(json.loads(headers[next(iter(headers))]))
        merge(normal, {"session_id": "s"})

    outcomes = [attempt(call) for call in (events, keys, place, handed_on)]
    attempt(lambda: from_traceparent(pattern))
    attempt(lambda: from_headers({"hf-lineage": cursor, "Holdfast-Lineage": cursor, "traceparent": pattern}))
    attempt(lambda: wire.reply_subject(namespace, pattern))
    return outcomes[0]
