"""What holds for the keys under a prefix, and what is said for one: time to live, encryption."""

from __future__ import annotations

import asyncio
import math
import secrets
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import Holdfast, connect, key_policies
from holdfast.client.encryption import SEALED
from holdfast.client.key_ring import KeyRing
from holdfast.schemas.errors import (
    ConfigurationError,
    EncryptionKeyError,
    InvalidFieldError,
    NotFoundError,
    VersionConflictError,
)
from holdfast.schemas.ids import now_ms
from holdfast.schemas.policies import POLICIES_KEY, KeyPolicy
from holdfast.streams.server_clock import ServerClock
from tests.key_support import RING, MovedClock, keys_in, keys_of, reader_of, url_of, versions_of
from tests.running import eventually

if TYPE_CHECKING:
    from holdfast.client.keys import Keys
    from holdfast.streams.connection import Connection

pytestmark = pytest.mark.asyncio

HOUR_MS = 3_600_000


def about(moment: datetime | None, seconds: float) -> bool:
    """Whether a time is so many seconds ahead, closely."""
    assert moment is not None
    return abs((moment - datetime.now(UTC)).total_seconds() - seconds) < 20


# Policies.


async def test_E25_E26_a_policy_holds_for_the_keys_that_begin_with_its_prefix(hf: Holdfast) -> None:
    await hf.keys.set_policy("store.", KeyPolicy(ttl_s=86_400, max_versions=5))
    policies = await hf.keys.set_policy("store.eu.", KeyPolicy(ttl_s=60))
    assert policies == await hf.keys.policies()
    assert policies.policy_for("store.eu.x") == KeyPolicy(ttl_s=60, max_versions=5)
    assert about((await hf.keys.put("store.a", 1)).expires_at, 86_400)
    assert about((await hf.keys.patch("store.eu.a", {})).expires_at, 60)
    assert (await hf.keys.put("stores", 1)).expires_at is None
    assert about((await hf.keys.put("store.a", 1, ttl=5_000)).expires_at, 5_000)
    assert (await hf.keys.put("store.a", 1, ttl=math.inf)).expires_at is None
    await hf.keys.set_policy("store.", None)
    await hf.keys.set_policy("store.eu.", None)
    assert (await hf.keys.put("store.eu.a", 1)).expires_at is None
    assert await versions_of(hf, POLICIES_KEY) != []


