"""What the archiver decides, without a server: values in, values out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from holdfast.streams.messages import StoredMessage
from holdfast.workers.archive_plan import (
    ANCHOR_EVERY,
    Decided,
    anchors_of,
    continue_anchors,
    decode_run,
    deduplicate_by_key,
    deduplicate_contexts,
    key_of,
    plan_purge,
    same_content,
)
from tests.test_lake_samples import context, event, events

if TYPE_CHECKING:
    from holdfast.schemas.rows import EventRow


def again(row: EventRow, **changes: object) -> EventRow:
    """The same event stored a second later, at another place."""
    return msgspec.structs.replace(row, seq=row.seq + 100, stored_at_ms=row.stored_at_ms + 1_000, **changes)


def test_an_event_stored_again_says_the_same() -> None:
    assert same_content(event(1), again(event(1)))
    assert not same_content(event(1), again(event(1), data=b"2"))
    assert not same_content(event(1), again(event(1), timestamp_ms=1))


def test_a_producers_time_that_happens_to_be_the_servers_is_no_difference() -> None:
    first = event(1)
    first = msgspec.structs.replace(first, timestamp_ms=first.stored_at_ms)
    assert same_content(first, again(first))


def test_an_event_without_a_time_carries_the_servers_and_says_the_same() -> None:
    first = event(1)
    first = msgspec.structs.replace(first, timestamp_ms=first.stored_at_ms)
    assert same_content(first, again(first, timestamp_ms=first.stored_at_ms + 1_000))


def test_an_event_restored_with_the_servers_time_written_out_says_the_same() -> None:
    first = event(1)
    first = msgspec.structs.replace(first, timestamp_ms=first.stored_at_ms)
    restored = msgspec.structs.replace(first, stored_at_ms=first.stored_at_ms + 60_000)
    later = msgspec.structs.replace(
        first, stored_at_ms=first.stored_at_ms + 90_000, timestamp_ms=first.stored_at_ms + 90_000
    )
    assert same_content(restored, first)
    assert same_content(restored, later)


def test_a_repetition_is_left_out_and_a_contradiction_is_contested() -> None:
    one, two = event(1), event(2)
    other = again(two, data=b'"other"')
    result = deduplicate_by_key([one, two, again(one), other], set())
    assert result.rows == [one, two]
    assert result.repeated == 1
    assert result.contested == [other]
    assert deduplicate_by_key([one], {key_of(one)}).contested == [one]


def test_a_context_that_was_archived_is_a_touch() -> None:
    one, two = context(1), context(2)
    twice = msgspec.structs.replace(two, seq=3)
    kept = deduplicate_contexts([one, two, twice], {one.digest})
    assert [(row.seq, getattr(row, "form", "")) for row in kept] == [(1, "touch"), (2, "plain"), (3, "touch")]


def test_pieces_of_a_run_are_deduplicated_as_one() -> None:
    one, two = context(1), context(2)
    decided = Decided()
    assert deduplicate_contexts([one], set(), decided) == [one]
    kept = deduplicate_contexts([two, msgspec.structs.replace(one, seq=3)], set(), decided)
    assert [getattr(row, "form", "") for row in kept] == ["plain", "touch"]
    first, second = event(1), event(2)
    assert deduplicate_by_key([first], set(), decided).rows == [first]
    result = deduplicate_by_key([again(first), second, again(first, data=b"2")], set(), decided)
    assert (result.rows, result.repeated, len(result.contested)) == ([second], 1, 1)


def test_anchors_of_pieces_are_those_of_the_whole() -> None:
    rows = list(events(ANCHOR_EVERY - 5, 2 * ANCHOR_EVERY + 7))
    anchors = continue_anchors([], [])
    for start in range(0, len(rows), 103):
        anchors = continue_anchors(continue_anchors(anchors, rows[start : start + 103]), [])
    assert anchors == anchors_of(rows)


def test_anchors_are_each_thousandth_and_the_last() -> None:
    rows = list(events(ANCHOR_EVERY - 5, 2 * ANCHOR_EVERY + 7))
    assert [anchor.seq for anchor in anchors_of(rows)] == [ANCHOR_EVERY, 2 * ANCHOR_EVERY, 2 * ANCHOR_EVERY + 7]
    assert anchors_of([]) == []


@pytest.mark.parametrize(
    ("watermark", "first", "last", "young", "most", "expected"),
    [
        (10, 1, 20, None, None, 11),  # all old: what is archived goes
        (10, 1, 20, 5, None, 5),  # what is young stays
        (10, 1, 20, 1, None, None),  # all young
        (0, 1, 20, None, None, None),  # nothing archived
        (10, 11, 20, None, None, None),  # gone already
        (10, 1, 20, 1, 15, 6),  # the oldest beyond the count, however young
        (10, 1, 20, 1, 5, 11),  # but never what is not archived
        (30, 1, 20, None, None, 21),  # a watermark beyond the end purges no message to come
    ],
)
def test_purge_plans(
    watermark: int, first: int, last: int, young: int | None, most: int | None, expected: int | None
) -> None:
    assert (
        plan_purge(
            watermark=watermark,
            first_seq=first,
            last_seq=last,
            first_young_seq=young,
            messages=last - first + 1,
            most_messages=most,
        )
        == expected
    )


def test_a_run_is_cut_where_it_inflates_beyond_the_bound() -> None:
    messages = [
        StoredMessage(
            subject="ctx.default.event.a.x", headers={}, payload=b"{}" + b" " * 98, seq=n, stored_at_ms=1, epoch="e"
        )
        for n in range(1, 11)
    ]
    assert decode_run("events", messages).taken == 10
    assert decode_run("events", messages, max_bytes=250).taken == 3
    assert decode_run("events", messages, max_bytes=1).taken == 1
