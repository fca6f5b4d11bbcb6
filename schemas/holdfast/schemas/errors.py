"""The one error hierarchy of Holdfast, branched by what the caller can do.

::

    HoldfastError
    ├── RetryError            the same call may succeed later
    │   ├── UnavailableError      a needed part does not answer (server, resolver, lake)
    │   └── UnknownOutcomeError   no acknowledgement: stored or not is unknown; the same id is safe to send again
    │       └── StorageFailedError    ... because the server cannot write to its disk: full, or failing
    ├── InputError            mend the input; sending it again as it is cannot help
    │   ├── InvalidFieldError     a field has a wrong type, value or form
    │   │   ├── InvalidNameError      a namespace, agent, event name or kind
    │   │   ├── InvalidRefError       not a well-formed reference
    │   │   └── InvalidBodyError      a body that cannot be encoded or decoded
    │   ├── DepthLimitError       an event would stand too deep in its lineage: a loop of handlers, most likely
    │   ├── TooLargeError         over a stated limit
    │   ├── NotFoundError         nothing is stored under that name
    │   ├── HandlerError          a handler gave the event up: see its dead letter, mend the handler or the event
    │   └── VersionConflictError  a named context has another version than the one expected: read it and decide anew
    ├── ConfigurationError    mend the set-up: settings, server, streams, data directory
    │   ├── DriftError            a stream on the server differs from its declaration
    │   ├── DurabilityError       the server does not sync as the durability mode promises
    │   ├── DataDirectoryError    the data directory is in use, foreign or not writable
    │   ├── EncryptionKeyError    the key that a body is encrypted with, or is to be, is not at hand
    │   └── ClosedError           the client, or the connection, that the call was made on is closed
    └── IntegrityError        stored data is damaged or contradicts itself; nothing wrong was served
        ├── DigestMismatchError   bytes do not hash to the reference that names them
        ├── DamagedError          a file of the lake is damaged; rows of it cannot be read, everything else can
        ├── GapError              messages are missing from a stream that nothing of ours removed
        ├── ConflictError         one id, two contents
        └── FenceError            another process has advanced the lake; this one must start its cycle anew

Every error carries a stable ``code`` (the one that request-reply callers see), the ``field`` and the ``limit``
it is about where there are such, and a ``hint``: what to do next.  Messages are lower case, without a full stop.
"""

from __future__ import annotations

from typing import ClassVar, Final

MESSAGE_CHARS: Final = 2_000
"""Longest message of an error; what is over is cut off."""


class HoldfastError(Exception):
    """The root of every error that Holdfast raises.

    ``code`` is stable and machine-readable; ``status`` is its number in request-reply answers
    (``Nats-Service-Error-Code``), chosen from the HTTP meanings.  ``str(error)`` is the whole message with the hint.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    details: ClassVar[tuple[str, ...]] = ()
    """Attributes that travel with the error over request-reply; the constructor takes them by keyword."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        field: str | None = None,
        limit: int | str | None = None,
    ) -> None:
        # What is wrong with an input may be repeated in it at any length; an error must fit replies, headers and logs.
        if len(message) > MESSAGE_CHARS:
            message = f"{message[:MESSAGE_CHARS]}…"
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class RetryError(HoldfastError):
    """The same call may succeed later."""

    code = "retry"
    status = 503


class UnavailableError(RetryError):
    """A part that this call needs does not answer."""

    code = "unavailable"
    status = 503


class UnknownOutcomeError(RetryError):
    """No acknowledgement came before the deadline: the write may or may not have been stored.

    Sending the same content with the same id again is safe: it is stored once at most.
    """

    code = "unknown_outcome"
    status = 504


class StorageFailedError(UnknownOutcomeError):
    """The server cannot write to its disk, and so acknowledges nothing: the write may or may not have been stored.

    ``cause`` is the operating system's word, as ``no space left on device``.  Nothing that was acknowledged before is
    in danger.  Sending the same content with the same id again is safe, and succeeds once the server stores again.
    """

    code = "storage_failed"
    status = 507
    details: ClassVar[tuple[str, ...]] = ("cause",)

    def __init__(
        self,
        message: str,
        *,
        cause: str = "",
        hint: str | None = None,
        field: str | None = None,
        limit: int | str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, field=field, limit=limit)
        self.cause = cause


class InputError(HoldfastError):
    """The input must change before the call can succeed."""

    code = "invalid_input"
    status = 400


class InvalidFieldError(InputError):
    """A field of a request or of a message has a wrong type, value or form."""

    code = "invalid_field"


class InvalidNameError(InvalidFieldError):
    """A namespace, agent, event name or kind is empty, too long or not text."""

    code = "invalid_name"


class InvalidRefError(InvalidFieldError):
    """A reference is not of the form ``ctx_<kind>_<digest>``."""

    code = "invalid_ref"


