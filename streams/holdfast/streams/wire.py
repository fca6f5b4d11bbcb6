"""Names on the wire: streams, subjects and headers.  Every subject is built here, never at a call site.

============  =========================================  =============================================
stream        subjects                                   a message is
============  =========================================  =============================================
KV_ctx-hot    ``$KV.ctx-hot.<ns>.<digest>``              one stored context (hot tier)
KV_ctx-keys   ``$KV.ctx-keys.<ns>.<key…>``               one version of a named context
CTX_EVENTS    ``ctx.<ns>.event.<agent>.<name…>``         one event
CTX_DEAD      ``ctx.<ns>.dead.<stream>.<epoch>.<seq>``   one message that could not be processed
============  =========================================  =============================================

A letter of a handler has the handler's consumer as a seventh token: one event may fail in several of them.  Results
that a client waits for are told on ``ctx.<ns>.reply.<client>``, which no stream keeps.

``<ns>``, ``<agent>`` and each segment of a name are tokens of :mod:`holdfast.schemas.names`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidNameError
from holdfast.schemas.names import (
    MARKER,
    check_agent,
    check_event_name,
    check_key,
    check_namespace,
    decode_token,
    encode_token,
    is_token,
)

if TYPE_CHECKING:
    from holdfast.schemas.rows import Table

HOT_STREAM: Final = "KV_ctx-hot"
KEYS_STREAM: Final = "KV_ctx-keys"
EVENTS_STREAM: Final = "CTX_EVENTS"
DEAD_STREAM: Final = "CTX_DEAD"

STREAM_OF_TABLE: Final[dict[Table, str]] = {
    "contexts": HOT_STREAM,
    "events": EVENTS_STREAM,
    "key_versions": KEYS_STREAM,
}

_UNKNOWN: Final = "unknown"
_TOKEN_CHARS: Final = 3 * limits.NAMESPACE_BYTES + len(MARKER)
"""Longest token of a namespace: every byte escaped."""

HOT_PREFIX: Final = "$KV.ctx-hot."
KEYS_PREFIX: Final = "$KV.ctx-keys."

# Headers of ours.  Defaults are left out: a plain JSON context carries Hf-Kind alone.
H_VERSION: Final = "Hf-V"
H_KIND: Final = "Hf-Kind"
H_TYPE: Final = "Hf-Type"
H_EXPIRES: Final = "Hf-Exp"
H_ENCODING: Final = "Hf-Enc"
H_FORM: Final = "Hf-Form"
H_PARTS: Final = "Hf-Parts"
H_DIGEST: Final = "Hf-Digest"
H_CREATED: Final = "Hf-Created"
H_END: Final = "Hf-End"
H_REASON: Final = "Hf-Reason"
H_CODE: Final = "Hf-Code"
H_ORIGIN_SUBJECT: Final = "Hf-Origin-Subject"
H_ORIGIN_TIME: Final = "Hf-Origin-Time"
H_ORIGIN_HEADERS: Final = "Hf-Origin-Headers"
H_HANDLER: Final = "Hf-Handler"

# Headers of the server's (ADR-8, ADR-31, ADR-50 of nats-architecture-and-design).
H_MSG_ID: Final = "Nats-Msg-Id"
H_EXPECT_SUBJECT_SEQ: Final = "Nats-Expected-Last-Subject-Sequence"
H_SUBJECT: Final = "Nats-Subject"
H_SEQUENCE: Final = "Nats-Sequence"
H_TIME: Final = "Nats-Time-Stamp"
H_UP_TO: Final = "Nats-UpTo-Sequence"
"""In the closing word of a batched direct get: up to where the answering server's copy of the stream goes."""
H_BATCH_ID: Final = "Nats-Batch-Id"
H_BATCH_SEQUENCE: Final = "Nats-Batch-Sequence"
H_BATCH_COMMIT: Final = "Nats-Batch-Commit"
H_STATUS: Final = "Status"
H_TRACEPARENT: Final = "traceparent"
H_SERVICE_ERROR: Final = "Nats-Service-Error-Code"


def hot_subject(namespace: str, digest: str) -> str:
    """Returns the subject of a context in the hot tier."""
    return f"{HOT_PREFIX}{encode_token(namespace)}.{digest}"


def event_subject(namespace: str, agent: str, name: str) -> str:
    """Returns the subject of an event; raises InvalidNameError for a name that may not be."""
    segments = ".".join(encode_token(segment) for segment in check_event_name(name).split(":"))
    return f"ctx.{encode_token(check_namespace(namespace))}.event.{encode_token(check_agent(agent))}.{segments}"


def key_subject(namespace: str, key: str) -> str:
    """Returns the subject of a named context; raises InvalidNameError for a key that may not be."""
    segments = ".".join(encode_token(segment) for segment in check_key(key).split("."))
    return f"{KEYS_PREFIX}{encode_token(namespace)}.{segments}"


def key_filter(namespace: str, prefix: str) -> str:
    """Returns a wildcard subject that takes in every key beginning with ``prefix``, and maybe others.

    Only whole segments narrow it: what stands behind the prefix's last dot is the reader's to compare.
    """
    segments = [encode_token(segment) for segment in prefix.split(".")[:-1]]
    return ".".join([f"{KEYS_PREFIX}{encode_token(namespace)}", *segments, ">"])