async def test_E25_a_second_client_sees_a_policy_at_once_and_one_at_work_soon(
    hf: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reader_of(hf) as at_work:
        assert (await at_work.keys.put("p.a", 1)).expires_at is None
        await hf.keys.set_policy("p.", KeyPolicy(ttl_s=600))
        async with reader_of(hf) as new:
            assert about((await new.keys.put("p.b", 1)).expires_at, 600)
        # It believes what it has read for ten seconds.
        monkeypatch.setattr(key_policies, "POLICIES_S", 0.0)
        assert about((await at_work.keys.put("p.a", 2)).expires_at, 600)


async def test_policies_of_two_writers_both_stay(hf: Holdfast) -> None:
    async with reader_of(hf) as other:
        await asyncio.gather(
            *((hf if n % 2 else other).keys.set_policy(f"p{n}.", KeyPolicy(ttl_s=n + 1)) for n in range(20))
        )
        async with reader_of(hf) as third:
            assert (await third.keys.policies()).prefixes == {f"p{n}.": KeyPolicy(ttl_s=n + 1) for n in range(20)}


@pytest.mark.parametrize(
    "policy",
    [
        KeyPolicy(ttl_s=-5),
        KeyPolicy(ttl_s=math.inf),
        KeyPolicy(ttl_s=math.nan),
        KeyPolicy(max_versions=-1),
        KeyPolicy(encrypt="yes"),  # type: ignore[arg-type]
    ],
    ids=str,
)
async def test_a_policy_that_cannot_be_is_refused_and_not_stored(hf: Holdfast, policy: KeyPolicy) -> None:
    """Stored, it would be read before every write, and refuse each of them."""
    await hf.keys.set_policy("a.", KeyPolicy(ttl_s=60))
    with pytest.raises(InvalidFieldError):
        await hf.keys.set_policy("b.", policy)
    async with reader_of(hf) as other:
        assert (await other.keys.policies()).prefixes == {"a.": KeyPolicy(ttl_s=60)}
        assert about((await other.keys.put("a.x", 1)).expires_at, 60)


async def test_a_policy_for_no_possible_key_is_refused(hf: Holdfast) -> None:
    for prefix in ("x" * 769, "." * 40):
        with pytest.raises(InvalidFieldError):
            await hf.keys.set_policy(prefix, KeyPolicy(ttl_s=60))
    await hf.keys.set_policy("", KeyPolicy(ttl_s=60))
    assert about((await hf.keys.put("anything", 1)).expires_at, 60)


async def test_policies_that_somebody_broke_are_told_and_can_be_put_right(hf: Holdfast) -> None:
    await hf.keys.put(POLICIES_KEY, {"rules": 5})
    async with reader_of(hf) as other:
        with pytest.raises(InvalidFieldError, match=POLICIES_KEY) as caught:
            await other.keys.put("k", 1)
        assert caught.value.field == "policies"
        await other.keys.put(POLICIES_KEY, {"v": 1, "prefixes": {}})
        assert (await other.keys.put("k", 1)).version == 1


async def test_many_writers_read_the_policies_once(hf: Holdfast, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    get = hf.keys.get

    async def counted(key: str, *arguments: Any, **options: Any) -> Any:
        nonlocal reads
        reads += key == POLICIES_KEY
        return await get(key, *arguments, **options)

    monkeypatch.setattr(hf.keys, "get", counted)
    await asyncio.gather(*(hf.keys.put(f"k{n}", n) for n in range(50)))
    assert reads == 1


async def test_a_read_that_is_under_way_does_not_undo_a_policy(hf: Holdfast, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just said to be encrypted would go out as it is for ten seconds."""
    get, has_read, go_on = hf.keys.get, asyncio.Event(), asyncio.Event()

    async def held(*arguments: Any, **options: Any) -> Any:
        try:
            return await get(*arguments, **options)
        finally:
            has_read.set()
            await go_on.wait()

    monkeypatch.setattr(hf.keys, "get", held)
    reading = asyncio.create_task(hf.keys.policies())
    await has_read.wait()
    setting = asyncio.create_task(hf.keys.set_policy("secret.", KeyPolicy(encrypt=True)))
    while await hf.keys.head(POLICIES_KEY) is None:  # noqa: ASYNC110  there is no event
        await asyncio.sleep(0.01)
    await asyncio.wait((setting,), timeout=0.5)  # it may end before the other one, or wait for it
    go_on.set()
    assert (await reading).prefixes == {}
    await setting
    assert (await hf.keys.policies()).policy_for("secret.x").encrypt


# Time to live, by the server's clock.


class Machine:
    """The wall clock of a machine that is set wrong."""

    def __init__(self, error_ms: int) -> None:
        self._error_ms = error_ms

    def now_ms(self) -> int:
        return now_ms() + self._error_ms


async def test_E31_E13_an_expired_key_is_absent_at_once_to_everybody(
    connection: Connection, namespace: str, hf: Holdfast
) -> None:
    """Clients whose own clocks are an hour fast and an hour slow agree with one that is right."""
    fast = keys_of(connection, namespace, ServerClock(connection, local_ms=Machine(HOUR_MS).now_ms))
    slow = keys_of(connection, namespace, ServerClock(connection, local_ms=Machine(-HOUR_MS).now_ms))
    everybody = (fast, slow, hf.keys)
    for writer in everybody:
        stays = await writer.put("stays", 1, ttl=600)
        assert about(stays.expires_at, 600)
        for reader in everybody:
            assert (await reader.get("stays")).expires_at == stays.expires_at
    goes = await fast.put("goes", 1, ttl=0.3)

    async def is_gone(keys: Keys) -> bool:
        try:
            await keys.get("goes")
        except NotFoundError:
            return True
        return False

    await eventually(lambda: is_gone(hf.keys))
    assert goes.expires_at is not None
    assert datetime.now(UTC) >= goes.expires_at - timedelta(seconds=1)
    for keys in everybody:
        await eventually(partial(is_gone, keys))
        assert list(await keys.get_many(["goes", "stays"])) == ["stays"]
        assert [version.key async for version in keys.list()] == ["stays"]


async def test_E31_what_has_expired_begins_anew(connection: Connection, namespace: str) -> None:
    clock = MovedClock(connection)
    keys = keys_of(connection, namespace, clock)
    await keys.put("k", {"old": 1}, ttl=60, tags=["t"], session="s")
    clock.passed_ms = 59_000
    assert (await keys.get("k")).body == {"old": 1}
    clock.passed_ms = 61_000
    with pytest.raises(NotFoundError, match="expired"):
        await keys.get("k")
    with pytest.raises(NotFoundError):
        await keys.delete("k")
    with pytest.raises(VersionConflictError) as caught:
        await keys.put("k", 1, expected_version=7)
    assert caught.value.actual == 0
    head = await keys.head("k")
    assert head is not None
    assert (head.version, head.deleted) == (1, False)
    patched = await keys.patch("k", {"new": 2})
    assert (patched.version, patched.body, patched.tags, patched.session) == (2, {"new": 2}, (), None)
    assert patched.expires_at is None
    assert (await keys.get("k", 1)).body == {"old": 1}


async def test_E31_E25_a_default_time_to_live_counts_from_each_write(connection: Connection, namespace: str) -> None:
    clock = MovedClock(connection)
    keys = keys_of(connection, namespace, clock)
    await keys.set_policy("s.", KeyPolicy(ttl_s=100))
    await keys.put("s.put", 1)
    await keys.patch("s.patch", {"a": 1})
    clock.passed_ms = 60_000
    await keys.put("s.put", 2)
    await keys.patch("s.patch", {"a": 2})  # keeps the expiry it has
    clock.passed_ms = 110_000
    assert (await keys.get("s.put")).body == 2
    assert list(await keys.get_many(["s.put", "s.patch"])) == ["s.put"]


# Encryption.


@pytest.fixture
def ring() -> KeyRing:
    return RING


async def test_E32_E12_an_encrypted_body_is_read_with_the_key_and_not_without(hf: Holdfast, ring: KeyRing) -> None:
    async with reader_of(hf, key_ring=ring) as owner:
        put = await owner.keys.put("k", {"secret": "canary"}, encrypt=True, tags=["t"])
        assert put.body == {"secret": "canary"}
        assert put.context.encrypted
        patched = await owner.keys.patch("k", {"more": 1})
        assert patched.context.encrypted
        grown = await asyncio.gather(*(owner.keys.patch("k", {str(n): n}) for n in range(5)))
        assert all(value.context.encrypted for value in grown)
        body = (await owner.keys.get("k")).body
        assert body == {"secret": "canary", "more": 1, **{str(n): n for n in range(5)}}
        assert [await owner.keys.diff("k", 1, 2)] == [[{"op": "add", "path": "/more", "value": 1}]]
    other_ring = KeyRing.of({"k2": secrets.token_bytes(32)}, "k2")
    async with reader_of(hf, key_ring=other_ring) as stranger:
        value = await stranger.keys.get("k")
        for look in (lambda: value.body, lambda: value.raw):
            with pytest.raises(EncryptionKeyError, match="k1") as caught:
                look()
            assert caught.value.key_id == "k1"
        assert b"canary" not in value.context.stored[0]
        assert value.context.stored[1] == SEALED
        with pytest.raises(EncryptionKeyError) as caught:
            await stranger.keys.patch("k", {"x": 1})
        assert caught.value.key_id == "k1"
        # Who has no key still sees what happened, and may put something in its place.
        assert [version.version async for version in stranger.keys.history("k")] == [7, 6, 5, 4, 3, 2, 1]
        assert [version.tags async for version in stranger.keys.list("k")] == [("t",)]
        assert (await stranger.keys.rollback("k", 1)).ref == put.ref
        assert (await stranger.keys.put("k", "plain")).body == "plain"
    assert (await hf.keys.get("k")).body == "plain"


async def test_E32_a_prefix_may_be_encrypted_by_policy(hf: Holdfast, ring: KeyRing) -> None:
    async with reader_of(hf, key_ring=ring) as owner:
        await owner.keys.set_policy("secret.", KeyPolicy(encrypt=True))
        assert (await owner.keys.put("secret.a", "x")).context.encrypted
        assert (await owner.keys.append("secret.list", 1)).context.encrypted
        assert not (await owner.keys.put("secret.open", "x", encrypt=False)).context.encrypted
        assert not (await owner.keys.put("open", "x")).context.encrypted
        await owner.keys.commit({"secret.c": 1, "open.c": 1})
        values = await owner.keys.get_many(["secret.c", "open.c"])
        assert {key: value.context.encrypted for key, value in values.items()} == {"secret.c": True, "open.c": False}
        assert [values[key].body for key in ("secret.c", "open.c")] == [1, 1]
        # It stays as it began, whatever the policy says later.
        await owner.keys.set_policy("secret.", KeyPolicy(encrypt=False))
        assert (await owner.keys.append("secret.list", 2)).context.encrypted


async def test_E32_without_a_key_what_is_to_be_encrypted_is_refused_and_nothing_written(hf: Holdfast) -> None:
    bare = KeyRing.from_environment({"HOLDFAST_KEYS_FILE": "/nonexistent/keys"})
    async with connect(url_of(hf), hf.namespace, key_ring=bare) as client:
        with pytest.raises(ConfigurationError, match="no key file"):
            await client.keys.put("k", "x", encrypt=True)
        assert await client.keys.head("k") is None
        # A change beside it that needs no key is not hurt.
        refused, put = await asyncio.gather(
            client.keys.put("j", "x", encrypt=True), client.keys.put("j", "plain"), return_exceptions=True
        )
        assert isinstance(refused, ConfigurationError)
        assert not isinstance(put, BaseException)
    assert await keys_in(hf) == ["j"]
