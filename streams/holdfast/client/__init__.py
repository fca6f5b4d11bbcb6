"""The SDK that agents import::

    from holdfast.client import connect

    async with connect(agent="planner") as hf:
        ref = await hf.put({"goal": "book a flight"}, kind="completion")
        context = await hf.resolve(ref)
        await hf.emit("agent:status", {"state": "ready"}, context=ref, session="s1")

The base install is enough for it; nothing of the lake is imported.
"""

from holdfast.client import lineage
from holdfast.client.context_client import ContextClient
from holdfast.client.context_functions import get_context, store_context, update_context
from holdfast.client.conversations import Conversation, ConversationTracker, Message
from holdfast.client.event_contexts import EventContextManager, get_context_manager
from holdfast.client.model import Context, Event, Resolved, Tier
from holdfast.client.pipelines import (
    ContextReference,
    ContextRegistry,
    StepResultManager,
    get_context_registry,
    get_step_result_manager,
)
from holdfast.client.receipts import Inputs, Use
from holdfast.client.session_manager import ContextManager
from holdfast.client.session_model import SessionEvent
from holdfast.client.session_settings import SessionSettings
from holdfast.client.store import Holdfast, connect
from holdfast.schemas.errors import (
    ClosedError,
    ConfigurationError,
    ConflictError,
    DamagedError,
    DepthLimitError,
    DigestMismatchError,
    EncryptionKeyError,
    GapError,
    HandlerError,
    HoldfastError,
    InputError,
    IntegrityError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
    InvalidRefError,
    NotFoundError,
    RetryError,
    StorageFailedError,
    TooLargeError,
    UnavailableError,
    UnknownOutcomeError,
    VersionConflictError,
)
from holdfast.schemas.ids import EventId
from holdfast.schemas.refs import Ref

__all__ = [
    "ClosedError",
    "ConfigurationError",
    "ConflictError",
    "Context",
    "ContextClient",
    "ContextManager",
    "ContextReference",
    "ContextRegistry",
    "Conversation",
    "ConversationTracker",
    "DamagedError",
    "DepthLimitError",
    "DigestMismatchError",
    "EncryptionKeyError",
    "Event",
    "EventContextManager",
    "EventId",
    "GapError",
    "HandlerError",
    "Holdfast",
    "HoldfastError",
    "InputError",
    "Inputs",
    "IntegrityError",
    "InvalidBodyError",
    "InvalidFieldError",
    "InvalidNameError",
    "InvalidRefError",
    "Message",
    "NotFoundError",
    "Ref",
    "Resolved",
    "RetryError",
    "SessionEvent",
    "SessionSettings",
    "StepResultManager",
    "StorageFailedError",
    "Tier",
    "TooLargeError",
    "UnavailableError",
    "UnknownOutcomeError",
    "Use",
    "VersionConflictError",
    "connect",
    "get_context",
    "get_context_manager",
    "get_context_registry",
    "get_step_result_manager",
    "lineage",
    "store_context",
    "update_context",
]
