"""The state machine that drives named contexts beside their model, and the system that its examples share.

Holds no tests itself: ``tests/property/test_keys_against_model.py`` runs some steps, ``python -m tests.campaigns.keys``
as many as are wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from holdfast.schemas.errors import HoldfastError
from tests.campaigns.key_bodies import BODIES, CHANGES, FOREIGN, KEYS, PATCHES
from tests.campaigns.key_model import FOR_EVER_S, Change
from tests.campaigns.key_trial import KeyTrial
from tests.campaigns.rig import Rig

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


class System:
    """One rig and one event loop for many examples: each has a namespace of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self.rig = Rig()
        self.steps = 0
        self.is_sound = True
        self.run(self.rig.start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def renew(self) -> None:
        """Begins anew after a failure: what it left behind must not make the next example fail as well."""
        with contextlib.suppress(HoldfastError):
            self.run(self.rig.stop())
        self.rig = Rig()
        self.is_sound = True
        self.run(self.rig.start())

    def close(self) -> None:
        try:
            self.run(self.rig.stop())
        finally:
            self._runner.close()


CLIENTS = st.integers(0, 1)
NAMES = st.sampled_from(KEYS)
NUMBERS = st.integers(0, 12)
TAGS = st.sampled_from([None, (), ("red",), ("red", "blue")])
SESSIONS = st.sampled_from([None, "s1", "s2"])
EXPECTED = st.sampled_from(["none"] * 6 + ["newest"] * 3 + ["zero", "older", "newer"])
TTLS = st.sampled_from([None] * 4 + [5.0, 500.0, FOR_EVER_S])
CHANGED = st.tuples(EXPECTED, TAGS, SESSIONS, TTLS, st.sampled_from([None, "edit"]))
RACES = st.lists(
    st.tuples(CLIENTS, st.sampled_from(["put", "claim", "patch", "patch", "append", "delete", "rollback"]), NUMBERS),
    min_size=2,
    max_size=8,
)
UPKEEP = st.sampled_from(["archive"] * 2 + ["trim"] * 3 + ["trim_to"] * 3 + ["trim_heads"] * 3 + ["forget"] * 6)
ACCIDENTS = st.sampled_from(["forget"] * 10 + ["foreign"] * 8 + ["crash_in_write"] * 2 + ["restart_workers", "crash"])


class KeysMachine(RuleBasedStateMachine):
    """Steps on a few keys; ``system`` is set by whoever runs it."""

    system: ClassVar[System | None] = None

    def __init__(self) -> None:
        super().__init__()
        assert self.system is not None, "there is no system to run against"
        self._system = self.system
        if not self._system.is_sound:
            self._system.renew()
        self.trial = KeyTrial(self._system.rig, f"k{uuid.uuid4().hex}")
        self._system.run(self.trial.open())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self._system.steps += 1
        try:
            self._system.run(work)
        except BaseException:
            self._system.is_sound = False
            raise

    def teardown(self) -> None:
        async def end() -> None:
            try:
                if self._system.is_sound:
                    await self.trial.check_all()
            finally:
                await self.trial.close()

        try:
            self._system.run(end())
        except BaseException:
            self._system.is_sound = False
            raise

    def change(self, key: str, client: int, said: tuple[str, Any, Any, Any, Any]) -> Change:
        expected, tags, session, ttl_s, change_type = said
        return Change(
            expected=self.trial.expectation(key, expected),
            tags=tags,
            session=session,
            agent=f"agent{client}",
            change_type=change_type,
            ttl_s=ttl_s,
        )

    @rule(client=CLIENTS, key=NAMES, number=st.integers(0, len(BODIES) - 1), said=CHANGED)
    def put(self, client: int, key: str, number: int, said: Any) -> None:
        self.run(self.trial.put(client, key, BODIES[number], self.change(key, client, said)))

    @rule(client=CLIENTS, key=NAMES, times=st.integers(1, 5), tags=TAGS)
    def put_grown(self, client: int, key: str, times: int, tags: Any) -> None:
        async def work() -> None:
            for _ in range(times):
                await self.trial.put_grown(client, key, Change(tags=tags, agent=f"agent{client}"))

        self.run(work())

    @rule(client=CLIENTS, key=NAMES, other=NAMES, back=st.sampled_from([0, 0, 0, 1, 2, 4]), said=CHANGED)
    def put_again(self, client: int, key: str, other: str, back: int, said: Any) -> None:
        self.run(self.trial.put_again(client, key, other, back, self.change(key, client, said)))

    @rule(client=CLIENTS, key=NAMES, number=st.integers(0, len(PATCHES) - 1), said=CHANGED)
    def patch(self, client: int, key: str, number: int, said: Any) -> None:
        self.run(self.trial.patch(client, key, PATCHES[number], self.change(key, client, said)))

    @rule(client=CLIENTS, key=NAMES, number=NUMBERS, said=CHANGED)
    def append(self, client: int, key: str, number: int, said: Any) -> None:
        item = {"turn": number, "text": "said in this turn " * number}
        self.run(self.trial.append(client, key, item, self.change(key, client, said)))

    @rule(client=CLIENTS, key=NAMES, number=st.integers(0, len(CHANGES) - 1), said=CHANGED)
    def update(self, client: int, key: str, number: int, said: Any) -> None:
        self.run(self.trial.update(client, key, number, self.change(key, client, said)))

    @rule(client=CLIENTS, key=NAMES, said=CHANGED)
    def delete(self, client: int, key: str, said: Any) -> None:
        self.run(self.trial.delete(client, key, self.change(key, client, said)))

    @rule(client=CLIENTS, key=NAMES, back=NUMBERS, said=CHANGED)
    def rollback(self, client: int, key: str, back: int, said: Any) -> None:
        number = self.trial.model.number(key) - back
        self.run(self.trial.rollback(client, key, number, self.change(key, client, said)))

    @rule(
        client=CLIENTS,
        bodies=st.dictionaries(NAMES, st.integers(0, len(BODIES) - 2), min_size=1),
        deletes=st.lists(NAMES, max_size=2, unique=True),
        expected=st.dictionaries(NAMES, EXPECTED, max_size=2),
        said=CHANGED,
    )
    def commit(self, client: int, bodies: Any, deletes: Any, expected: Any, said: Any) -> None:
        gone = [key for key in deletes if key not in bodies]
        versions = {key: self.trial.expectation(key, kind) for key, kind in expected.items()}
        self.run(
            self.trial.commit(
                client,
                {key: BODIES[number] for key, number in bodies.items()},
                gone,
                {key: n for key, n in versions.items() if n is not None and (key in bodies or key in gone)},
                self.change(KEYS[0], client, ("none", *said[1:])),
            )
        )

    @rule(key=NAMES, steps=RACES)
    def race(self, key: str, steps: Any) -> None:
        self.run(self.trial.race(key, steps))

    @rule(seconds=st.sampled_from([1.0, 6.0, 600.0, 86_400.0]), is_swept=st.booleans())
    def pass_time(self, seconds: float, is_swept: bool) -> None:
        async def work() -> None:
            self.trial.pass_time(seconds)
            if is_swept:
                await self.trial.expire()

        self.run(work())

    @rule(what=UPKEEP, most_versions=st.integers(1, 3))
    def keep_up(self, what: str, most_versions: int) -> None:
        async def work() -> None:
            rig = self.trial.rig
            if what != "forget":
                await rig.archive()
            match what:
                case "archive":
                    pass
                case "trim":
                    await rig.trim(ahead_s=2 * 86_400.0)
                case "trim_to":
                    await rig.trim(ahead_s=3_600.0, most_versions=most_versions)
                case "trim_heads":
                    await rig.trim_heads()
                    await self.trial.open()  # ten minutes have passed
                case _:
                    await self.trial.open()

        self.run(work())

    @rule(client=CLIENTS, growing=st.none() | NAMES)
    def evict(self, client: int, growing: str | None) -> None:
        """Bodies leave the hot tier, perhaps within a conversation: old parts go, what names them stays."""

        async def work() -> None:
            said = Change(agent=f"agent{client}")
            for _ in range(3 if growing else 0):
                await self.trial.put_grown(client, growing or "", said)
            if growing:
                await self.trial.rig.archive()
            await self.trial.rig.evict()
            if growing:
                await self.trial.put_grown(client + 1, growing, said)

        self.run(work())

    @rule(what=ACCIDENTS, key=NAMES, client=CLIENTS, numbers=st.lists(NUMBERS, min_size=1, max_size=6))
    def accident(self, what: str, key: str, client: int, numbers: list[int]) -> None:
        async def work() -> None:
            match what:
                case "foreign":
                    await self.trial.put_foreign(key, numbers[0] % len(FOREIGN))
                case "restart_workers":
                    await self.trial.rig.restart_workers()
                case "crash":
                    await self.trial.rig.restart_server()
                case "crash_in_write":
                    await self.trial.write_through_a_crash(client, key, numbers)
                case _:
                    await self.trial.open()

        self.run(work())

    @rule(client=CLIENTS, key=NAMES)
    def read(self, client: int, key: str) -> None:
        self.run(self.trial.read(client, key))

    @rule(client=CLIENTS, names=st.lists(NAMES, max_size=6))
    def read_many(self, client: int, names: list[str]) -> None:
        self.run(self.trial.read_many(client, names))

    @rule(client=CLIENTS, key=NAMES, back=st.integers(-2, 12))
    def read_version(self, client: int, key: str, back: int) -> None:
        self.run(self.trial.read_version(client, key, self.trial.model.number(key) - back))

    @rule(client=CLIENTS, key=NAMES, number=NUMBERS, offset_ms=st.sampled_from([0, -1, 1, 5, 7_000, -60_000]))
    def read_as_of(self, client: int, key: str, number: int, offset_ms: int) -> None:
        self.run(self.trial.as_of(client, key, number, offset_ms))

    @rule(client=CLIENTS, key=NAMES, before=st.none() | NUMBERS, limit=st.none() | NUMBERS)
    def history(self, client: int, key: str, before: int | None, limit: int | None) -> None:
        self.run(self.trial.history(client, key, before, limit))

    @rule(
        client=CLIENTS,
        prefix=st.sampled_from(["", "p", "plan", "plan.", "plan.a", "x--", "x--.$", "q", "plan.a.b c*"]),
        tags=TAGS,
        session=SESSIONS,
        agent=st.sampled_from([None, None, "agent0"]),
    )
    def list_keys(self, client: int, prefix: str, tags: Any, session: str | None, agent: str | None) -> None:
        self.run(self.trial.list_keys(client, prefix, tags or (), session, agent))

    @rule(client=CLIENTS, key=NAMES, one=NUMBERS, other=NUMBERS)
    def diff(self, client: int, key: str, one: int, other: int) -> None:
        last = self.trial.model.number(key)
        self.run(self.trial.diff(client, key, last - one, last - other))

    @rule(client=CLIENTS, key=NAMES, back=NUMBERS)
    def watch_from(self, client: int, key: str, back: int) -> None:
        self.run(self.trial.watch_from(client, key, self.trial.model.number(key) - back))

    @rule()
    def check_all(self) -> None:
        self.run(self.trial.check_all())
