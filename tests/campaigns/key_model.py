"""Named contexts as a dict of lists: what ``hf.keys`` must do, said without a server.

Holds no tests itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from holdfast.schemas.bodies import encode_body

TOMBSTONES: Final = ("delete", "expire")


class Absent(Exception):  # noqa: N818  an outcome
    """There is nothing under the key."""


class Conflict(Exception):  # noqa: N818  an outcome
    """The newest version is another: of ``key``, and ``actual`` is what a caller is told."""

    def __init__(self, key: str, actual: int) -> None:
        super().__init__(f"{key!r} has version {actual}")
        self.key = key
        self.actual = actual


class WrongBody(Exception):  # noqa: N818  an outcome
    """The body cannot be changed so."""


@dataclass
class Version:
    """One version.  ``stored_at_ms`` and ``event_id`` are not the model's to give: learned, then fixed."""

    op: str
    body: Any = None
    tags: tuple[str, ...] = ()
    session: str | None = None
    agent: str | None = None
    change_type: str | None = None
    expires_at_ms: int | None = None
    stored_at_ms: int | None = None
    event_id: str | None = None

    @property
    def is_tombstone(self) -> bool:
        return self.op in TOMBSTONES

    @property
    def raw(self) -> bytes:
        return encode_body(self.body)[0]

    @property
    def is_json(self) -> bool:
        return not isinstance(self.body, str | bytes)


@dataclass
class Change:
    """What a caller says of a change."""

    expected: int | None = None
    tags: tuple[str, ...] | None = None
    session: str | None = None
    agent: str = ""
    change_type: str | None = None
    ttl_s: float | None = None


@dataclass
class KeysModel:
    """All chains of a namespace, and the time."""

    now_ms: int
    chains: dict[str, list[Version]] = field(default_factory=dict)

    def newest(self, key: str) -> Version | None:
        chain = self.chains.get(key)
        return chain[-1] if chain else None

    def live(self, key: str) -> Version | None:
        """The newest version if it has a body now."""
        newest = self.newest(key)
        return newest if newest is not None and self._is_live(newest, self.now_ms) else None

    def number(self, key: str) -> int:
        """How many versions there are."""
        return len(self.chains.get(key, ()))

    def put(self, key: str, body: Any, change: Change) -> Version:
        self._check(key, change)
        return self._add(
            key,
            Version(
                "put", body, change.tags or (), change.session, change.agent, change.change_type, self._expiry(change)
            ),
        )

    def update(self, key: str, make: Any, default: Any, change: Change) -> Version:
        """``make(body)`` in the place of the body; UNCHANGED is told by returning the very version."""
        self._check(key, change)
        old = self.live(key)
        if old is not None and not old.is_json:
            raise WrongBody
        body = make(copy.deepcopy(default if old is None else old.body))
        if body is KEEP:
            if old is None:
                raise Absent
            return old
        expires = self._expiry(change)
        if change.ttl_s is None and old is not None:
            expires = old.expires_at_ms
        tags = change.tags if change.tags is not None else old.tags if old is not None else ()
        session = change.session if change.session is not None else old.session if old is not None else None
        return self._add(key, Version("patch", body, tags, session, change.agent, change.change_type, expires))

    def delete(self, key: str, change: Change) -> Version:
        self._check(key, change)
        old = self.live(key)
        if old is None:
            raise Absent
        return self._add(key, Version("delete", None, old.tags, old.session, change.agent, change.change_type))

    def rollback(self, key: str, number: int, change: Change) -> Version:
        chain = self.chains.get(key, [])
        if not 1 <= number <= len(chain) or chain[number - 1].is_tombstone:
            raise Absent
        self._check(key, change)
        old, now = chain[number - 1], self.live(key)
        expires = self._expiry(change) if change.ttl_s is not None or now is None else now.expires_at_ms
        return self._add(
            key,
            Version("rollback", old.body, old.tags, old.session, change.agent, change.change_type, expires),
        )

    def commit(
        self, bodies: Mapping[str, Any], deletes: Sequence[str], expected: Mapping[str, int], change: Change
    ) -> dict[str, Version]:
        """All or none: the first key that cannot be written decides."""
        for key in (*bodies, *deletes):
            self._check(key, Change(expected=expected.get(key)))
            if key in deletes and self.live(key) is None:
                raise Absent
        written = {key: self.put(key, body, change) for key, body in bodies.items()}
        return written | {key: self.delete(key, change) for key in deletes}

    def expire_due(self) -> list[str]:
        """What the janitor does; returns the keys that it writes."""
        due = [
            key
            for key, chain in self.chains.items()
            if not chain[-1].is_tombstone
            and chain[-1].expires_at_ms is not None
            and chain[-1].expires_at_ms <= self.now_ms
        ]
        for key in due:
            old = self.chains[key][-1]
            self._add(key, Version("expire", None, (), old.session, old.agent, "expire"))
        return due

    def as_of(self, key: str, at_ms: int) -> int | None:
        """The number of the version that has a body at a time of the server's; all times of storing are known."""
        found: int | None = None
        for number, version in enumerate(self.chains.get(key, ()), start=1):
            assert version.stored_at_ms is not None
            if version.stored_at_ms <= at_ms:
                found = number
        return found if found is not None and self._is_live(self.chains[key][found - 1], at_ms) else None

    @staticmethod
    def _is_live(version: Version, at_ms: int) -> bool:
        return not version.is_tombstone and (version.expires_at_ms is None or version.expires_at_ms > at_ms)

    def _check(self, key: str, change: Change) -> None:
        live = self.number(key) if self.live(key) is not None else 0
        if change.expected not in (None, live, self.number(key) or None):
            raise Conflict(key, live)

    def _expiry(self, change: Change) -> int | None:
        return None if change.ttl_s is None or change.ttl_s == FOR_EVER_S else self.now_ms + round(change.ttl_s * 1000)

    def _add(self, key: str, version: Version) -> Version:
        self.chains.setdefault(key, []).append(version)
        return version


KEEP: Final = object()
"""What a change returns to write nothing."""

FOR_EVER_S: Final = float("inf")


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386, as its section 2 says it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
