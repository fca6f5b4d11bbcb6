"""The stored form of a context: headers and payload of one message, and back to its plain bytes.

==========  ==============================================  ==================================
header      value                                           left out when
==========  ==============================================  ==================================
Hf-Kind     the kind                                        never
Hf-Type     the content type                                ``application/json``
Hf-Exp      expiry, integer milliseconds since 1970 UTC     there is none
Hf-Enc      ``zstd``: the payload is one zstd frame         stored as it is
Hf-Form     ``manifest`` or ``chunk``                       the payload is the whole body
Hf-Parts    of a chunk that was put together: the stored    it was not
            chunks it begins with, ``digest:size,…``
Hf-V        format version, when it is not 1                1
==========  ==============================================  ==================================

A manifest's payload is JSON ``{"v": 1, "size": bytes, "chunks": [digest, …]}``; its key is the digest of the whole
body, which is the chunks' bytes in order.  Version 1 has chunks of 512 KiB, all but the last.  Version 2 has chunks of
any size, shared with the manifests of other bodies (``holdfast.streams.sharing``), and ``"tail"``: text that follows
the last chunk.  A chunk is stored under the digest of kind ``chunk`` over its own bytes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Container, Mapping, Sequence
from typing import Final

import msgspec
import zstandard

from holdfast.schemas import limits
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import (
    DigestMismatchError,
    HoldfastError,
    InvalidBodyError,
    InvalidFieldError,
    NotFoundError,
    TooLargeError,
)
from holdfast.schemas.ids import MAX_MS
from holdfast.schemas.names import CHUNK_KIND, check_kind
from holdfast.schemas.refs import (
    JSON,
    Digest,
    compute_digest,
    digest_from_bytes,
    digest_to_bytes,
    hash_context,
    is_digest,
)
from holdfast.schemas.rows import ContextRow, Form
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.sharing import Part, Piece, Shape
from holdfast.streams.wire import H_ENCODING, H_EXPIRES, H_FORM, H_KIND, H_PARTS, H_TYPE, H_VERSION

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT_VERSION: Final = "1"
SHARED_VERSION: Final = 2
"""The version of a manifest whose chunks other bodies share."""
_ZSTD: Final = "zstd"
_ENCODING_HEADER_BYTES: Final = 16
"""What it costs to say that a payload is compressed."""
_LEVEL: Final = 3
_LOCAL: Final = threading.local()
_CHUNK_HEADERS: Final = {H_KIND: CHUNK_KIND, H_TYPE: BINARY, H_FORM: "chunk"}
_COMPRESS_CHUNK_OVER_BYTES: Final = 200
"""Parts of a growing body are many and small, and compressing them by a tenth is worth it."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunked body consists of, in order: the bytes of its chunks, then ``tail`` in UTF-8 (version 2)."""

    size: int
    chunks: list[Digest]
    tail: str | msgspec.UnsetType = msgspec.UNSET
    v: int = 1


class StoredForm(msgspec.Struct, frozen=True):
    """One message of the hot tier, less its subject."""

    digest: Digest
    headers: dict[str, str]
    payload: bytes


_MANIFEST: Final = msgspec.json.Decoder(Manifest)


def seal(
    namespace: str, kind: str, body: bytes, *, content_type: str = JSON, expires_at_ms: int | None = None
) -> list[StoredForm]:
    """Returns the messages that store a context: chunks first, the context itself last.

    The fields are taken as they are, without validation.
    """
    digest = compute_digest(namespace, kind, body, content_type=content_type, expires_at_ms=expires_at_ms)
    headers = _headers(kind, content_type, expires_at_ms)
    if len(body) <= limits.CHUNK_BYTES:
        return [StoredForm(digest, *_compressed(headers, body))]
    forms: list[StoredForm] = []
    chunks: list[Digest] = []
    for start in range(0, len(body), limits.CHUNK_BYTES):
        chunk = body[start : start + limits.CHUNK_BYTES]
        chunk_digest = compute_digest(namespace, CHUNK_KIND, chunk, content_type=BINARY)
        chunks.append(chunk_digest)
        forms.append(StoredForm(chunk_digest, *_compressed(_CHUNK_HEADERS, chunk)))
    manifest = msgspec.json.encode(Manifest(size=len(body), chunks=chunks))
    forms.append(StoredForm(digest, headers | {H_FORM: "manifest"}, manifest))
    return forms


