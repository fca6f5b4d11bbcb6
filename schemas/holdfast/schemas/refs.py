"""References: ``ctx_<kind>_<digest>``, computable in any language.

The digest is BLAKE2b with a 20-byte result and the personalisation ``holdfast-ctx-1``, over five fields in this
order, each preceded by its length as an unsigned 64-bit little-endian integer: namespace, kind and content type in
UTF-8; ``expires_at`` as decimal ASCII of integer milliseconds since 1970 UTC, or nothing when there is none; the
body's bytes.  It is written as 32 characters of RFC 4648 base32 in lower case.  ``tests/unit/golden/refs.json``
holds vectors.  Whatever form a body is stored in (compressed, chunked), the digest is over its plain bytes.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple, NewType

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidRefError

Ref = NewType("Ref", str)
"""A reference in its text form."""

Digest = NewType("Digest", str)
"""The last part of a reference: 32 characters ``[a-z2-7]``."""

JSON: Final = "application/json"
"""The content type of a body when none is given."""

DIGEST_BYTES: Final = 20

# Every put and every read converts a digest.  160 bits are 32 characters without padding, so a number in base 32 does,
# two characters at a time: half the time of base64.b32encode one way, a twentieth the other.
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
_PAIRS: Final = tuple(first + second for first in _ALPHABET for second in _ALPHABET)
_SHIFTS: Final = tuple(range(8 * DIGEST_BYTES - 10, -1, -10))
_TO_DIGITS: Final = bytes.maketrans(_ALPHABET.encode(), b"0123456789abcdefghijklmnopqrstuv")

_PERSON: Final = b"holdfast-ctx-1"
_HASHERS: Final = 256
"""Hasher states kept, of half a kilobyte each."""
_REF: Final = re.compile(r"ctx_([A-Za-z0-9_-]{1,64})_([a-z2-7]{32})\Z")
_DIGEST: Final = re.compile(r"[a-z2-7]{32}\Z")


class RefParts(NamedTuple):
    """What a reference says."""

    kind: str
    digest: Digest


def compute_digest(
    namespace: str, kind: str, body: bytes, *, content_type: str = JSON, expires_at_ms: int | None = None
) -> Digest:
    """Returns the digest of a context; the fields are taken as they are, without validation."""
    return digest_from_bytes(
        hash_context(namespace, kind, body, content_type=content_type, expires_at_ms=expires_at_ms)
    )


def hash_context(
    namespace: str, kind: str, body: bytes, *, content_type: str = JSON, expires_at_ms: int | None = None
) -> bytes:
    """Returns the bytes that the digest of a context stands for; for who compares, and needs no text."""
    # A message of anybody's may name a content type of a megabyte: that is not kept.
    is_usual = len(content_type) <= limits.CONTENT_TYPE_CHARS
    begin = _hasher_before_body if is_usual else _hasher_before_body.__wrapped__
    hasher = begin(namespace, kind, content_type, expires_at_ms).copy()
    hasher.update(len(body).to_bytes(8, "little"))
    hasher.update(body)
    return hasher.digest()


@lru_cache(_HASHERS)
def _hasher_before_body(namespace: str, kind: str, content_type: str, expires_at_ms: int | None) -> blake2b:
    """The state once all fields but the body are in: they are the same for most bodies, and half of the time."""
    hasher = blake2b(digest_size=DIGEST_BYTES, person=_PERSON)
    expiry = b"" if expires_at_ms is None else b"%d" % expires_at_ms
    for field in (namespace.encode(), kind.encode(), content_type.encode(), expiry):
        hasher.update(len(field).to_bytes(8, "little"))
        hasher.update(field)
    return hasher


def format_ref(kind: str, digest: str) -> Ref:
    """Returns the reference of a kind and a digest."""
    return Ref(f"ctx_{kind}_{digest}")


def parse_ref(ref: object) -> RefParts:
    """Splits a reference into its kind and digest; raises InvalidRefError when it is not one."""
    match = _REF.match(ref) if isinstance(ref, str) else None
    if match is None:
        raise InvalidRefError(
            f"{repr(ref)[:100]} is not a reference",
            field="ref",
            hint="a reference reads ctx_<kind>_<digest>, the digest being 32 characters a-z 2-7",
        )
    return RefParts(match[1], Digest(match[2]))


def is_digest(text: str) -> bool:
    """Whether ``text`` has the form of a digest."""
    return _DIGEST.match(text) is not None


def digest_to_bytes(digest: str) -> bytes:
    """Returns the 20 bytes that a digest's text stands for."""
    return int(digest.encode().translate(_TO_DIGITS), 32).to_bytes(DIGEST_BYTES)


def digest_from_bytes(raw: bytes) -> Digest:
    """Returns the text of a digest of 20 bytes."""
    number = int.from_bytes(raw)
    return Digest("".join([_PAIRS[number >> shift & 1023] for shift in _SHIFTS]))
