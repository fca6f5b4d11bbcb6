"""References: computed here a second time, from the description alone, and pinned by golden vectors."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.schemas import refs
from holdfast.schemas.errors import InvalidRefError
from holdfast.schemas.refs import (
    JSON,
    compute_digest,
    digest_from_bytes,
    digest_to_bytes,
    format_ref,
    is_digest,
    parse_ref,
)

GOLDEN = Path(__file__).parent / "golden" / "refs.json"
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def reference_implementation(
    namespace: str, kind: str, content_type: str, expires_at_ms: int | None, body: bytes
) -> str:
    """The ref of a context, written from its description and from no code of Holdfast's."""
    expiry = "" if expires_at_ms is None else str(expires_at_ms)
    message = b""
    for field in (namespace.encode(), kind.encode(), content_type.encode(), expiry.encode(), body):
        message += len(field).to_bytes(8, "little") + field
    digest = hashlib.blake2b(message, digest_size=20, person=b"holdfast-ctx-1").digest()
    bits = "".join(f"{byte:08b}" for byte in digest)
    text = "".join(ALPHABET[int(bits[i : i + 5], 2)] for i in range(0, len(bits), 5))
    return f"ctx_{kind}_{text}"


class Vector(msgspec.Struct, forbid_unknown_fields=True):
    namespace: str
    kind: str
    content_type: str
    expires_at_ms: int | None
    body_hex: str
    ref: str


VECTORS = msgspec.json.decode(GOLDEN.read_bytes(), type=list[Vector])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.ref[-6:])
def test_golden_vectors_hold(vector: Vector) -> None:
    body = bytes.fromhex(vector.body_hex)
    digest = compute_digest(
        vector.namespace, vector.kind, body, content_type=vector.content_type, expires_at_ms=vector.expires_at_ms
    )
    assert format_ref(vector.kind, digest) == vector.ref
    again = reference_implementation(vector.namespace, vector.kind, vector.content_type, vector.expires_at_ms, body)
    assert again == vector.ref


def test_golden_vectors_cover_every_field() -> None:
    assert len(VECTORS) == len({vector.ref for vector in VECTORS}) >= 12
    assert any(not vector.namespace.isascii() for vector in VECTORS)
    assert any(vector.expires_at_ms is not None for vector in VECTORS)
    assert any(vector.expires_at_ms == 0 for vector in VECTORS)
    assert {vector.content_type for vector in VECTORS} > {JSON}
    assert any(vector.body_hex == "" for vector in VECTORS)
    assert any(len(vector.body_hex) > 2_000 for vector in VECTORS)


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "namespace": st.text(max_size=20),
    "kind": st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    "content_type": st.text(max_size=20),
    "expires_at_ms": st.none() | st.integers(0, 2**48),
    "body": st.binary(max_size=200),
}


@given(st.fixed_dictionaries(FIELDS))
def test_both_implementations_agree(fields: dict[str, Any]) -> None:
    digest = compute_digest(
        fields["namespace"],
        fields["kind"],
        fields["body"],
        content_type=fields["content_type"],
        expires_at_ms=fields["expires_at_ms"],
    )
    ref = format_ref(fields["kind"], digest)
    assert ref == reference_implementation(**fields)
    assert parse_ref(ref) == (fields["kind"], digest)
    assert digest_from_bytes(digest_to_bytes(digest)) == digest
    assert len(digest_to_bytes(digest)) == 20


@given(st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8))
def test_bytes_that_move_between_fields_make_another_digest(a: bytes, b: bytes, c: bytes, d: bytes) -> None:
    one = compute_digest("ns" + a.hex(), "k" + b.hex(), c + d)
    other = compute_digest("ns" + a.hex() + b.hex(), "k", c + d)
    assert (one == other) == (b == b"")


@given(st.text())
def test_text_is_a_reference_or_refused(text: str) -> None:
    matched = re.fullmatch(r"ctx_[A-Za-z0-9_-]{1,64}_[a-z2-7]{32}", text)
    if matched is None:
        with pytest.raises(InvalidRefError) as caught:
            parse_ref(text)
        assert caught.value.field == "ref"
    else:
        assert format_ref(*parse_ref(text)) == text


@pytest.mark.parametrize(
    "ref",
    [
        "ctx_a_" + "a" * 31,
        "ctx_a_" + "a" * 33,
        "ctx_a_" + "a" * 31 + "1",
        "ctx_a_" + "A" * 32,
        "ctx_" + "a" * 65 + "_" + "a" * 32,
        "ctx__" + "a" * 32,
        "CTX_a_" + "a" * 32,
        " ctx_a_" + "a" * 32,
        "ctx_a_" + "a" * 32 + "\n",
        "ctx_é_" + "a" * 32,
        "",
        None,
        5,
        b"ctx_a_" + b"a" * 32,
        "x" * 1_000_000,
    ],
    ids=lambda ref: repr(ref)[:30],
)
def test_what_is_no_reference_is_refused(ref: object) -> None:
    with pytest.raises(InvalidRefError) as caught:
        parse_ref(ref)
    assert len(str(caught.value)) < 400


def test_what_is_kept_for_hashing_does_not_grow_with_what_a_message_says() -> None:
    kept = refs._hasher_before_body.cache_info().currsize
    digests = {compute_digest("n", "k", b"", content_type="x" * length) for length in range(129, 500)}
    assert len(digests) == 371
    assert refs._hasher_before_body.cache_info().currsize == kept


def test_a_kind_may_look_like_a_reference_itself() -> None:
    digest = compute_digest("n", "k", b"")
    assert parse_ref(f"ctx_ctx_a_{'b' * 32}_{digest}") == (f"ctx_a_{'b' * 32}", digest)


@pytest.mark.parametrize(
    ("text", "expected"), [("a" * 32, True), ("7" * 32, True), ("1" * 32, False), ("a" * 31, False)]
)
def test_a_digest_is_told_by_its_form(text: str, expected: bool) -> None:
    assert is_digest(text) is expected
    assert is_digest(text + "\n") is False
