"""What the exit status of ``holdfast`` means: chosen by what the caller can do, as the errors are."""

from __future__ import annotations

from typing import Final

from holdfast.schemas.errors import (
    ConfigurationError,
    InputError,
    IntegrityError,
    NotFoundError,
    RetryError,
    VersionConflictError,
)

OK: Final = 0
ERROR: Final = 1
"""Something failed that the codes below do not tell."""
USAGE: Final = 2
"""The command line, or the input it names, must change."""
UNAVAILABLE: Final = 3
"""The set-up must change, or a part does not answer (server, worker, data directory)."""
NOT_FOUND: Final = 4
"""Something that was named does not exist: a reference, named context, file, event or dead letter."""
VIOLATION: Final = 5
"""Stored data breaks a promise: damage, gaps, an unhealthy system, findings of ``verify``."""
CONFLICT: Final = 6
"""A named context has another version than the one expected: nothing was written; read it and decide anew."""
INTERRUPTED: Final = 130
"""Ctrl-C."""
PIPE_CLOSED: Final = 141
"""Whoever read the output went away, as with ``| head``."""
TERMINATED: Final = 143
"""SIGTERM, before the command was done."""

MEANINGS: Final[tuple[tuple[int, str], ...]] = (
    (OK, "done"),
    (ERROR, "failed"),
    (USAGE, "usage: the command line or its input must change"),
    (UNAVAILABLE, "configuration, or a server, worker or data directory that cannot be used"),
    (NOT_FOUND, "not found: a reference, named context, file, event or dead letter"),
    (VIOLATION, "a broken promise: damaged data, unhealthy, violations found"),
    (CONFLICT, "conflict: a named context has another version than expected"),
    (INTERRUPTED, "interrupted"),
    (TERMINATED, "terminated before it was done"),
)
"""Every code with its meaning, as ``holdfast --help`` lists them."""


def exit_code_of(error: BaseException) -> int:
    """Returns the exit status for an error."""
    match error:
        case NotFoundError():
            return NOT_FOUND
        case VersionConflictError():
            return CONFLICT
        case InputError():
            return USAGE
        case ConfigurationError() | RetryError():
            return UNAVAILABLE
        case IntegrityError():
            return VIOLATION
        case KeyboardInterrupt():
            return INTERRUPTED
        case _:
            return ERROR
