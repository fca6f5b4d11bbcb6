"""A light pointer to what a step produced: handed on between steps in the place of the data."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, Final, TypeGuard, cast

from holdfast.client.pipeline_records import (
    StepRecord,
    check_execution_context,
    check_job_id,
    check_step_name,
    check_step_number,
)
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.refs import Ref, parse_ref

Completion = Callable[["ContextReference"], Awaitable["ContextReference | None"]]
"""Looks up what a pending reference points to and pins it there; None when there is nothing."""

_FIELDS: Final = frozenset(
    {"job_id", "step_name", "step_number", "execution_context_id", "timestamp", "compressed"},
)
_OWN_FIELDS: Final = frozenset({"root_job_id", "version", "ref"})


class ContextReference:
    """Points to one version of one step's output, and holds none of its data.

    ``job_id`` ran the step, ``root_job_id`` is the job that it is filed under; they differ when a job was resumed under
    an id of its own.  ``version`` and ``ref`` pin it: whatever is saved later, it goes on to answer with the data it
    was taken of.

    One that is not pinned yet knows job and step alone, perhaps the execution context; its other attributes are None.
    It means the newest saving, and is pinned where it stands when a registry resolves it.
    """

    __slots__ = (
        "__weakref__",
        "compressed",
        "execution_context_id",
        "job_id",
        "ref",
        "root_job_id",
        "step_name",
        "step_number",
        "timestamp",
        "version",
    )

    def __init__(
        self,
        job_id: str,
        step_name: str,
        step_number: int | None = None,
        execution_context_id: str | None = None,
        timestamp: str | None = None,
        compressed: bool = False,
        root_job_id: str | None = None,
        version: int | None = None,
        ref: Ref | None = None,
    ) -> None:
        self.job_id = check_job_id(job_id)
        self.step_name = check_step_name(step_name)
        self.step_number = None if step_number is None else check_step_number(step_number)
        self.execution_context_id = (
            None if execution_context_id is None else check_execution_context(execution_context_id)
        )
        self.timestamp = timestamp
        self.compressed = compressed
        self.root_job_id = None if root_job_id is None else check_job_id(root_job_id, "root_job_id")
        self.version = version
        self.ref = ref

    @classmethod
    def of_record(cls, record: StepRecord, version: int) -> ContextReference:
        """Returns the reference of a saved step."""
        reference = cls(record.job_id, record.step_name)
        reference.pin(record, version)
        return reference

    @property
    def is_pinned(self) -> bool:
        """Whether it names its data; a pending one does not yet."""
        return self.ref is not None

    def pin(self, record: StepRecord, version: int) -> None:
        """Makes it point to a saved step, for good."""
        self.job_id = record.job_id
        self.root_job_id = record.root_job_id
        self.step_name = record.step_name
        self.step_number = record.step_number
        self.execution_context_id = record.execution_context_id
        self.timestamp = record.timestamp
        self.compressed = record.compressed
        self.version = version
        self.ref = record.result

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON has it, for a message or a state that is stored."""
        return {
            "job_id": self.job_id,
            "step_name": self.step_name,
            "step_number": self.step_number,
            "execution_context_id": self.execution_context_id,
            "timestamp": self.timestamp,
            "compressed": self.compressed,
            "root_job_id": self.root_job_id,
            "version": self.version,
            "ref": self.ref,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ContextReference:
        """Returns the reference of a dict; ``root_job_id``, ``version`` and ``ref`` may be absent.

        Raises InvalidFieldError when another member is missing or one has a value that no reference has.
        """
        missing = sorted((_FIELDS - {"compressed"}) - set(data))
        if missing:
            raise InvalidFieldError(f"a reference is missing {', '.join(missing)}", field=missing[0])
        timestamp, version, compressed = data["timestamp"], data.get("version"), data.get("compressed", False)
        ref = data.get("ref")
        if not (timestamp is None or isinstance(timestamp, str)):
            raise InvalidFieldError("timestamp of a reference is no text", field="timestamp")
        if not (version is None or (isinstance(version, int) and not isinstance(version, bool) and version > 0)):
            raise InvalidFieldError("version of a reference is no whole number from 1 on", field="version")
        if not isinstance(compressed, bool):
            raise InvalidFieldError("compressed of a reference is not true or false", field="compressed")
        if ref is not None:
            parse_ref(ref)
        return cls(
            job_id=data["job_id"],
            step_name=data["step_name"],
            step_number=data["step_number"],
            execution_context_id=data["execution_context_id"],
            timestamp=timestamp,
            compressed=compressed,
            root_job_id=data.get("root_job_id"),
            version=version,
            ref=ref,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContextReference) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        # Job and version come to be known later; the step's name never changes.
        return hash(self.step_name)

    def __repr__(self) -> str:
        place = f"context_{self.execution_context_id} " if self.execution_context_id is not None else ""
        pinned = f"version {self.version}" if self.is_pinned else "pending"
        return f"ContextReference({self.job_id} {place}{self.step_name}, {pinned})"


class PendingReference(ContextReference):
    """A reference that nobody has been asked about yet: what :meth:`ContextRegistry.get_context_reference` returns.

    It is pinned, where it stands, when it is awaited, resolved or stored, or when the same registry is about to save
    that step again, whichever is first.  Awaited it gives itself, or None when no such step is saved.
    """

    __slots__ = ("_complete",)

    def __init__(self, job_id: str, step_name: str, execution_context_id: str | None, complete: Completion) -> None:
        super().__init__(job_id, step_name, execution_context_id=execution_context_id)
        self._complete = complete

    def __await__(self) -> Generator[Any, None, ContextReference | None]:
        return self._completed().__await__()

    async def _completed(self) -> ContextReference | None:
        return self if self.is_pinned else await self._complete(self)


class PendingReferences:
    """The references that a registry has given out and that point nowhere yet.  Of several threads, too.

    They are held weakly: one that its holder has dropped is no longer here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_step: dict[str, list[weakref.ref[ContextReference]]] = {}
        self._tidy_at = 64

    def add(self, reference: ContextReference) -> None:
        """Takes a reference in until it is pinned."""
        with self._lock:
            self._by_step.setdefault(reference.step_name, []).append(weakref.ref(reference))
            self._tidy_at -= 1
            if self._tidy_at <= 0:
                # Twice as many as are alive: each addition pays for two looks.
                left = sum(len(self._prune(step)) for step in list(self._by_step))
                self._tidy_at = max(64, left)

    def of_step(self, step_name: str) -> list[ContextReference]:
        """Returns those of one step, of any job."""
        with self._lock:
            return self._prune(step_name)

    def _prune(self, step_name: str) -> list[ContextReference]:
        alive = [found for held in self._by_step.get(step_name, ()) if (found := held()) and not found.is_pinned]
        if alive:
            self._by_step[step_name] = [weakref.ref(reference) for reference in alive]
        else:
            self._by_step.pop(step_name, None)
        return alive


def is_reference_dict(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a dict is a reference's: it has all of its members and no other, and names of the right type.

    Data that a step produced has other members, so that both may stand in the same place.
    """
    if not isinstance(value, dict):
        return False
    data = cast("dict[str, Any]", value)
    members = set(data)
    if not (members >= _FIELDS and members <= _FIELDS | _OWN_FIELDS):
        return False
    return isinstance(data["job_id"], str) and isinstance(data["step_name"], str)
