"""What steps produce and are given, as it is stored: exact bytes, with references where data was handed on by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

import msgspec

from holdfast.client.context_reference import ContextReference
from holdfast.client.pipeline_records import DATA_KIND
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidBodyError
from holdfast.streams.codec import seal
from holdfast.streams.wire import H_ENCODING

_IN_THREAD_BYTES: Final = 64 * limits.KIB


class EncodedBody(NamedTuple):
    """Exact bytes and their content type."""

    raw: bytes
    content_type: str


def to_plain(value: Any, field: str, seen: Callable[[ContextReference], None] = lambda _: None) -> Any:
    """Returns ``value`` as what ``put`` stores: text and bytes as they are, everything else as JSON has it.

    Beside what JSON can hold: dates, UUIDs, decimals, enums, sets, dataclasses, Structs, pydantic models (anything with
    ``model_dump``) and references, each of which is shown to ``seen``.  Raises InvalidBodyError for anything else.
    """
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(cast("bytes", value))

    def plain(inner: Any) -> Any:
        if isinstance(inner, ContextReference):
            seen(inner)
            return inner.to_dict()
        dump = getattr(inner, "model_dump", None)
        if callable(dump) and not isinstance(inner, type):
            return dump(mode="json")
        raise TypeError(f"objects of type {type(inner).__name__} are not supported")

    try:
        return msgspec.to_builtins(value, str_keys=True, enc_hook=plain)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise InvalidBodyError(
            f"{field} of type {type(value).__name__} has no form in JSON: {error}",
            field=field,
            hint="pass what JSON can hold",
        ) from error


async def is_stored_compressed(namespace: str, body: EncodedBody) -> bool:
    """Whether the hot tier compresses a body: when it is over 1 KiB and compressing makes it smaller."""
    if len(body.raw) <= limits.COMPRESS_OVER_BYTES:
        return False
    # Of a body in chunks, the first tells.
    part = EncodedBody(body.raw[: limits.CHUNK_BYTES], body.content_type)
    if len(part.raw) <= _IN_THREAD_BYTES:
        return _is_compressed(namespace, part)
    return await asyncio.to_thread(_is_compressed, namespace, part)


def _is_compressed(namespace: str, body: EncodedBody) -> bool:
    return H_ENCODING in seal(namespace, DATA_KIND, body.raw, content_type=body.content_type)[-1].headers
