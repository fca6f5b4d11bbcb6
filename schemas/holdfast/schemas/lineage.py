"""The lineage of an event as a plain dict, and the names that belong to it.

The dict describes the *current* event; what is emitted under it becomes that event's child.  Its members are those of
:data:`FIELDS`, absent where unknown, and any others: *attributes*, which children inherit.  An event carries its
attributes in the member :data:`ATTRIBUTES` of its message.
"""

from __future__ import annotations

from typing import Final

OWN_NAMES: Final = "holdfast:"
"""What the names of Holdfast's own events begin with; a query leaves them out unless it asks for them."""

RECEIPT: Final = f"{OWN_NAMES}receipt"
"""Name of the events that say which contexts were read and made in working on their parent."""

ATTRIBUTES: Final = "attributes"
"""Member of an event's message that holds the attributes of its lineage, as an object."""

IDENTITY_FIELDS: Final = (
    "event_id", "parent_event_id", "root_event_id", "event_depth", "timestamp", "context_ref", "traceparent",
)  # fmt: skip
"""What says which event it is and where it stands: these make sense together only."""

INHERITED_FIELDS: Final = ("correlation_id", "session_id", "agent_id", "client_id", "originator")
"""What a child takes over as it is."""

FIELDS: Final = (*IDENTITY_FIELDS, *INHERITED_FIELDS)

ALIASES: Final = {
    "_event_id": "event_id",
    "_correlation_id": "correlation_id",
    "_parent_event_id": "parent_event_id",
    "_root_event_id": "root_event_id",
    "_event_depth": "event_depth",
    "_agent_id": "agent_id",
    "_client_id": "client_id",
    "_originator": "originator",
    "_session_id": "session_id",
    "_timestamp": "timestamp",
    "_ksi_context_ref": "context_ref",
}
"""Names under which earlier systems write the same members; taken on input."""