def message_id(namespace: str, identity: str) -> str:
    """Returns the ``Nats-Msg-Id`` of an id: the server's duplicate check spans all namespaces of a stream.

    The namespace is encoded: a header is trimmed, and ends at a line break.
    """
    return f"{encode_token(namespace)}.{identity}"


def event_filter(namespace: str, pattern: str) -> str:
    """Returns the wildcard subject of the events whose names fit a pattern.

    Segments are parted by colons: an inner ``*`` stands for one segment, a trailing one for one or more, ``*`` alone
    for every name.  Raises InvalidNameError for a pattern that may not be.
    """
    tokens = [_filter_token(segment, pattern) for segment in check_event_name(pattern).split(":")]
    if tokens[-1] == "*":
        tokens[-1] = ">"
    return f"ctx.{encode_token(check_namespace(namespace))}.event.*.{'.'.join(tokens)}"


def _filter_token(segment: str, pattern: str) -> str:
    if segment == "*":
        return segment
    if "*" in segment or segment == ">":
        raise InvalidNameError(
            f"pattern {pattern[:80]!r} has the segment {segment[:40]!r}",
            field="pattern",
            hint="a star stands for a whole segment: 'agent:*', '*:status' or '*'",
        )
    return encode_token(segment)


def reply_subject(namespace: str, client_id: str) -> str:
    """Returns the subject on which a waiting client is told of results."""
    return f"ctx.{encode_token(check_namespace(namespace))}.reply.{encode_token(client_id)}"


def dead_subject(namespace_token: str, stream: str, epoch: str, seq: int, handler: str | None = None) -> str:
    """Returns the subject of a dead letter: one for each origin, so that it is written once at most.

    ``namespace_token`` as :func:`namespace_token` gives it.  ``handler`` is the consumer of the handler that failed:
    one origin has a letter for each of those.
    """
    subject = f"ctx.{namespace_token}.dead.{stream}.{epoch}.{seq}"
    return subject if handler is None else f"{subject}.{handler}"


def service_subject(namespace: str, endpoint: str) -> str:
    """Returns the subject on which the resolver answers ``endpoint`` for a namespace."""
    return f"ctx.{encode_token(check_namespace(namespace))}.{endpoint}"


class EventAddress(NamedTuple):
    """What an event's subject says: names, decoded."""

    namespace: str
    agent: str
    name: str


def parse_event_subject(subject: str) -> EventAddress:
    """Returns what an event's subject says; raises InvalidNameError when a token is none of ours."""
    tokens = subject.split(".")
    if len(tokens) < 5 or tokens[0] != "ctx" or tokens[2] != "event":
        raise InvalidNameError(
            f"subject {subject[:120]!r} is not ctx.<namespace>.event.<agent>.<name…>", field="subject"
        )
    return EventAddress(
        check_namespace(decode_token(tokens[1])),
        check_agent(decode_token(tokens[3])),
        check_event_name(_joined(tokens[4:], ":")),
    )


def parse_hot_subject(subject: str) -> tuple[str, str]:
    """Returns (namespace, digest text) of a hot-tier subject; raises InvalidNameError when it is not one."""
    tokens = subject.removeprefix(HOT_PREFIX).split(".")
    if not subject.startswith(HOT_PREFIX) or len(tokens) != 2:
        raise InvalidNameError(f"subject {subject[:120]!r} is not {HOT_PREFIX}<namespace>.<digest>", field="subject")
    return _namespace_of(tokens[0]), tokens[1]


@lru_cache(256)
def _namespace_of(token: str) -> str:
    # A stream of a hundred thousand contexts names a few namespaces.
    return check_namespace(decode_token(token))


def parse_key_subject(subject: str) -> tuple[str, str]:
    """Returns (namespace, key) of a named context's subject; a key's segments are joined by dots."""
    tokens = subject.removeprefix(KEYS_PREFIX).split(".")
    if not subject.startswith(KEYS_PREFIX) or len(tokens) < 2:
        raise InvalidNameError(f"subject {subject[:120]!r} is not {KEYS_PREFIX}<namespace>.<key…>", field="subject")
    return check_namespace(decode_token(tokens[0])), check_key(_joined(tokens[1:], "."))


def _joined(tokens: list[str], separator: str) -> str:
    """The name that tokens stand for, one a segment.

    A segment with the separator in it would be a second spelling of a name that has more segments: two subjects of one
    event name, or two chains of versions of one key.
    """
    segments = [decode_token(token) for token in tokens]
    for segment, token in zip(segments, tokens, strict=True):
        if separator in segment:
            raise InvalidNameError(
                f"subject token {token[:80]!r} stands for a segment with {separator!r} in it",
                field="subject",
                hint="write each segment of a name as a token of its own",
            )
    return separator.join(segments)


def namespace_token(subject: str) -> str:
    """Returns the namespace token of any subject of ours, for filing a dead letter.

    A token that is well-formed stays as it stands, whether it decodes or not; one that is not is escaped; one that is
    too long for any namespace is filed under ``unknown``, since a subject must fit the server's control line.
    """
    tokens = subject.removeprefix(HOT_PREFIX).removeprefix(KEYS_PREFIX).split(".")
    index = 1 if tokens[0] == "ctx" else 0
    token = tokens[index] if len(tokens) > index and tokens[index] else _UNKNOWN
    safe = token if is_token(token) else encode_token(token)
    return safe if len(safe) <= _TOKEN_CHARS else _UNKNOWN
