"""References and names: what is taken is written one way alone, and never as more than one token of a subject.

Holds no tests itself.
"""

from __future__ import annotations

import random
from functools import partial

from holdfast.schemas.bodies import check_content_type
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
from holdfast.schemas.refs import digest_from_bytes, digest_to_bytes, format_ref, parse_ref
from holdfast.streams import wire
from tests.campaigns import fuzz_inputs as make
from tests.campaigns.fuzz_targets.target import TOKEN, attempt


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
