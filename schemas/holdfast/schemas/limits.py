"""Every limit on input, in one place: a bound, its unit and its reason.

A value over its limit is refused with :class:`~holdfast.schemas.errors.TooLargeError` or
:class:`~holdfast.schemas.errors.InvalidFieldError` naming the field and the limit.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

BODY_BYTES: Final = 64 * MIB
"""Largest body of one context.  Larger things belong in an object store, with a reference as their context."""

CHUNK_BYTES: Final = 512 * KIB
"""Bodies over this are stored as chunks: half of the server's default ``max_payload`` of 1 MiB, so that a
chunk with its headers, or two in flight, always fit."""

MANIFEST_CHUNKS: Final = 4_096
"""Most chunks of one body: what one reading of it may ask for."""

TAIL_CHARS: Final = 64 * KIB
"""Longest text that a manifest holds itself, behind its last chunk."""

COMPRESS_OVER_BYTES: Final = 1 * KIB
"""Bodies over this are stored compressed when that is smaller; below it zstd rarely wins."""

EVENT_BYTES: Final = 900 * KIB
"""Largest event message, data and inline context together (``max_payload`` less headers)."""

REPLY_BYTES: Final = 900 * KIB
"""A reply stops before this and names what is left in ``next``."""

NESTING: Final = 64
"""Deepest nesting of JSON that is accepted."""

NAME_BYTES: Final = 256
"""Longest agent name, in UTF-8 bytes.  Escaped, a byte takes three characters: the longest subject of an event,
3 x (64 + 256 + 512) and some, stays below the server's control line of 4 KiB."""

EVENT_NAME_BYTES: Final = 512
"""Longest event name with all its segments, in UTF-8 bytes."""

NAMESPACE_BYTES: Final = 64
"""Longest namespace, in UTF-8 bytes."""

NAME_SEGMENTS: Final = 16
"""Most segments (``a:b:c``) of an event name: each is a token of its subject."""

KEY_BYTES: Final = 768
"""Longest key of a named context, in UTF-8 bytes; its subject stays below the server's control line of 4 KiB."""

KEY_SEGMENTS: Final = 32
"""Most segments (``a.b.c``) of a key: each is a token of its subject."""

COMMIT_KEYS: Final = 500
"""Most keys of one commit: it is one atomic batch."""

TTL_S: Final = 10 * 365 * 86_400
"""Longest time to live of a key, in seconds."""

KIND_CHARS: Final = 64
"""Longest kind."""

ID_CHARS: Final = 256
"""Longest session, correlation, client or originator id, in characters."""

TAGS: Final = 64
"""Most tags of one version of a named context."""

CONTENT_TYPE_CHARS: Final = 128
"""Longest content type."""

LINEAGE_DEPTH: Final = 64
"""Deepest event that may be emitted as a child by lineage alone: what answers itself without end is stopped here."""

BATCH_REFS: Final = 1000
"""Most references in one ``resolve_batch``."""

QUERY_LIMIT_DEFAULT: Final = 20
QUERY_LIMIT_MAX: Final = 1000

BATCH_MESSAGES: Final = 500
"""Most messages in one atomic batch (the server allows 1,000): the gain above 500 is small, the latency is not."""

BATCH_BYTES: Final = 4 * MIB
"""Most bytes in one atomic batch: bounds what a server must hold before the commit message arrives."""
