"""What the context client hands to its callers, and how it changes data."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal, cast

import msgspec

from holdfast.client.merging import merge_patch
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.refs import Ref
from holdfast.schemas.rows import Op

ChangeType = Literal["append", "merge", "replace"]
CHANGE_TYPES: Final[tuple[ChangeType, ...]] = ("append", "merge", "replace")

_NO_SEARCH: Final = "full-text search does not exist yet: list keys by tags, session or agent with hf.keys.list"


class Absent:
    """Stands for data that is not there, where null is data."""


class ContextVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one version of a stored context.  Times are UTC."""

    key: str
    version: int
    op: Op
    timestamp: datetime
    tags: tuple[str, ...] = ()
    session_id: str | None = None
    agent_id: str | None = None
    changed_by: str | None = None
    change_type: str | None = None
    expires_at: datetime | None = None
    ref: Ref | None = None


class StoredContext(ContextVersion, frozen=True, kw_only=True):
    """A stored context: a version with its data, decoded."""

    data: Any


class SearchResults(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found.  ``available`` is False while there is no full-text search; ``message`` says so."""

    query: str
    results: list[StoredContext] = []
    total: int = 0
    available: bool = False
    message: str = _NO_SEARCH


def change_data(current: Any, data: Any, change_type: ChangeType) -> Any:
    """Returns what ``current`` (:class:`Absent` when there is none) becomes; neither is changed.

    Raises InvalidFieldError when it cannot be changed so.
    """
    if change_type == "replace":
        return data
    if change_type == "append":
        return _begun(data) if current is Absent else append_data(current, data)
    if not isinstance(data, dict):
        raise InvalidFieldError(
            f"{type(data).__name__} cannot be merged, an object can",
            field="data",
            hint="use the change type 'append' or 'replace'",
        )
    return merge_patch({} if current is Absent else current, data)


def append_data(current: Any, data: Any) -> Any:
    """Returns ``current`` with ``data`` at its end; neither is changed.

    A list takes the items of a list, or anything else as one item.  Text takes text.  Of two objects the members are
    appended one by one where both have them and either is a list or both are objects; other members are those of
    ``data``.  Raises InvalidFieldError for anything else.
    """
    if isinstance(current, list):
        more = cast("list[Any]", cast(object, data)) if isinstance(data, list) else [data]
        return [*cast("list[Any]", cast(object, current)), *more]
    if isinstance(current, str) and isinstance(data, str):
        return current + data
    if isinstance(current, dict) and isinstance(data, dict):
        merged = dict(cast("dict[str, Any]", current))
        for name, value in cast("dict[str, Any]", data).items():
            old = merged.get(name)
            grows = isinstance(old, list) or (isinstance(old, dict) and isinstance(value, dict))
            merged[name] = append_data(old, value) if grows else value
        return merged
    given, there = cast(object, data), cast(object, current)
    raise InvalidFieldError(
        f"{type(given).__name__} cannot be appended to {type(there).__name__}",
        field="change_type",
        hint="append to a list, a text or an object, or use the change type 'replace'",
    )


def _begun(data: Any) -> Any:
    """What an append begins with: what can be appended to."""
    return cast(Any, data) if isinstance(data, list | dict | str) else [data]
