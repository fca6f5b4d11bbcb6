"""The SDK that agents import::

    from holdfast.client import connect

    async with connect(agent="planner") as hf:
        ref = await hf.put({"goal": "book a flight"}, kind="completion")
        context = await hf.resolve(ref)
        await hf.emit("agent:status", {"state": "ready"}, context=ref, session="s1")

The base install is enough for it; nothing of the lake is imported.
"""

from holdfast.client.model import Context, Event, Resolved, Tier
from holdfast.client.store import Holdfast, connect
from holdfast.schemas.errors import (
    ConfigurationError,
    ConflictError,
    DigestMismatchError,
    EncryptionKeyError,
    GapError,
    HoldfastError,
    InputError,
    IntegrityError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
    InvalidRefError,
    NotFoundError,
    RetryError,
    TooLargeError,
    UnavailableError,
    UnknownOutcomeError,
    VersionConflictError,
)
from holdfast.schemas.ids import EventId
from holdfast.schemas.refs import Ref

__all__ = [
    "ConfigurationError",
    "ConflictError",
    "Context",
    "DigestMismatchError",
    "EncryptionKeyError",
    "Event",
    "EventId",
    "GapError",
    "Holdfast",
    "HoldfastError",
    "InputError",
    "IntegrityError",
    "InvalidBodyError",
    "InvalidFieldError",
    "InvalidNameError",
    "InvalidRefError",
    "NotFoundError",
    "Ref",
    "Resolved",
    "RetryError",
    "Tier",
    "TooLargeError",
    "UnavailableError",
    "UnknownOutcomeError",
    "VersionConflictError",
    "connect",
]
