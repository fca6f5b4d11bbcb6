"""Options of the context client, in both spellings: ``{"sessionId": "s"}`` as a mapping, ``session_id="s"`` as a
keyword.  An option that there is not, or that is given twice, is an error naming it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, TypedDict, cast

import msgspec

from holdfast.schemas.errors import InvalidFieldError

OptionMap = Mapping[str, Any]
"""Options as a mapping, by either spelling."""


class StoreOptions(TypedDict, total=False):
    """What ``store`` and its kin take as keywords; None stands for "not given"."""

    session_id: str | None
    agent_id: str | None
    ttl: float | timedelta | None
    tags: Sequence[str] | None
    encrypt: bool | None
    compress: bool | None
    changed_by: str | None
    change_type: str | None
    expected_version: int | None


class SearchOptions(TypedDict, total=False):
    """What ``search`` takes as keywords."""

    session_id: str | None
    limit: int | None
    offset: int | None


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options that were checked; None: not given."""

    session_id: str | None = None
    agent_id: str | None = None
    ttl: float | timedelta | None = None
    tags: tuple[str, ...] | None = None
    encrypt: bool | None = None
    compress: bool | None = None
    changed_by: str | None = None
    change_type: str | None = None
    expected_version: int | None = None
    limit: int | None = None
    offset: int | None = None


STORE: Final = frozenset(StoreOptions.__annotations__)
UPDATE: Final = STORE
DELETE: Final = frozenset({"agent_id", "changed_by", "change_type", "expected_version"})
SEARCH: Final = frozenset(SearchOptions.__annotations__)


def parse_options(options: OptionMap | None, keywords: Mapping[str, Any], allowed: Iterable[str]) -> Options:
    """Returns the options of a call; raises InvalidFieldError naming one that is unknown, given twice or of a wrong
    type."""
    names = sorted(allowed)
    values: dict[str, Any] = {}
    if options is not None and not _is_mapping(options):
        raise InvalidFieldError(
            f"options are {type(options).__name__}, not a mapping", field="options", hint='give {"ttl": 3600}'
        )
    for given, value in [*(options or {}).items(), *keywords.items()]:
        name = _SNAKE.get(given, given)
        if name not in names:
            raise InvalidFieldError(
                f"there is no option {given!r}",
                field=str(given)[:80],
                hint=f"the options are {', '.join(_camel(known) for known in names)}, or {', '.join(names)}",
            )
        if name in values:
            raise InvalidFieldError(f"option {name} is given twice", field=name, hint="give it once")
        values[name] = None if value is None else _checked(name, value)
    return Options(**values)


def _is_mapping(options: object) -> bool:
    return isinstance(options, Mapping)


def _checked(name: str, value: Any) -> Any:
    match name:
        case "ttl":
            if isinstance(value, int | float | timedelta) and not isinstance(value, bool):
                return value
            wanted = "a number of seconds"
        case "tags":
            if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
                tags = tuple(cast("Iterable[object]", value))
                if all(isinstance(tag, str) for tag in tags):
                    return tags
            wanted = "a list of texts"
        case "encrypt" | "compress":
            if isinstance(value, bool):
                return value
            wanted = "true or false"
        case "expected_version" | "limit" | "offset":
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
            wanted = "a whole number from 0"
        case _:
            if isinstance(value, str):
                return value
            wanted = "text"
    raise InvalidFieldError(f"option {name} is {_type_name(cast(object, value))}, not {wanted}", field=name)


def _type_name(value: object) -> str:
    return type(value).__name__


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


_SNAKE: Final = {_camel(name): name for name in STORE | SEARCH}

__all__ = [
    "DELETE",
    "SEARCH",
    "STORE",
    "UPDATE",
    "OptionMap",
    "Options",
    "SearchOptions",
    "StoreOptions",
    "parse_options",
]
