"""What the SDK tells of named contexts: versions, and values with their bodies at hand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from holdfast.schemas.ids import utc_from_ms
from holdfast.schemas.rows import KeyVersionRow, Op

if TYPE_CHECKING:
    from holdfast.client.model import Context
    from holdfast.schemas.refs import Ref

Loader = Callable[[KeyVersionRow], Awaitable["Context"]]


class KeyVersion:
    """One version of a named context: who changed what when.  Its body is loaded by :meth:`load`.

    ``row`` is the version as it is stored.  ``epoch`` names the life of the stream it was read from.
    """

    def __init__(self, row: KeyVersionRow, load: Loader, *, epoch: str = "") -> None:
        self.row = row
        self._load = load
        self._epoch = row.epoch or epoch

    @property
    def key(self) -> str:
        """The name."""
        return self.row.key

    @property
    def namespace(self) -> str:
        """The namespace of the name."""
        return self.row.namespace

    @property
    def version(self) -> int:
        """Its number: from 1, without gaps."""
        return self.row.version

    @property
    def op(self) -> Op:
        """How it came about: ``put``, ``patch``, ``delete``, ``rollback`` or ``expire``."""
        return self.row.op

    @property
    def deleted(self) -> bool:
        """Whether it says that there is no body any more."""
        return is_tombstone(self.row)

    @property
    def ref(self) -> Ref | None:
        """The context it points at; None for a tombstone."""
        return self.row.ref

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags."""
        return self.row.tags

    @property
    def session(self) -> str | None:
        """The session it was written in."""
        return self.row.session_id

    @property
    def agent(self) -> str | None:
        """The agent that wrote it."""
        return self.row.agent_id

    @property
    def changed_by(self) -> str | None:
        """Who changed it: as the writer said, else the agent."""
        return self.row.changed_by if self.row.changed_by is not None else self.row.agent_id

    @property
    def change_type(self) -> str | None:
        """What sort of change it was, in the writer's words."""
        return self.row.change_type

    @property
    def event_id(self) -> str | None:
        """The id of this change."""
        return self.row.event_id

    @property
    def source(self) -> str | None:
        """Where the content comes from."""
        return self.row.source

    @property
    def confidence(self) -> float | None:
        """How sure its writer was."""
        return self.row.confidence

    @property
    def proposed_by(self) -> str | None:
        """Who proposed it."""
        return self.row.proposed_by

    @property
    def approved_by(self) -> str | None:
        """Who approved it."""
        return self.row.approved_by

    @property
    def approved_at(self) -> datetime | None:
        """When it was approved, UTC."""
        return None if self.row.approved_at_ms is None else utc_from_ms(self.row.approved_at_ms)

    @property
    def timestamp(self) -> datetime:
        """When it was changed, by its writer's clock, UTC."""
        return utc_from_ms(self.row.timestamp_ms)

    @property
    def stored_at(self) -> datetime | None:
        """When the server stored it, UTC: what ``as_of`` goes by.  None for a version just written."""
        return utc_from_ms(self.row.stored_at_ms) if self.row.stored_at_ms else None

    @property
    def expires_at(self) -> datetime | None:
        """When it ceases to be there, by the server's clock, UTC; None for never."""
        return None if self.row.expires_at_ms is None else utc_from_ms(self.row.expires_at_ms)

    @property
    def position(self) -> str | None:
        """Where it stands in the stream, for ``watch(after=…)``; None when that is not known."""
        return f"{self._epoch}:{self.row.seq}" if self._epoch and self.row.seq else None

    async def load(self) -> Context:
        """Returns the context it points at; raises NotFoundError for a tombstone."""
        return await self._load(self.row)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key!r}, version {self.version}, {self.op})"


class KeyValue(KeyVersion):
    """A version with the context it points at."""

    def __init__(self, row: KeyVersionRow, load: Loader, context: Context, *, epoch: str = "") -> None:
        super().__init__(row, load, epoch=epoch)
        self.context = context

    @property
    def body(self) -> Any:
        """The body, decoded: JSON as Python objects, text as str, anything else as bytes.

        Every use decodes anew, so that what a caller does to it stays its own.
        """
        return self.context.decode()

    @property
    def raw(self) -> bytes:
        """The exact bytes of the body."""
        return self.context.raw

    async def load(self) -> Context:
        """Returns the context."""
        return self.context


def is_tombstone(row: KeyVersionRow) -> bool:
    """Whether a version says that there is no body any more."""
    return row.op in ("delete", "expire")


def is_live(row: KeyVersionRow | None, at_ms: int) -> bool:
    """Whether a chain that ends with ``row`` has a body at a time: written, not deleted, not expired."""
    return row is not None and not is_tombstone(row) and (row.expires_at_ms is None or row.expires_at_ms > at_ms)
