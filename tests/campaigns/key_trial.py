"""One namespace of a running system beside its model: every step does the same to both and compares.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import jsonpatch

from holdfast.client import Holdfast
from holdfast.client.keys import UNCHANGED, Keys
from holdfast.schemas.errors import (
    HoldfastError,
    InvalidBodyError,
    NotFoundError,
    VersionConflictError,
)
from holdfast.schemas.ids import now_ms, utc_from_ms
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.server_clock import ServerClock
from holdfast.streams.wire import key_subject
from tests.campaigns.key_bodies import BODIES, CHANGES, FOREIGN, KEYS, grown
from tests.campaigns.key_model import (
    KEEP,
    Absent,
    Change,
    Conflict,
    KeysModel,
    Version,
    WrongBody,
    merged,
)

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyValue, KeyVersion
    from tests.campaigns.rig import Rig


class TrialClock(ServerClock):
    """A server's clock that stands still unless it is moved."""

    at_ms = 0

    async def now_ms(self) -> int:
        return self.at_ms


class KeyTrial:
    """Two clients on one namespace, and its model."""

    def __init__(self, rig: Rig, namespace: str) -> None:
        self.rig = rig
        self.namespace = namespace
        self.model = KeysModel(now_ms())
        self.holdfasts: list[Holdfast] = []
        self._claims = 0

    async def open(self) -> None:
        """Opens clients that remember nothing."""
        await self.close()
        for number, client in enumerate(self.rig.clients):
            hf = Holdfast(client.connection, self.namespace, f"agent{number}")
            clock = TrialClock(client.connection)
            clock.at_ms = self.model.now_ms
            hf.keys._clock = hf.keys._writer._clock = clock
            self.holdfasts.append(hf)

    async def close(self) -> None:
        """Closes the clients."""
        for hf in self.holdfasts:
            await hf.close()
        self.holdfasts.clear()

    def pass_time(self, seconds: float) -> None:
        """Moves everybody's clock."""
        self.model.now_ms += round(seconds * 1000)
        for hf in self.holdfasts:
            clock = hf.keys._clock
            assert isinstance(clock, TrialClock)
            clock.at_ms = self.model.now_ms

    def keys(self, number: int) -> Keys:
        return self.holdfasts[number % len(self.holdfasts)].keys

    def expectation(self, key: str, kind: str) -> int | None:
        """An expected version: right or wrong in one of the ways there are."""
        number = self.model.number(key)
        return {"none": None, "newest": number, "zero": 0, "older": max(0, number - 1), "newer": number + 1}[kind]

    # Writes.

    async def put(self, client: int, key: str, body: Any, change: Change, kind: str = "context") -> None:
        await self._write(
            client,
            key,
            lambda: self.model.put(key, body, change),
            lambda keys: keys.put(key, body, kind=kind, **_said(change, is_new=True)),
            change,
        )

    async def put_grown(self, client: int, key: str, change: Change) -> None:
        """What a program does that keeps a conversation and stores it after every turn."""
        live = self.model.live(key)
        await self.put(client, key, grown(None if live is None else live.body), change)

    async def put_again(self, client: int, key: str, other: str, back: int, change: Change) -> None:
        """Puts the body of an older version, or of another key: equal bodies are one, however each came about."""
        chain = self.model.chains.get(other, [])
        if 0 <= back < len(chain) and not chain[-1 - back].is_tombstone:
            await self.put(client, key, chain[-1 - back].body, change)

    async def patch(self, client: int, key: str, merge: dict[str, Any], change: Change) -> None:
        await self._write(
            client,
            key,
            lambda: self.model.update(key, lambda body: merged(body, merge), {}, change),
            lambda keys: keys.patch(key, merge, **_said(change)),
            change,
        )

    async def append(self, client: int, key: str, item: Any, change: Change) -> None:
        await self._write(
            client,
            key,
            lambda: self.model.update(key, lambda body: _appended(body, item), [], change),
            lambda keys: keys.append(key, item, **_said(change)),
            change,
        )

    async def update(self, client: int, key: str, number: int, change: Change) -> None:
        make = CHANGES[number]

        def for_client(body: Any) -> Any:
            made = make(body)
            return UNCHANGED if made is KEEP else made

        await self._write(
            client,
            key,
            lambda: self.model.update(key, make, {"begun": True}, change),
            lambda keys: keys.update(key, for_client, default={"begun": True}, **_said(change)),
            change,
        )

    async def delete(self, client: int, key: str, change: Change) -> None:
        await self._write(
            client,
            key,
            lambda: self.model.delete(key, change),
            lambda keys: keys.delete(
                key, expected_version=change.expected, change_type=change.change_type, agent=change.agent
            ),
            change,
        )

    async def rollback(self, client: int, key: str, number: int, change: Change) -> None:
        await self._write(
            client,
            key,
            lambda: self.model.rollback(key, number, change),
            lambda keys: keys.rollback(
                key,
                number,
                expected_version=change.expected,
                change_type=change.change_type,
                agent=change.agent,
                ttl=change.ttl_s,
            ),
            change,
        )

    async def commit(
        self,
        client: int,
        bodies: Mapping[str, Any],
        deletes: Sequence[str],
        expected: Mapping[str, int],
        change: Change,
    ) -> None:
        try:
            wanted = self.model.commit(bodies, deletes, expected, change)
        except (Absent, Conflict) as outcome:
            await self._refused(outcome, self.keys(client).commit(bodies, expected, deletes=deletes), change, expected)
            return
        said = _said(change, is_new=True)
        del said["expected_version"]
        written = await self.keys(client).commit(bodies, expected, deletes=deletes, **said)
        assert set(written) == set(wanted)
        for key, version in wanted.items():
            _compare(written[key], self.model.number(key), version)
            await self.read(client + 1, key)

    async def race(self, key: str, steps: Sequence[tuple[int, str, int]]) -> None:
        """Several changes of one key at once: whatever their order is, they are versions one after the other."""
        start = self.model.number(key)
        outcomes = await asyncio.gather(
            *(self._race_step(key, client, what, number, start) for client, what, number in steps)
        )
        for version, apply in sorted((done for done in outcomes if done is not None), key=lambda done: done[0].version):
            wanted = apply()
            _compare(version, self.model.number(key), wanted)
        await self.history(0, key)

    async def write_through_a_crash(self, client: int, key: str, numbers: Sequence[int]) -> None:
        """The server dies while versions are written: each is written once all the same."""
        live = self.model.live(key)
        if live is not None and not live.is_json:
            return
        steps = [(client + number, "patch", number) for number in numbers]
        race = asyncio.ensure_future(self.race(key, steps))
        # The moment of the crash is what is tried out.
        await asyncio.sleep(0.0005 * numbers[0])
        await self.rig.restart_server()
        await race

    async def put_foreign(self, key: str, number: int) -> None:
        """Something that is no version is put on the key's subject."""
        newest = self.model.newest(key)
        if newest is not None and newest.expires_at_ms is not None:
            return  # the janitor takes it for a newer version
        message = Outgoing(key_subject(self.namespace, key), {}, FOREIGN[number])
        await publish(self.rig.clients[0].connection, message)

    async def expire(self) -> None:
        """The janitor writes what is due."""
        self.rig.clock_ms = self.model.now_ms
        await self.rig.janitor.round()
        for key in self.model.expire_due():
            await self.history(0, key)

    # Reads.

    async def read(self, client: int, key: str) -> None:
        """The newest version, by ``head`` and by ``get``."""
        keys, newest, number = self.keys(client), self.model.newest(key), self.model.number(key)
        head = await keys.head(key)
        if newest is None:
            assert head is None
        else:
            assert head is not None
            _compare(head, number, newest)
        if self.model.live(key) is None:
            await _absent(keys.get(key))
        else:
            assert newest is not None
            _compare_value(await keys.get(key), number, newest)

    async def read_many(self, client: int, wanted: Sequence[str]) -> None:
        values = await self.keys(client).get_many(wanted)
        assert list(values) == [key for key in dict.fromkeys(wanted) if self.model.live(key) is not None]
        for key, value in values.items():
            newest = self.model.newest(key)
            assert newest is not None
            _compare_value(value, self.model.number(key), newest)

    async def read_version(self, client: int, key: str, number: int) -> None:
        chain = self.model.chains.get(key, [])
        if 1 <= number <= len(chain) and not chain[number - 1].is_tombstone:
            _compare_value(await self.keys(client).get(key, number), number, chain[number - 1])
        else:
            await _absent(self.keys(client).get(key, number))

    async def history(self, client: int, key: str, before: int | None = None, limit: int | None = None) -> None:
        """Complete, newest first."""
        chain = self.model.chains.get(key, [])
        last = len(chain) if before is None else min(before - 1, len(chain))
        numbers = list(range(last, 0, -1))[:limit]
        found = [version async for version in self.keys(client).history(key, before=before, limit=limit)]
        assert [version.version for version in found] == numbers
        for version in found:
            _compare(version, version.version, chain[version.version - 1])

    async def as_of(self, client: int, key: str, number: int, offset_ms: int) -> None:
        """What there was around the time when a version was stored."""
        await self.history(client, key)
        chain = self.model.chains.get(key)
        if chain:
            stored_at_ms = chain[number % len(chain)].stored_at_ms
            assert stored_at_ms is not None
            at_ms = stored_at_ms + offset_ms
        else:
            at_ms = now_ms() + offset_ms
        wanted = self.model.as_of(key, at_ms)
        # A moment within the millisecond: what the millisecond has stored counts whole.
        moment = utc_from_ms(at_ms) + timedelta(microseconds=400)
        if wanted is None:
            await _absent(self.keys(client).get(key, as_of=moment))
        else:
            assert chain is not None
            _compare_value(await self.keys(client).get(key, as_of=moment), wanted, chain[wanted - 1])

    async def list_keys(
        self, client: int, prefix: str, tags: tuple[str, ...], session: str | None, agent: str | None
    ) -> None:
        wanted = []
        for key in sorted(self.model.chains):
            live = self.model.live(key)
            if live is None or not key.startswith(prefix) or not set(tags) <= set(live.tags):
                continue
            if session in (None, live.session) and agent in (None, live.agent):
                wanted.append(key)
        found = [found async for found in self.keys(client).list(prefix, tags=tags, session=session, agent=agent)]
        assert [version.key for version in found] == wanted
        for version in found:
            newest = self.model.newest(version.key)
            assert newest is not None
            _compare(version, self.model.number(version.key), newest)

    async def diff(self, client: int, key: str, one: int, other: int) -> None:
        """The operations make the one version of the other."""
        chain = self.model.chains.get(key, [])
        for number in (one, other):
            if not 1 <= number <= len(chain) or chain[number - 1].is_tombstone:
                await _absent(self.keys(client).diff(key, one, other))
                return
        bodies = [chain[number - 1] for number in (one, other)]
        if not all(version.is_json for version in bodies):
            await _raises(InvalidBodyError, self.keys(client).diff(key, one, other))
            return
        operations = await self.keys(client).diff(key, one, other)
        made = jsonpatch.apply_patch(bodies[0].body, operations)
        assert json.dumps(made, sort_keys=True) == json.dumps(bodies[1].body, sort_keys=True)

    async def watch_from(self, client: int, key: str, number: int) -> None:
        """Everything from a version on comes in order."""
        last = self.model.number(key)
        first = max(1, number)
        async with self.keys(client).watch(key, from_version=number) as changes:
            came = [await _next(changes) for _ in range(last - first + 1)]
        assert [version.version for version in came] == list(range(first, last + 1))
        for version in came:
            _compare(version, version.version, self.model.chains[key][version.version - 1])

    async def check_all(self) -> None:
        """The whole of it, by a client that remembers nothing."""
        await self.open()
        for key in KEYS:
            await self.history(0, key)
            for number in range(1, self.model.number(key) + 1):
                await self.read_version(1, key, number)
            await self.read(0, key)

    async def _write(
        self,
        client: int,
        key: str,
        apply: Callable[[], Version],
        write: Callable[[Keys], Awaitable[KeyVersion]],
        change: Change,
    ) -> None:
        try:
            wanted = apply()
        except (Absent, Conflict, WrongBody) as outcome:
            expected = {} if change.expected is None else {key: change.expected}
            await self._refused(outcome, write(self.keys(client)), change, expected)
            return
        written = await write(self.keys(client))
        _compare(written, self.model.number(key), wanted)
        # Another client sees it at once.
        await self.read(client + 1, key)

    async def _refused(
        self, outcome: Exception, write: Awaitable[object], change: Change, expected: Mapping[str, int]
    ) -> None:
        if isinstance(outcome, Conflict):
            error = await _raises(VersionConflictError, write)
            assert isinstance(error, VersionConflictError)
            assert (error.key, error.expected, error.actual) == (outcome.key, expected[outcome.key], outcome.actual)
        elif isinstance(outcome, WrongBody):
            await _raises(InvalidBodyError, write)
        else:
            await _absent(write)

    async def _race_step(
        self, key: str, client: int, what: str, number: int, start: int
    ) -> tuple[KeyVersion, Callable[[], Version]] | None:
        keys, model = self.keys(client), self.model
        change = Change(agent=f"agent{client % 2}", change_type=f"{what} {number}")
        said: dict[str, Any] = {"change_type": change.change_type, "agent": change.agent}
        self._claims += 1
        mark = {f"f{self._claims}": number}
        try:
            match what:
                case "put":
                    body = BODIES[number % len(BODIES)]
                    return await keys.put(key, body, **said), lambda: model.put(key, body, change)
                case "claim":
                    change.expected = start
                    return (
                        await keys.put(key, mark, expected_version=start, **said),
                        lambda: model.put(key, mark, change),
                    )
                case "patch":
                    return (
                        await keys.patch(key, mark, **said),
                        lambda: model.update(key, lambda body: merged(body, mark), {}, change),
                    )
                case "append":
                    return (
                        await keys.append(key, mark, **said),
                        lambda: model.update(key, lambda body: _appended(body, mark), [], change),
                    )
                case "delete":
                    return await keys.delete(key, **said), lambda: model.delete(key, change)
                case _:
                    old = number % (start + 1)
                    return await keys.rollback(key, old, **said), lambda: model.rollback(key, old, change)
        except (VersionConflictError, NotFoundError, InvalidBodyError):
            return None  # which of them may be refused depends on their order


