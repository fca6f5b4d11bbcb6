"""What is on the wire, written down a second time: references, subjects, stored forms.

Nothing here calls the code that it checks.  The formats are those of ``docs/format`` in the words of
``holdfast.schemas.refs`` and ``holdfast.streams.codec``, done again by other means, for names that need no escaping.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Mapping
from hashlib import blake2b, sha256
from typing import Any, Final

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STREAMS: Final = {"contexts": "KV_ctx-hot", "events": "CTX_EVENTS", "key_versions": "KV_ctx-keys"}
EPOCH: Final = "holdfast.epoch"
EPOCH_START: Final = "holdfast.epoch-start"
_PERSON: Final = b"holdfast-ctx-1"
_MOST_BYTES: Final = 64 * 1024 * 1024


class UnreadableError(Exception):
    """A stored message cannot be turned into what it stands for."""


def canonical(value: Any) -> bytes:
    """Returns JSON with sorted keys and no spaces, as the SDK stores bodies."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def digest_text(raw: bytes) -> str:
    """Returns the SHA-256 of some bytes in hexadecimal."""
    return sha256(raw).hexdigest()


def ref_of(namespace: str, kind: str, body: bytes, content_type: str = "application/json", expires: str = "") -> str:
    """Returns the reference of a context."""
    hasher = blake2b(digest_size=20, person=_PERSON)
    for field in (namespace.encode(), kind.encode(), content_type.encode(), expires.encode(), body):
        hasher.update(len(field).to_bytes(8, "little") + field)
    return f"ctx_{kind}_{base64.b32encode(hasher.digest()).decode().lower()}"


def body_of_message(
    namespace: str, digest: str, headers: Mapping[str, str], payload: bytes, find_chunk: Callable[[str], bytes | None]
) -> tuple[str, bytes] | None:
    """Returns (reference, plain bytes) of a message of the hot tier; None for a chunk, which is no context.

    ``find_chunk`` gives the plain bytes of a chunk by its digest.  Raises UnreadableError when the bytes are not what
    the message's key says.
    """
    raw = plain_payload(headers, payload)
    if headers.get("Hf-Form") == "chunk":
        return None
    if headers.get("Hf-Form") == "manifest":
        manifest = json.loads(raw)
        parts = [find_chunk(chunk) for chunk in manifest["chunks"]]
        missing = [chunk for chunk, part in zip(manifest["chunks"], parts, strict=True) if part is None]
        if missing:
            raise UnreadableError(f"{digest}: {len(missing)} of {len(parts)} chunks are missing, first {missing[0]}")
        raw = b"".join(part for part in parts if part is not None) + manifest.get("tail", "").encode()
    kind = headers.get("Hf-Kind", "")
    ref = ref_of(namespace, kind, raw, headers.get("Hf-Type", "application/json"), headers.get("Hf-Exp", ""))
    if ref != f"ctx_{kind}_{digest}":
        raise UnreadableError(f"{digest}: the bytes hash to {ref}")
    return ref, raw


def plain_payload(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Returns the payload of a message of the hot tier, decompressed."""
    encoding = headers.get("Hf-Enc")
    if encoding is None:
        return payload
    if encoding != "zstd":
        raise UnreadableError(f"encoding {encoding!r} is not known")
    try:
        raw = zstd.decompress(payload)
    except zstd.ZstdError as error:
        raise UnreadableError(f"the payload does not decompress: {error}") from error
    if len(raw) > _MOST_BYTES:
        raise UnreadableError("the payload is over 64 MiB")
    return raw