def seal_shared(
    context: tuple[str, str, str, int | None], body: bytes, pieces: Sequence[Piece]
) -> tuple[list[StoredForm], StoredForm, Shape]:
    """Returns the chunks that are to be stored for a body in pieces, the manifest that names all, and its shape.

    ``context`` is namespace, kind, content type and expiry.  What follows the last piece is the manifest's tail, which
    must be text.
    """
    namespace, kind, content_type, expires_at_ms = context
    forms: dict[Digest, StoredForm] = {}
    parts: list[Part] = []
    for piece in pieces:
        digest = piece.digest
        if digest is None:
            chunk = body[piece.start : piece.end]
            digest = compute_digest(namespace, CHUNK_KIND, chunk, content_type=BINARY)
            chunk_headers = _CHUNK_HEADERS | ({H_PARTS: _list_parts(piece.of)} if len(piece.of) > 1 else {})
            forms[digest] = StoredForm(digest, *_compressed(chunk_headers, chunk, over=_COMPRESS_CHUNK_OVER_BYTES))
        parts.append(Part(digest, piece.size))
    manifest = Manifest(
        size=len(body),
        chunks=[part.digest for part in parts],
        tail=body[pieces[-1].end :].decode(),
        v=SHARED_VERSION,
    )
    headers = _headers(kind, content_type, expires_at_ms) | {H_FORM: "manifest"}
    payload = msgspec.json.encode(manifest)
    digest = compute_digest(namespace, kind, body, content_type=content_type, expires_at_ms=expires_at_ms)
    # Digests are five bits a character: a list of some is stored in two thirds.
    head = StoredForm(digest, *_compressed(headers, payload, over=_COMPRESS_CHUNK_OVER_BYTES))
    return list(forms.values()), head, Shape(tuple(parts))


def _list_parts(parts: Sequence[Part]) -> str:
    return ",".join(f"{part.digest}:{part.size}" for part in parts)


def _listed_parts(text: str | None) -> tuple[tuple[Digest, int], ...]:
    """What a chunk says it begins with; nothing when that does not read: it is not needed to read the chunk."""
    parts: list[tuple[Digest, int]] = []
    for item in () if text is None else text.split(","):
        digest, _, size = item.partition(":")
        if not (is_digest(digest) and size.isascii() and size.isdigit() and len(size) < 8):
            return ()
        parts.append((Digest(digest), int(size)))
    return tuple(parts)


def _headers(kind: str, content_type: str, expires_at_ms: int | None) -> dict[str, str]:
    headers = {H_KIND: kind}
    if content_type != JSON:
        headers[H_TYPE] = content_type
    if expires_at_ms is not None:
        headers[H_EXPIRES] = str(expires_at_ms)
    return headers