def _appended(body: Any, item: Any) -> Any:
    if not isinstance(body, list):
        raise WrongBody
    return [*body, item]


def _said(change: Change, *, is_new: bool = False) -> dict[str, Any]:
    said: dict[str, Any] = {
        "expected_version": change.expected,
        "session": change.session,
        "ttl": change.ttl_s,
        "change_type": change.change_type,
        "agent": change.agent,
    }
    return said | {"tags": change.tags or () if is_new else change.tags}


def _compare(found: KeyVersion, number: int, wanted: Version) -> None:
    """Compares all that is said of a version; learns what the model cannot know, and holds it to it from then on."""
    assert found.version == number
    assert (found.op, found.tags, found.session, found.agent, found.change_type) == (
        wanted.op,
        wanted.tags,
        wanted.session,
        wanted.agent,
        wanted.change_type,
    )
    assert found.row.expires_at_ms == wanted.expires_at_ms
    assert (found.ref is None) == found.deleted == wanted.is_tombstone
    wanted.event_id = wanted.event_id or found.event_id
    assert found.event_id == wanted.event_id
    if found.row.stored_at_ms:
        wanted.stored_at_ms = wanted.stored_at_ms or found.row.stored_at_ms
        assert found.row.stored_at_ms == wanted.stored_at_ms


def _compare_value(found: KeyValue, number: int, wanted: Version) -> None:
    _compare(found, number, wanted)
    assert found.raw == wanted.raw
    assert found.body == wanted.body


async def _raises(kind: type[HoldfastError], work: Awaitable[object]) -> HoldfastError:
    try:
        outcome = await work
    except kind as error:
        return error
    raise AssertionError(f"{outcome!r} came where {kind.__name__} should be raised")


async def _absent(work: Awaitable[object]) -> None:
    await _raises(NotFoundError, work)


async def _next(changes: AsyncIterator[KeyVersion]) -> KeyVersion:
    async with asyncio.timeout(30):
        return await anext(changes)