class InvalidBodyError(InvalidFieldError):
    """A body cannot be encoded, or its stored form cannot be decoded."""

    code = "invalid_body"


class TooLargeError(InputError):
    """Something is over its stated limit."""

    code = "too_large"
    status = 413


class NotFoundError(InputError):
    """Nothing is stored under that name: asked of the hot tier and of the lake."""

    code = "not_found"
    status = 404


class VersionConflictError(InputError):
    """A named context has another version than the caller expected; nothing was written.

    ``key`` names it; ``expected`` and ``actual`` are the versions, 0 standing for "there is none".
    """

    code = "version_conflict"
    status = 409
    details: ClassVar[tuple[str, ...]] = ("key", "expected", "actual")

    def __init__(
        self,
        message: str,
        *,
        key: str = "",
        expected: int = 0,
        actual: int = 0,
        hint: str | None = None,
        field: str | None = "expected_version",
        limit: int | str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, field=field, limit=limit)
        self.key = key
        self.expected = expected
        self.actual = actual


class DepthLimitError(InputError):
    """An event would stand deeper in its lineage than is allowed; it was not sent.

    ``depth`` is where it would have stood.  Handlers that answer each other without end are stopped by it.
    """

    code = "depth_limit"
    details: ClassVar[tuple[str, ...]] = ("depth",)

    def __init__(
        self,
        message: str,
        *,
        depth: int = 0,
        hint: str | None = None,
        field: str | None = "event_depth",
        limit: int | str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, field=field, limit=limit)
        self.depth = depth


class HandlerError(InputError):
    """A handler gave up the event that it was to work on; the event is kept as a dead letter.

    ``handler`` names it; ``cause`` is the code of the error that it ended with.
    """

    code = "handler_failed"
    details: ClassVar[tuple[str, ...]] = ("handler", "cause")

    def __init__(
        self,
        message: str,
        *,
        handler: str = "",
        cause: str = "",
        hint: str | None = None,
        field: str | None = None,
        limit: int | str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, field=field, limit=limit)
        self.handler = handler
        self.cause = cause


class ConfigurationError(HoldfastError):
    """The set-up must change before the call can succeed."""

    code = "configuration"
    status = 500


class DriftError(ConfigurationError):
    """A stream on the server differs from its declaration.

    ``differences`` maps each setting to (declared, found).
    """

    code = "drift"

    def __init__(self, message: str, *, differences: dict[str, tuple[object, object]], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.differences = differences


class DurabilityError(ConfigurationError):
    """The server does not sync to disk as the chosen durability mode promises."""

    code = "durability"


class DataDirectoryError(ConfigurationError):
    """The data directory is in use by another process, is not ours, or cannot be written."""

    code = "data_directory"


class EncryptionKeyError(ConfigurationError):
    """The key that a body is encrypted with, or is to be encrypted with, is not at hand, or is not the right one.

    ``key_id`` names the key; None when no key is configured at all.
    """

    code = "encryption_key"
    details: ClassVar[tuple[str, ...]] = ("key_id",)

    def __init__(
        self,
        message: str,
        *,
        key_id: str | None = None,
        hint: str | None = None,
        field: str | None = "key_id",
        limit: int | str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, field=field, limit=limit)
        self.key_id = key_id


class ClosedError(ConfigurationError):
    """The client, or the connection, that a call was made on is closed: make the call on a new one.

    Nothing was sent, unless the call was under way when it closed: then a write may or may not have been stored.
    """

    code = "closed"
    status = 503


class IntegrityError(HoldfastError):
    """Stored data is damaged or contradicts itself; nothing wrong was served."""

    code = "integrity"
    status = 500


class DigestMismatchError(IntegrityError):
    """Bytes read from a tier do not hash to the reference that names them."""

    code = "digest_mismatch"


class DamagedError(IntegrityError):
    """A file of the lake is damaged, and what was asked for is, or may be, among its rows; nothing of it was served.

    ``file`` names it, ``rows`` says how many rows cannot be read, ``first_seq`` and ``last_seq`` between which
    sequences they are.  Everything else is served.
    """

    code = "damaged"
    details: ClassVar[tuple[str, ...]] = ("file", "rows", "first_seq", "last_seq")

    def __init__(
        self,
        message: str,
        *,
        file: str = "",
        rows: int = 0,
        first_seq: int = 0,
        last_seq: int = 0,
        hint: str | None = None,
        field: str | None = None,
        limit: int | str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, field=field, limit=limit)
        self.file = file
        self.rows = rows
        self.first_seq = first_seq
        self.last_seq = last_seq


class GapError(IntegrityError):
    """Messages are missing from a stream, and nothing of ours removed them."""

    code = "gap"


class ConflictError(IntegrityError):
    """One id names two different contents."""

    code = "conflict"
    status = 409


class FenceError(IntegrityError):
    """Another process has advanced the lake since this one read it; its work must be thrown away and redone."""

    code = "fenced"
