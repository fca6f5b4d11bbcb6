"""Names of the events that make up conversations."""

from __future__ import annotations

from typing import Final

CONTEXT_ADDED: Final = "conversation:context"
"""Name of the events that add a context to a session."""

FORKED: Final = "conversation:forked"
"""Name of the first event of a session that was forked: its data say ``from`` which session, and ``at`` which event."""
