"""Sealed bodies: encrypted by the SDK, opened by the SDK, and to everything between them bytes like any others.

A sealed body is an ordinary context of content type ``application/vnd.holdfast.sealed`` whose body is an envelope, so
that its reference is the ordinary digest over the envelope's bytes, and hot tier, lake and resolver carry it as it is.

Envelope, version 1::

    0       4   "HFE1"
    4       1   n, the length of the key id, 1 to 64
    5       n   the id of the master key, ASCII of [A-Za-z0-9_-]
    5 + n   16  salt, random for each envelope
    21 + n  …   ciphertext of AES-256-GCM, the last 16 bytes of it the tag

    envelope key     = HKDF-SHA256(master key, salt, info = "holdfast-enc-1" field(namespace) field(kind)), 32 bytes
    nonce            = 12 zero bytes
    associated data  = the 21 + n bytes before the ciphertext, field(namespace) field(kind) field(expires_at)
    plaintext        = length of the content type in one byte, content type, 1 when zstd-compressed else 0, body

where field(x) is the length of x as an unsigned 64-bit little-endian integer and x itself, names in UTF-8,
``expires_at`` as decimal ASCII of milliseconds since 1970 UTC or nothing when there is none, as under the digest.

A nonce must not come twice under one key.  Here a key seals one envelope and never another: each draws 128 bits of
salt, and the chance that two of one master key, namespace and kind share theirs is below 2**-64 after 2**32 envelopes,
while 2**-32 is what is granted for random nonces of 96 bits under one key.  So the nonce may as well be constant.

The associated data binds an envelope to its namespace, kind and expiry: put under others it does not open.  Bodies over
1 KiB are compressed, when that is smaller, before they are encrypted, since afterwards they cannot be: how long an
envelope is tells how well its body compresses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from holdfast.client.key_file import KEY_BYTES
from holdfast.schemas import limits
from holdfast.schemas.bodies import check_content_type, check_size
from holdfast.schemas.errors import (
    ConfigurationError,
    IntegrityError,
    InvalidBodyError,
    InvalidFieldError,
    TooLargeError,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from holdfast.client.key_file import MasterKey
    from holdfast.client.key_ring import KeyRing
    from holdfast.streams.hot import NewContext

SEALED: Final = "application/vnd.holdfast.sealed"
"""The content type of a sealed body as it is stored."""

MAGIC: Final = b"HFE1"
SALT_BYTES: Final = 16
TAG_BYTES: Final = 16

_INFO: Final = b"holdfast-enc-1"
_NONCE: Final = bytes(12)
_LEVEL: Final = 3
_LENGTHS: Final = len(MAGIC) + 1
_KEY_ID_CHARS: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


class _Envelope(NamedTuple):
    header: bytes
    key_id: str
    salt: bytes
    ciphertext: memoryview


def seal(
    ring: KeyRing, namespace: str, kind: str, body: bytes, content_type: str, expires_at_ms: int | None = None
) -> bytes:
    """Returns an envelope of ``body``, sealed with the ring's active key; no two are equal.

    Raises TooLargeError over 64 MiB, before or after sealing, InvalidFieldError for what is sealed already,
    EncryptionKeyError without an active key, ConfigurationError without the package ``cryptography``.
    """
    return _seal(ring.active_key(), os.urandom(SALT_BYTES), namespace, kind, body, content_type, expires_at_ms)


def open_sealed(
    ring: KeyRing, namespace: str, kind: str, body: bytes, expires_at_ms: int | None = None, *, what: str = "the body"
) -> tuple[bytes, str]:
    """Returns the body that an envelope holds, and its content type.  ``what`` names it in messages.

    Raises EncryptionKeyError, naming the key, when the ring lacks it; IntegrityError when the envelope has been
    altered, belongs to another namespace, kind or expiry, or was sealed with another key of the same id;
    InvalidBodyError for what is no envelope; TooLargeError over 64 MiB; ConfigurationError without ``cryptography``.
    """
    if len(body) > limits.BODY_BYTES:
        raise _too_large(what, len(body))
    envelope = _parse(body, what)
    cipher = _cipher(ring.key(envelope.key_id, what=what), envelope.salt, namespace, kind)
    from cryptography.exceptions import InvalidTag

    try:
        plaintext = cipher.decrypt(
            _NONCE, envelope.ciphertext, _associated(envelope.header, namespace, kind, expires_at_ms)
        )
    except InvalidTag as error:
        raise IntegrityError(
            f"{what} does not open with key {envelope.key_id!r}: it was altered, or sealed with another key of that id",
            field="body",
            hint="compare where the key ring comes from ('holdfast encryption status') with where it was written",
        ) from error
    return _unpack(plaintext, what)


def key_id_of(envelope: bytes) -> str:
    """Returns the id of the key that an envelope is sealed with; raises InvalidBodyError for what is no envelope."""
    return _parse(envelope, "the body").key_id


def seal_contexts(ring: KeyRing, contexts: Sequence[NewContext]) -> list[NewContext]:
    """Returns contexts with sealed bodies in the place of plain ones.  For a thread: it encrypts and compresses."""
    return [
        msgspec.structs.replace(
            context,
            body=seal(ring, context.namespace, context.kind, context.body, context.content_type, context.expires_at_ms),
            content_type=SEALED,
        )
        for context in contexts
    ]


def _seal(
    key: MasterKey,
    salt: bytes,
    namespace: str,
    kind: str,
    body: bytes,
    content_type: str,
    expires_at_ms: int | None,
) -> bytes:
    check_size(body)
    if check_content_type(content_type) == SEALED:
        raise InvalidFieldError("the body is sealed already", field="content_type", hint="store it without encrypt")
    header = b"".join((MAGIC, bytes((len(key.id),)), key.id.encode("ascii"), salt))
    plaintext = _pack(body, content_type)
    size = len(header) + len(plaintext) + TAG_BYTES
    if size > limits.BODY_BYTES:
        raise _too_large("the body with what encrypting adds", size)
    cipher = _cipher(key, salt, namespace, kind)
    return header + cipher.encrypt(_NONCE, plaintext, _associated(header, namespace, kind, expires_at_ms))


def _parse(body: bytes, what: str) -> _Envelope:
    # The magic's last byte is the version: another one is from a later release, and to be told as that.
    if body[:4] != MAGIC:
        newer = body[:3] == MAGIC[:3]
        raise InvalidBodyError(
            f"{what} is a sealed body of an unknown version" if newer else f"{what} is no sealed body",
            field="body",
            hint="upgrade holdfast" if newer else f"something else was stored as {SEALED}",
        )
    length = body[4] if len(body) > len(MAGIC) else 0
    key_id = body[_LENGTHS : _LENGTHS + length]
    end = _LENGTHS + length + SALT_BYTES
    if not 1 <= length <= 64 or not _KEY_ID_CHARS.issuperset(key_id) or len(body) < end + TAG_BYTES:
        raise InvalidBodyError(f"{what} is a sealed body that was cut short or altered", field="body")
    return _Envelope(body[:end], key_id.decode("ascii"), body[end - SALT_BYTES : end], memoryview(body)[end:])


def _pack(body: bytes, content_type: str) -> bytes:
    kind = bytes((len(content_type),)) + content_type.encode("ascii")
    if len(body) > limits.COMPRESS_OVER_BYTES:
        frame = zstd.compress(body, level=_LEVEL)
        if len(frame) < len(body):
            return b"".join((kind, b"\x01", frame))
    return b"".join((kind, b"\x00", body))


def _unpack(plaintext: bytes, what: str) -> tuple[bytes, str]:
    # It is authentic: what does not fit here was sealed by a faulty writer, which is no reason to trust its lengths.
    length = plaintext[0] if plaintext else 0
    flag = plaintext[length + 1 : length + 2]
    try:
        content_type = check_content_type(plaintext[1 : length + 1].decode("ascii"))
    except (UnicodeDecodeError, InvalidFieldError) as error:
        raise InvalidBodyError(f"{what} was sealed without a content type", field="body") from error
    if flag == b"\x00":
        return plaintext[length + 2 :], content_type
    if flag != b"\x01":
        raise InvalidBodyError(f"{what} was sealed in an unknown form", field="body", hint="upgrade holdfast")
    try:
        decompressor = zstd.ZstdDecompressor()
        # One byte over the limit is enough to see a bomb, however far it would inflate.
        body = decompressor.decompress(memoryview(plaintext)[length + 2 :], max_length=limits.BODY_BYTES + 1)
    except zstd.ZstdError as error:
        raise InvalidBodyError(f"{what} does not decompress", field="body") from error
    if len(body) > limits.BODY_BYTES:
        raise _too_large(what, len(body))
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidBodyError(f"{what} does not decompress", field="body")
    return body, content_type


def _cipher(key: MasterKey, salt: bytes, namespace: str, kind: str) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise ConfigurationError(
            "encryption needs the package 'cryptography', which is not installed",
            hint="pip install 'holdfast[encryption]'",
        ) from error
    info = b"".join((_INFO, _field(namespace.encode()), _field(kind.encode())))
    return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key.secret))


def _associated(header: bytes, namespace: str, kind: str, expires_at_ms: int | None) -> bytes:
    expiry = b"" if expires_at_ms is None else b"%d" % expires_at_ms
    return b"".join((header, _field(namespace.encode()), _field(kind.encode()), _field(expiry)))


def _field(raw: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw


def _too_large(what: str, size: int) -> TooLargeError:
    return TooLargeError(
        f"{what} has {size} bytes or more, the limit is {limits.BODY_BYTES}", field="body", limit=limits.BODY_BYTES
    )