def unseal(
    namespace: str,
    digest: str,
    headers: Mapping[str, str],
    payload: bytes,
    *,
    stored_at_ms: int,
    epoch: str = "",
    seq: int = 0,
) -> ContextRow:
    """Returns the context that a stored message holds, its body checked against the digest.

    Of a manifest the body is the manifest's JSON, and the whole is checked by :func:`join`.  Raises a typed error when
    the message is none of ours, is damaged or is not what its key says.
    """
    if not is_digest(digest):
        raise InvalidFieldError(f"key {digest[:80]!r} is not a digest", field="key", hint="store contexts with put")
    version = headers.get(H_VERSION, FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InvalidFieldError(
            f"stored form has version {version[:20]!r}, this release reads {FORMAT_VERSION}",
            field=H_VERSION,
            hint="upgrade holdfast",
        )
    form = _form(headers.get(H_FORM))
    # The form is not under the digest, the kind is: together they cannot be confused.
    kind = CHUNK_KIND if form == "chunk" else check_kind(headers.get(H_KIND))
    content_type = headers.get(H_TYPE, JSON)
    expires_at_ms = _expiry(headers.get(H_EXPIRES))
    body = _decompressed(payload, headers.get(H_ENCODING))
    size = len(body)
    if form == "manifest":
        size = decode_manifest(body).size
    else:
        actual = hash_context(namespace, kind, body, content_type=content_type, expires_at_ms=expires_at_ms)
        if actual != digest_to_bytes(digest):
            raise DigestMismatchError(
                f"the message stored under {digest} hashes to {digest_from_bytes(actual)}",
                field="body",
                hint="run 'holdfast verify'; the damaged copy was not served",
            )
    return ContextRow(
        namespace=namespace,
        kind=kind,
        digest=Digest(digest),
        content_type=content_type,
        body=body,
        size=size,
        stored_at_ms=stored_at_ms,
        epoch=epoch,
        seq=seq,
        form=form,
        expires_at_ms=expires_at_ms,
        parts=_listed_parts(headers.get(H_PARTS)) if form == "chunk" else (),
    )


def inflate(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Returns a payload as it was before it was compressed, if it was."""
    return _decompressed(payload, headers.get(H_ENCODING))


def reseal(row: ContextRow) -> tuple[dict[str, str], bytes]:
    """Returns headers and payload of a row as the hot tier would hold them: how the resolver hands on a cold one."""
    headers = _headers(row.kind, row.content_type, row.expires_at_ms)
    if row.form == "plain":
        return _compressed(headers, row.body)
    headers[H_FORM] = row.form
    if len(row.parts) > 1:
        headers[H_PARTS] = _list_parts([Part(digest, size) for digest, size in row.parts])
    return _compressed(headers, row.body, over=_COMPRESS_CHUNK_OVER_BYTES)


def decode_manifest(body: bytes) -> Manifest:
    """Returns the manifest; raises InvalidBodyError when it is not one, TooLargeError when it promises too much."""
    try:
        manifest = _MANIFEST.decode(body)
    except UNDECODABLE as error:
        raise InvalidBodyError(f"manifest does not decode: {error}", field="body") from error
    if manifest.size > limits.BODY_BYTES:
        raise TooLargeError(
            f"manifest promises {manifest.size} bytes, the limit is {limits.BODY_BYTES}",
            field="size",
            limit=limits.BODY_BYTES,
        )
    if not (manifest.size >= 0 and _has_form(manifest) and all(map(is_digest, manifest.chunks))):
        raise InvalidBodyError("manifest is not of the form size, chunks, tail", field="body")
    return manifest


def _has_form(manifest: Manifest) -> bool:
    count = len(manifest.chunks)
    tail = manifest.tail or ""
    if manifest.v == 1:
        return count == -(-manifest.size // limits.CHUNK_BYTES) and not tail
    return manifest.v == SHARED_VERSION and 1 <= count <= limits.MANIFEST_CHUNKS and len(tail) <= limits.TAIL_CHARS


def require_chunks(
    row: ContextRow, found: Container[Digest], errors: Mapping[Digest, HoldfastError] | None = None
) -> None:
    """Raises unless every chunk of a manifest was found: the error of the first that was not, or NotFoundError."""
    lost = [digest for digest in decode_manifest(row.body).chunks if digest not in found]
    if lost:
        raise (errors or {}).get(lost[0]) or NotFoundError(
            f"{len(lost)} chunks of {row.ref} are stored nowhere", hint="run 'holdfast verify'"
        )


def join(row: ContextRow, chunks: Mapping[Digest, bytes]) -> ContextRow:
    """Returns the whole context of a manifest row, its body checked against the digest.

    Raises DigestMismatchError when the chunks do not make the body that the digest names.
    """
    manifest = decode_manifest(row.body)
    tail = (manifest.tail or "").encode()
    size = sum(len(chunks[digest]) for digest in manifest.chunks) + len(tail)
    # Before they are joined: a forged manifest may name one chunk four thousand times.
    if size != manifest.size:
        raise _unlike(row, f"are {size} bytes, not {manifest.size}")
    body = b"".join([*(chunks[digest] for digest in manifest.chunks), tail])
    actual = compute_digest(
        row.namespace, row.kind, body, content_type=row.content_type, expires_at_ms=row.expires_at_ms
    )
    if actual != row.digest:
        raise _unlike(row, f"hash to {actual}")
    return msgspec.structs.replace(row, body=body, size=size, form="plain")


def _unlike(row: ContextRow, what: str) -> DigestMismatchError:
    return DigestMismatchError(
        f"the chunks of {row.ref} {what}",
        field="body",
        hint="run 'holdfast verify'; the damaged copy was not served",
    )


def _compressor() -> zstd.ZstdCompressor:
    """This thread's compressor: making one costs more than compressing a small body with it."""
    compressor: zstd.ZstdCompressor | None = getattr(_LOCAL, "compressor", None)
    if compressor is None:
        compressor = _LOCAL.compressor = zstd.ZstdCompressor(level=_LEVEL)
    return compressor


def _compressed(
    headers: dict[str, str], body: bytes, *, over: int = limits.COMPRESS_OVER_BYTES
) -> tuple[dict[str, str], bytes]:
    if len(body) > over:
        frame = _compressor().compress(body, zstd.ZstdCompressor.FLUSH_FRAME)
        if len(frame) + _ENCODING_HEADER_BYTES < len(body):
            return headers | {H_ENCODING: _ZSTD}, frame
    return headers, body


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor: making one costs eight times what inflating a small body with it does."""
    decompressor: zstandard.ZstdDecompressor | None = getattr(_LOCAL, "decompressor", None)
    if decompressor is None:
        decompressor = _LOCAL.decompressor = zstandard.ZstdDecompressor()
    return decompressor


def _decompressed(payload: bytes, encoding: str | None) -> bytes:
    if encoding is None:
        return payload
    if encoding != _ZSTD:
        raise InvalidFieldError(f"encoding {encoding[:20]!r} is not zstd", field=H_ENCODING)
    try:
        # As all writers of ours leave it: one frame that says its size, which bounds what is allocated.
        if 0 < zstandard.get_frame_parameters(payload).content_size <= limits.CHUNK_BYTES:
            return _decompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError:
        pass  # what is wrong with it is told below
    return _inflated(payload)


def _inflated(payload: bytes) -> bytes:
    """Inflates a frame that says nothing of its size, or is damaged."""
    try:
        decompressor = zstd.ZstdDecompressor()
        # One byte over the limit is enough to see a bomb, however far it would inflate.
        body = decompressor.decompress(payload, max_length=limits.CHUNK_BYTES + 1)
    except zstd.ZstdError as error:
        raise InvalidBodyError(f"zstd frame does not decode: {error}", field="body") from error
    if len(body) > limits.CHUNK_BYTES:
        raise TooLargeError(
            f"zstd frame inflates beyond {limits.CHUNK_BYTES} bytes", field="body", limit=limits.CHUNK_BYTES
        )
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidBodyError("zstd frame is truncated or followed by other bytes", field="body")
    return body


def _expiry(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and int(text) <= MAX_MS):
        raise InvalidFieldError(f"expiry {text[:20]!r} is not milliseconds since 1970", field=H_EXPIRES)
    return int(text)


def _form(text: str | None) -> Form:
    if text is None:
        return "plain"
    if text == "manifest":
        return "manifest"
    if text == "chunk":
        return "chunk"
    raise InvalidFieldError(f"form {text[:20]!r} is not manifest or chunk", field=H_FORM)
