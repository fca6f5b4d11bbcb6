"""Sessions as values: names, merging, time stamps, settings.  And listeners' threads, which need no store."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client import session_listeners
from holdfast.client.session_listeners import Listener
from holdfast.client.session_model import (
    SESSION_PREFIX,
    SessionEvent,
    check_session_id,
    content_of,
    field_of,
    fields_of,
    merge,
    session_key,
    session_of,
    stamped,
)
from holdfast.client.session_settings import SessionSettings
from holdfast.client.session_store import is_after
from holdfast.schemas.errors import ConfigurationError, InvalidBodyError, InvalidFieldError, InvalidNameError
from holdfast.schemas.names import check_key
from tests.support import LIMIT_S, examples

SESSION_IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    max_leaves=8,
)
JSON_OBJECTS = st.dictionaries(st.sampled_from("abcd"), JSON_VALUES, max_size=4)


@given(SESSION_IDS)
def test_every_session_id_has_a_key_of_one_segment_that_leads_back_to_it(session_id: str) -> None:
    key = session_key(session_id)
    assert check_key(key) == key
    assert key.count(".") == 1
    assert session_of(key, session_id) == session_id
    if not key.startswith(f"{SESSION_PREFIX}~"):
        assert session_of(key, None) == session_id
        assert session_of(key, "the session it was written in") == session_id


@given(SESSION_IDS, SESSION_IDS)
def test_different_ids_have_different_keys(one: str, other: str) -> None:
    assert (session_key(one) == session_key(other)) == (one == other)


@pytest.mark.parametrize(
    ("session_id", "key"),
    [
        ("booking-42", "session.booking-42"),
        ("a.b", "session.x--a_2eb"),
        ("x--a_2eb", "session.x--x_2d_2da_5f2eb"),
        ("~", "session.x--_7e"),
        ("é" * 256, "session.~ygsds4k2657zhlckrbdsctbm7xkcut7m"),
    ],
)
def test_keys_of_sessions_stay_what_they_are(session_id: str, key: str) -> None:
    assert session_key(session_id) == key


@pytest.mark.parametrize("bad", ["", "x" * 257, "\ud800", None, 5, b"bytes", ["list"]])
def test_D15_a_session_id_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidNameError) as caught:
        check_session_id(bad)
    assert (caught.value.field, caught.value.limit) == ("session_id", 256)


@pytest.mark.parametrize("key", ["session.a.b", "session.", "session.x--zz", "session.~short", "other"])
def test_keys_of_others_are_nobodys_session(key: str) -> None:
    assert session_of(key, None) is None
    assert session_of(key, "s1") is None
    assert session_of(key, "\ud800") is None


@given(JSON_OBJECTS, JSON_OBJECTS)
@examples(100)
def test_D05_merging_sets_every_leaf_and_keeps_every_other(current: dict[str, Any], partial: dict[str, Any]) -> None:
    before, wanted = msgspec.json.encode(current), msgspec.json.encode(partial)
    result = merge(current, partial)
    assert (msgspec.json.encode(current), msgspec.json.encode(partial)) == (before, wanted)
    assert merge(result, partial) == result
    assert result.keys() == current.keys() | partial.keys()
    for key, value in result.items():
        if key not in partial:
            assert value == current[key]
        elif isinstance(partial[key], dict) and isinstance(current.get(key), dict):
            assert value == merge(current[key], partial[key])
        else:
            assert value == partial[key]


def test_D05_none_is_a_value_and_lists_are_replaced() -> None:
    current = {"a": {"b": 1, "c": [1, 2]}, "d": "kept"}
    assert merge(current, {"a": {"b": None, "c": [3]}}) == {"a": {"b": None, "c": [3]}, "d": "kept"}
    assert merge(current, {"a": 5}) == {"a": 5, "d": "kept"}
    assert merge(current, {"d": {"e": 1}}) == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}


@given(st.none() | st.floats() | st.integers() | st.text() | st.booleans(), st.floats(0, 1e10))
def test_the_time_stamp_only_goes_up(before: Any, now_s: float) -> None:
    stamp = stamped({}, before, now_s)["_timestamp"]
    assert stamp >= now_s
    if isinstance(before, float) and math.isfinite(before) and before < 1e300:
        assert stamp > before


def test_what_json_cannot_hold_is_refused_naming_the_field() -> None:
    for bad in (object(), float("nan"), {"a": {1j}}, {5: "a key that is no text"}, "\ud800"):
        with pytest.raises(InvalidBodyError) as caught:
            field_of("k", bad)
        assert caught.value.field == "value"
    wrong: Any
    for wrong in (None, [("a", 1)], "text"):
        with pytest.raises(InvalidFieldError) as refused:
            fields_of(wrong)
        assert refused.value.field == "partial_context"
    with pytest.raises(InvalidFieldError, match="not text"):
        field_of(5, "value")
    with pytest.raises(InvalidFieldError, match="kept by the session manager"):
        field_of("_timestamp", 1.0)
    with pytest.raises(InvalidBodyError, match="holds list"):
        content_of([], "s")


def test_fields_are_copies_without_the_time_stamp() -> None:
    details = {"class": "economy", "seats": (1, 2)}
    fields = fields_of({"_timestamp": 5.0, "details": details})
    details["class"] = "first"
    assert fields == {"details": {"class": "economy", "seats": [1, 2]}}


@pytest.mark.parametrize(
    ("position", "last", "news"),
    [
        ("e1:5", None, True),
        (None, "e1:5", True),
        ("e1:5", "e1:5", False),
        ("e1:10", "e1:9", True),
        ("e2:1", "e1:9", True),
    ],
)
def test_what_was_delivered_before_is_no_news(position: str | None, last: str | None, news: bool) -> None:
    assert is_after(position, last) is news


class Dynaconf:
    """As a settings object of dynaconf: capitals, attributes and ``get``, and what it does not know raises."""

    def __init__(self, **values: object) -> None:
        self._values = values

    def __getattr__(self, name: str) -> object:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name: str, default: object = None) -> object:
        return self._values.get(name, default)


class OnlyGet:
    """A settings object that is asked by ``get`` alone."""

    def get(self, name: str, default: object = None) -> object:
        return {"USE_REDIS_CACHING": False, "SESSION_EXPIRATION_SECONDS": 60}.get(name, default)


@pytest.mark.parametrize(
    "source",
    [
        {"USE_REDIS_CACHING": False, "SESSION_EXPIRATION_SECONDS": 60},
        {"use_redis_caching": "no", "session_expiration_seconds": "60"},
        Dynaconf(USE_REDIS_CACHING=False, SESSION_EXPIRATION_SECONDS=60, DATABASES={"default": 1}),
        SimpleNamespace(USE_REDIS_CACHING="off", SESSION_EXPIRATION_SECONDS=60.0),
        OnlyGet(),
    ],
)
def test_D12_settings_come_from_mappings_and_settings_objects(source: object) -> None:
    loaded = SessionSettings.load(source, environ={})
    assert loaded == SessionSettings(use_redis_caching=False, session_expiration_seconds=60.0)
    assert SessionSettings.load(loaded, environ={"USE_REDIS_CACHING": "true"}) is loaded


def test_D12_settings_come_from_the_environment_after_what_is_given() -> None:
    environ = {"TIME_BASED_EXPIRATION": "TRUE", "EVENT_EMISSION": "0", "ASYNC_OPERATIONS": "", "HOME": "/"}
    assert SessionSettings.load(None, environ) == SessionSettings(time_based_expiration=True, event_emission=False)
    assert SessionSettings.load({"EVENT_EMISSION": True}, environ).event_emission
    assert SessionSettings.load(None, {}) == SessionSettings()


def test_D06_D07_D08_D09_D10_D11_defaults() -> None:
    defaults = SessionSettings()
    assert (defaults.use_redis_caching, defaults.time_based_expiration) == (True, False)
    assert defaults.session_expiration_seconds == 3600.0
    assert (defaults.garbage_collection, defaults.async_operations, defaults.event_emission) == (True, True, True)


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ({"USE_REDIS_CACHING": "perhaps"}, "USE_REDIS_CACHING"),
        ({"EVENT_EMISSION": 2}, "EVENT_EMISSION"),
        ({"SESSION_EXPIRATION_SECONDS": "an hour"}, "SESSION_EXPIRATION_SECONDS"),
        ({"SESSION_EXPIRATION_SECONDS": True}, "SESSION_EXPIRATION_SECONDS"),
        ({"SESSION_EXPIRATION_SECONDS": 0}, "session_expiration_seconds"),
        ({"SESSION_EXPIRATION_SECONDS": "nan"}, "session_expiration_seconds"),
        ({"GARBAGE_COLLECTION_INTERVAL_SECONDS": "inf"}, "garbage_collection_interval_seconds"),
    ],
)
def test_D12_a_setting_that_cannot_be_used_is_named(source: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SessionSettings.load(source, environ={})
    assert caught.value.field == field


def an_event(n: int) -> SessionEvent:
    return SessionEvent(type="updated", session_id=f"s{n}", data={"n": n}, timestamp=datetime.now(UTC))


def test_D22_a_listener_that_lags_drops_what_is_too_much_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_listeners, "PENDING_EVENTS", 4)
    begun, released, got = threading.Event(), threading.Event(), list[str]()

    def slow(event: SessionEvent) -> None:
        begun.set()
        released.wait(LIMIT_S)
        got.append(event.session_id)

    listener = Listener(slow)
    listener.offer(lambda: an_event(0))
    assert begun.wait(LIMIT_S)
    for n in range(1, 12):
        listener.offer(partial(an_event, n))
    released.set()
    done = threading.Event()
    while listener.dropped < 7 or len(got) < 5:
        done.wait(0.01)
    listener.close()
    listener.join(LIMIT_S)
    assert got == ["s0", "s1", "s2", "s3", "s4"]
    assert listener.dropped == 7
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "listener is too slow, events were dropped"
    ] * 3


async def test_D22_a_closed_listener_is_not_called_again() -> None:
    begun, released, got = threading.Event(), threading.Event(), list[str]()

    def slow(event: SessionEvent) -> None:
        begun.set()
        released.wait(LIMIT_S)
        got.append(event.session_id)

    listener = Listener(slow)
    first = asyncio.create_task(listener.deliver(an_event(1)))
    assert await asyncio.to_thread(begun.wait, LIMIT_S)
    second = asyncio.create_task(listener.deliver(an_event(2)))
    await asyncio.sleep(0)
    listener.close()
    released.set()
    await first
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.to_thread(listener.join, LIMIT_S)
    assert got == ["s1"]


def test_D22_an_async_listener_outlives_the_loop_it_was_made_on() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    called = threading.Semaphore(0)

    async def callback(_: SessionEvent) -> None:
        loops.append(asyncio.get_running_loop())
        called.release()

    async def make() -> tuple[Listener, asyncio.AbstractEventLoop]:
        listener = Listener(callback)
        await listener.deliver(an_event(1))
        return listener, asyncio.get_running_loop()

    listener, own = asyncio.run(make())
    for n in (2, 3):
        listener.offer(partial(an_event, n))
    for _ in range(3):
        assert called.acquire(timeout=LIMIT_S)
    listener.close()
    listener.join(LIMIT_S)
    assert loops[0] is own
    assert loops[1] is loops[2] is not own
