"""What handlers decide, without a server: names, patterns, verdicts."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client.handler_control import CatchUp, Redeliver, decode_instruction, instruct, receipt_mark
from holdfast.client.handler_policy import (
    INTERRUPTED,
    MOST_AHEAD,
    Again,
    HandlerOptions,
    as_typed,
    check_options,
    consumer_name,
    consumer_options,
    control_name,
    error_data,
    error_of_data,
    events_ahead,
    fits,
    is_surely_new,
    is_taken,
    judge,
    kills_its_handler,
    takes_context,
    turn,
)
from holdfast.schemas.errors import (
    DepthLimitError,
    HandlerError,
    InvalidFieldError,
    InvalidNameError,
    NotFoundError,
    UnavailableError,
)
from holdfast.schemas.ids import derived_event_id, new_event_id
from holdfast.streams.topology import StreamInfo
from holdfast.streams.wire import event_filter, event_subject, reply_subject
from holdfast.workers.handler_floors import Floor, Plan, plan_floors
from tests.support import examples


def options(pattern: str = "a:*", **changes: Any) -> HandlerOptions:
    values: dict[str, Any] = {"pattern": pattern, "name": "h", "agent": "me", **changes}
    return HandlerOptions(**values)


@pytest.mark.parametrize(
    ("pattern", "subject"),
    [
        ("agent:status", "ctx.n.event.*.agent.status"),
        ("agent:*", "ctx.n.event.*.agent.>"),
        ("*:status", "ctx.n.event.*.*.status"),
        ("a:*:*", "ctx.n.event.*.a.*.>"),
        ("*", "ctx.n.event.*.>"),
        ("über:x.y", "ctx.n.event.*.x--_c3_bcber.x--x_2ey"),
        ("a::b", "ctx.n.event.*.a.x--.b"),
    ],
)
def test_a_pattern_is_a_subject_filter(pattern: str, subject: str) -> None:
    assert event_filter("n", pattern) == subject


@pytest.mark.parametrize("pattern", ["", "ag*", "a:*b", ">", "a:>", "**", ":".join("a" * 17), "x" * 513, "\ud800", 5])
def test_a_bad_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(InvalidNameError):
        event_filter("n", pattern)


def matches(subject_filter: str, subject: str) -> bool:
    """What the server does, as its documentation has it."""
    expression = re.escape(subject_filter).replace(r"\*", r"[^.]+").replace(">", r".+")
    return re.fullmatch(expression, subject) is not None


_SEGMENT = st.sampled_from(["a", "b", "ü", "a.b", "", "x--"])


@examples(300)
@given(st.lists(_SEGMENT | st.just("*"), min_size=1, max_size=4), st.lists(_SEGMENT, min_size=1, max_size=5))
def test_fitting_says_what_the_server_does(pattern: list[str], name: list[str]) -> None:
    text, event = ":".join(pattern), ":".join(name)
    if text and event:
        assert fits(text, event) == matches(event_filter("n", text), event_subject("n", "agent", event))


def test_two_filters_of_one_handler_never_overlap() -> None:
    # The server refuses filters that overlap.
    for pattern in ("*", "a:*", "*:*", "*:*:*", "holdfast:*", "holdfast:handler:*", "*:handler:*", "x:y"):
        declared = consumer_options("n", options(pattern)).filter_subjects
        told = event_subject("n", "holdfast", control_name(consumer_name("n", "h")))
        assert sum(matches(one, told) for one in declared) == 1, pattern


@pytest.mark.parametrize(
    ("pattern", "name", "taken"),
    [
        ("a:*", "a:b", True),
        ("a:*", "b:a", False),
        ("a:*", "a:b:result", False),
        ("a:*", "a:b:error", False),
        ("a:*", "a:result", False),
        ("a:*:result", "a:b:result", True),
        ("a:*:result", "a:b:error", False),
        ("a:b:error", "a:b:error", True),
        ("*", "holdfast:receipt", False),
        ("*:receipt", "holdfast:receipt", False),
        ("holdfast:*", "holdfast:receipt", True),
        ("*", "result", False),
        ("result", "result", True),
    ],
)
def test_a_handler_is_not_handed_what_it_brought_about(pattern: str, name: str, taken: bool) -> None:
    assert is_taken(options(pattern), name, None) is taken


def test_B84_for_me_takes_what_is_meant_for_the_agent() -> None:
    mine = options(for_me=True)
    assert [is_taken(mine, "a:b", originator) for originator in ("me", "you", None)] == [True, False, False]
    assert is_taken(options(), "a:b", "you")


def test_a_failure_is_tried_again_with_growing_delays_until_the_last_attempt() -> None:
    verdicts = [judge(ValueError(), attempt, max_deliver=6, backoff_s=(0.5, 2, 10)) for attempt in range(1, 7)]
    assert verdicts == [Again(0.5), Again(2), Again(10), Again(10), Again(10), "final"]
    assert judge(ValueError(), 1, max_deliver=2, backoff_s=()) == Again(0.0)
    assert judge(ValueError(), 1, max_deliver=2, backoff_s=(4,), jitter=1.0) == Again(5.0)
    assert judge(UnavailableError("x"), 1, max_deliver=2, backoff_s=(1,)) == Again(1.0)


@pytest.mark.parametrize("error", [InvalidFieldError("x"), DepthLimitError("x"), NotFoundError("x"), HandlerError("x")])
def test_what_the_input_is_to_blame_for_is_final_at_once(error: Exception) -> None:
    assert judge(error, 1, max_deliver=5, backoff_s=(1,)) == "final"


def test_what_kills_its_handler_again_and_again_is_given_up() -> None:
    assert not kills_its_handler(5 + INTERRUPTED, 5)
    assert kills_its_handler(6 + INTERRUPTED, 5)


def test_events_are_taken_ahead_only_by_a_handler_that_begins_them_soon() -> None:
    assert events_ahead(16, None) == 0  # nobody knows yet
    assert events_ahead(16, 1.0) == 0
    assert events_ahead(1, 0.005) == 4
    assert events_ahead(16, 0.0) == events_ahead(10_000, 0.001) == MOST_AHEAD


def test_what_is_handed_out_again_does_not_always_come_behind_the_same() -> None:
    # What one process left when it stopped keeps its order.
    assert turn(1, 0.9) == turn(2, 0.1) < turn(3, 0.0) < turn(9, 0.1) < turn(3, 0.2)


def test_only_what_cannot_have_been_done_before_counts_as_new() -> None:
    at_ms = 1_700_000_000_000
    usual: dict[str, Any] = {"created_ms": at_ms - 1, "duplicate_window_s": 600.0}
    event_id = new_event_id(at_ms)
    assert is_surely_new(event_id, at_ms + 5, 1, **usual)
    assert is_surely_new(event_id, at_ms - 5, 1, **{**usual, "created_ms": at_ms - 5})
    assert not is_surely_new(event_id, at_ms + 5, 2, **usual)
    assert not is_surely_new(event_id, at_ms + 5, 1, **{**usual, "created_ms": at_ms + 6})
    # An id of long ago may have been stored before; so may one that tells no time.
    assert not is_surely_new(event_id, at_ms + 61_000, 1, **usual)
    assert not is_surely_new(event_id, at_ms - 61_000, 1, **{**usual, "created_ms": 0})
    assert not is_surely_new(event_id, at_ms + 1_000, 1, created_ms=0, duplicate_window_s=2.0)
    assert not is_surely_new(derived_event_id("n", "x"), at_ms, 1, **usual)


def test_a_failure_is_told_and_read_again() -> None:
    error = as_typed(ValueError("no"), "h")
    again = error_of_data(error_data(error, "h"), event="e1")
    assert (again.handler, again.cause, again.message) == ("h", "ValueError", error.message)
    assert "no" in again.message
    depth = DepthLimitError("too deep", depth=65, hint="stop")
    assert as_typed(depth, "h") is depth
    told = error_of_data(error_data(depth, "h"), event="e1")
    assert (told.cause, told.hint) == ("depth_limit", "stop")
    unreadable: list[Any] = [None, 5, [], {"code": 7}]
    for foreign in unreadable:
        assert "e1" in (error_of_data(foreign, event="e1").hint or "")


@examples(100)
@given(st.tuples(st.text(min_size=1), st.text(min_size=1)), st.tuples(st.text(min_size=1), st.text(min_size=1)))
def test_each_handler_has_a_consumer_of_its_own(one: tuple[str, str], other: tuple[str, str]) -> None:
    try:
        names = [consumer_name(*pair) for pair in (one, other)]
    except InvalidNameError:
        return  # a lone surrogate
    assert (names[0] == names[1]) == (one == other)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name)
    assert control_name(names[0]) != control_name(names[1]) or one == other


def test_a_long_handler_name_fits() -> None:
    assert len(consumer_name("n" * 64, "ü" * 256)) <= 80
    assert "tests-x-" not in consumer_name("n", "plain")
    assert "plain" in consumer_name("n", "plain")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 257}, "name"),
        ({"pattern": "a*"}, "pattern"),
        ({"agent": ""}, "agent_id"),
        ({"max_deliver": 0}, "max_deliver"),
        ({"concurrency": 0}, "concurrency"),
        ({"backoff_s": (-1.0,)}, "backoff_s"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"ack_wait_s": 0.0}, "ack_wait_s"),
        ({"start": "later"}, "start"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check_options(options(**changes))
    assert caught.value.field == field
    assert check_options(options()) == options()


def test_B03_a_handler_takes_the_event_or_the_event_and_its_context() -> None:
    def plain(event: Any) -> None: ...
    def both(event: Any, context: Any = None) -> None: ...
    def open_ended(*arguments: Any) -> None: ...
    def named(event: Any, *, context: Any = None) -> None: ...
    def none() -> None: ...
    def many(event: Any, context: Any, more: Any) -> None: ...

    class Called:
        def __call__(self, event: Any, context: Any) -> None: ...

    assert [takes_context(function) for function in (plain, both, open_ended, named)] == [False, True, True, False]
    assert takes_context(Called())
    assert not takes_context(functools.partial(both, context={}))
    for wrong in (none, many):
        with pytest.raises(InvalidFieldError):
            takes_context(wrong)


def test_instructions_are_events_for_one_handler() -> None:
    told = instruct("n", "hf-on-x", "me", CatchUp(5, 9, "c"), "source")
    assert told.name == "holdfast:handler:hf-on-x"
    assert told == instruct("n", "hf-on-x", "me", CatchUp(5, 9, "c"), "source")
    assert told.id != instruct("n", "hf-on-x", "me", CatchUp(5, 9, "c"), "another").id
    assert instruct("n", "h", "me", Redeliver("e")).id != instruct("n", "h", "me", Redeliver("e")).id
    assert decode_instruction(b'{"do":"catch_up","since":5,"until":9,"cursor":"c"}') == CatchUp(5, 9, "c")
    assert decode_instruction(b'{"do":"redeliver","event_id":"e"}') == Redeliver("e")
    for foreign in (None, b"", b"{}", b"[]", b'{"do":"other"}', b'{"do":"redeliver","event_id":5}', b"\xff"):
        assert decode_instruction(foreign) is None
    assert receipt_mark("n", "a", "e") != receipt_mark("n", "b", "e")


def test_a_reply_has_a_subject_for_any_client() -> None:
    assert reply_subject("n", "abc") == "ctx.n.reply.abc"
    assert reply_subject("n", "a.b *") == "ctx.n.reply.x--a_2eb_20_2a"


def log(first_seq: int, last_seq: int, message_bytes: int = 100) -> StreamInfo:
    count = last_seq - first_seq + 1
    return StreamInfo("CTX_EVENTS", "e", first_seq, last_seq, count, count * message_bytes, 1)


def floors(*seqs: int) -> list[Floor]:
    return [Floor(f"c{seq}", seq) for seq in seqs]


def test_the_log_is_kept_for_those_who_have_not_come_to_it() -> None:
    info = log(1, 1_000)
    assert plan_floors(501, [], info, most_bytes=0) == Plan(501)
    assert plan_floors(501, floors(1_000, 500), info, most_bytes=0) == Plan(501)
    # 300 messages of 100 bytes are kept for the one at 200.
    assert plan_floors(501, floors(1_000, 200), info, most_bytes=30_000) == Plan(201)


def test_beyond_so_many_bytes_a_handler_is_left_behind() -> None:
    info = log(1, 1_000)
    behind, further = floors(200, 450)
    assert plan_floors(501, [behind, further], info, most_bytes=29_999) == Plan(202, (behind,))
    assert plan_floors(501, [behind, further], info, most_bytes=1_000) == Plan(491, (behind, further))
    assert plan_floors(501, [behind, further], info, most_bytes=0) == Plan(501, (behind, further))
    # One that stands before the log itself was told of what went before.
    old = log(301, 1_000)
    assert plan_floors(501, [behind], old, most_bytes=20_000) == Plan(201)
    assert plan_floors(501, [behind], old, most_bytes=10_000) == Plan(401, (behind,))


def test_a_handler_object_without_a_name_is_refused() -> None:
    from holdfast.client.handlers import Handlers

    handlers = Handlers(SimpleNamespace(agent="me", connection=None, namespace="n"))  # type: ignore[arg-type]
    with pytest.raises(InvalidNameError):
        handlers.on("a")(functools.partial(print))
