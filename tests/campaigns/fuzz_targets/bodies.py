"""Bodies and the forms in which they are stored, sealed, listed and exported: none is served or opened as another.

Small files and replies in JSON, which are read as strictly, are fed here too.  Holds no tests itself.
"""

from __future__ import annotations

import io
import json
import random
from functools import cached_property
from typing import Any, Final

import msgspec
from nats.aio.msg import Msg

from holdfast.client import key_ring
from holdfast.client.encryption import open_sealed
from holdfast.client.encryption import seal as encrypt
from holdfast.client.handler_control import decode_instruction
from holdfast.client.key_file import parse_key_file
from holdfast.ops.export_format import read_export
from holdfast.schemas import limits
from holdfast.schemas.bodies import decode_body, encode_body, encode_json
from holdfast.schemas.errors import HoldfastError, IntegrityError
from holdfast.schemas.policies import decode_policies
from holdfast.schemas.refs import JSON, compute_digest, is_digest
from holdfast.streams import wire
from holdfast.streams.codec import decode_manifest, join, reseal, seal, unseal
from holdfast.streams.decode import decode_context
from holdfast.streams.messages import StoredMessage
from holdfast.workers import requests
from tests.campaigns import fuzz_inputs as make
from tests.campaigns.fuzz_targets.messages import HEADERS
from tests.campaigns.fuzz_targets.target import attempt


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
        given = given | make.headers(rng, HEADERS)
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
