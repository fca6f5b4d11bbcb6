"""Settings of the session manager: one frozen value, from an argument, a settings object or the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from holdfast.schemas.errors import ConfigurationError
from holdfast.schemas.limits import TTL_S

DEFAULT_EXPIRATION_S: Final = 3_600.0
"""An hour without a change: longer than a person's pause, shorter than a day of forgotten sessions."""

DEFAULT_COLLECTION_INTERVAL_S: Final = 10.0
"""How often the in-memory store looks for expired sessions.  They read as absent before that, too."""

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


class SessionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a session manager does.  In the environment and in settings objects the names are in capitals."""

    use_redis_caching: bool = True
    """True: the distributed, persistent store, which here is Holdfast itself (no Redis is needed or used).
    False: a dict of this process, with locks; it ends with the process, and needs no server."""
    time_based_expiration: bool = False
    """Whether a session that nobody changes for ``session_expiration_seconds`` expires."""
    session_expiration_seconds: float = DEFAULT_EXPIRATION_S
    """Life of a session from its last change; each change renews it."""
    garbage_collection: bool = True
    """Whether expired sessions are removed in the background: by a thread for the in-memory store.  In the
    distributed store that is the janitor's work, for all managers at once, and this setting changes nothing."""
    garbage_collection_interval_seconds: float = DEFAULT_COLLECTION_INTERVAL_S
    """How often the thread of the in-memory store looks."""
    async_operations: bool = True
    """Whether the ``async_*`` methods may be used; ``ContextManager.async_enabled`` tells."""
    event_emission: bool = True
    """Whether listeners are called."""

    def __post_init__(self) -> None:
        for field in ("session_expiration_seconds", "garbage_collection_interval_seconds"):
            value: object = getattr(self, field)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < cast(float, value) <= TTL_S:  # NaN is in no order
                raise ConfigurationError(
                    f"{field} is {value!r}, not a number of seconds above 0 and up to {TTL_S}", field=field, limit=TTL_S
                )

    @classmethod
    def load(cls, source: object = None, environ: Mapping[str, str] | None = None) -> SessionSettings:
        """Returns the settings that ``source`` and the environment name; of each the first that has it wins.

        ``source`` is a mapping, or any object whose attributes (or whose ``get``) are settings, such as that of
        dynaconf: only the names of the fields, in capitals or not, are looked up.  ``environ`` defaults to the
        environment of the process.  Raises ConfigurationError for a value that cannot be used, naming the field.
        """
        if isinstance(source, SessionSettings):
            return source
        env = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for field in msgspec.structs.fields(cls):
            name = field.name.upper()
            for origin, found in ((f"setting {name}", _look_up(source, name)), (f"variable {name}", env.get(name))):
                if found is not None and found != "":  # an empty variable counts as unset
                    values[field.name] = _flag(found, origin) if field.type is bool else _seconds(found, origin)
                    break
        return cls(**values)


def _look_up(source: object, name: str) -> object:
    if source is None:
        return None
    for spelling in (name, name.lower()):
        if isinstance(source, Mapping):
            value = cast("Mapping[str, object]", source).get(spelling)
        else:
            value = getattr(source, spelling, None)
            if value is None and callable(getattr(source, "get", None)):
                value = cast(Any, source).get(spelling)
        if value is not None:
            return value
    return None


def _flag(value: object, origin: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigurationError(
        f"{origin} is {repr(value)[:80]}, neither true nor false",
        field=origin.split()[-1],
        hint="write true or false",
    )


def _seconds(value: object, origin: str) -> float:
    if not isinstance(value, bool):
        try:
            return float(cast(Any, value))
        except (TypeError, ValueError):
            pass  # told below
    raise ConfigurationError(
        f"{origin} is {repr(value)[:80]}, not a number of seconds",
        field=origin.split()[-1],
        hint="write a number such as 3600",
    )
