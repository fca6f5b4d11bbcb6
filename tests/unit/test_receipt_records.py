"""What a receipt holds: what is noted, in what order, and how it is put into messages and read from them."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client.emitting import event_of
from holdfast.client.receipt_records import ReadRecorder, Record, Work, receipt_events, works_of
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.lineage import RECEIPT
from holdfast.schemas.refs import Ref, compute_digest, format_ref
from holdfast.streams.events import encode_event

if TYPE_CHECKING:
    from holdfast.client.model import Event
    from holdfast.streams.events import NewEvent

EVENT = str(new_event_id())
ROOT = str(new_event_id())
CONTEXT: dict[str, Any] = {
    "event_id": EVENT,
    "parent_event_id": ROOT,
    "root_event_id": ROOT,
    "event_depth": 3,
    "session_id": "s",
    "correlation_id": "c",
    "agent_id": "worker",
    "iteration": {"index": 1},
}
AT_MS = 1_750_000_000_000


def ref(number: int, kind: str = "note") -> Ref:
    return format_ref(kind, compute_digest("t", kind, b"%d" % number))


def receipts(record: Record, **changes: Any) -> list[NewEvent]:
    values: dict[str, Any] = {
        "namespace": "t",
        "agent": "worker",
        "receipt_id": new_event_id(),
        "timestamp_ms": AT_MS,
        "handler": None,
        **changes,
    }
    return receipt_events(CONTEXT, record, **values)


def stored(events: list[NewEvent]) -> list[Event]:
    """The events as a reader gets them: through the bytes of their messages."""
    for event in events:
        assert len(encode_event(event).payload) <= limits.EVENT_BYTES
    return [
        msgspec.structs.replace(event_of(event), data=msgspec.json.decode(msgspec.json.encode(event.data)))
        for event in events
    ]


def only(works: list[Work]) -> Work:
    [work] = works
    return work


def test_a_receipt_says_what_was_read_and_made_in_order() -> None:
    recorder = ReadRecorder()
    recorder.read(ref(1), 10)
    recorder.produced(ref(7), 70)
    recorder.read(ref(2), 20)
    recorder.read(ref(1), 10)
    carrier = new_event_id()
    recorder.produced(ref(8), 80, carrier)
    [event] = receipts(recorder.record(), handler="checker")
    assert event.data == {
        "handler": "checker",
        "read": [{"ref": ref(1), "size": 10}, {"ref": ref(2), "size": 20}],
        "produced": [
            {"ref": ref(7), "size": 70, "reads": 1},
            {"ref": ref(8), "size": 80, "reads": 2, "event_id": carrier},
        ],
    }
    assert (event.name, event.parent_event_id, event.root_event_id, event.event_depth) == (RECEIPT, EVENT, ROOT, 4)
    assert (event.session_id, event.correlation_id, event.agent_id, event.timestamp_ms) == ("s", "c", "worker", AT_MS)
    assert event.attributes is None


def test_an_output_counts_from_when_it_was_first_made_whoever_carries_it_later() -> None:
    recorder = ReadRecorder()
    first, second = new_event_id(), new_event_id()
    recorder.produced(ref(7), 70)
    recorder.read(ref(1), 10)
    recorder.produced(ref(7), 70)  # an equal one: stored once
    recorder.referred(ref(7), first)
    recorder.referred(ref(7), first)
    recorder.referred(ref(7), second)
    recorder.referred(ref(1), second)  # only handed on
    made = recorder.record().produced
    assert [(item.ref, item.reads, item.event_id) for item in made] == [(ref(7), 0, first), (ref(7), 0, second)]


def test_the_receipt_of_a_root_names_it_as_the_root() -> None:
    record = Record(read=())
    [event] = receipt_events(
        {"event_id": "step-1", "event_depth": 0}, record, namespace="t", agent="a", receipt_id=new_event_id(),
        timestamp_ms=None,
    )  # fmt: skip
    assert event.parent_event_id == event.root_event_id
    assert (event.event_depth, event.timestamp_ms) == (1, None)
    with pytest.raises(InvalidFieldError, match="names none"):
        receipt_events({}, record, namespace="t", agent="a", receipt_id=new_event_id(), timestamp_ms=None)


def test_what_is_over_the_bound_is_counted_and_told() -> None:
    recorder = ReadRecorder(most=3)
    for number in range(3):
        recorder.read(ref(number), 1)
    recorder.produced(ref(10), 1)
    for number in range(5):  # three of them are known
        recorder.read(ref(number), 1)
    for number in range(11, 16):
        recorder.produced(ref(number), 1)
    work = only(works_of(stored(receipts(recorder.record()))))
    assert [item.ref for item in work.read] == [ref(0), ref(1), ref(2)]
    assert [item.ref for item in work.produced] == [ref(10), ref(11), ref(12)]
    assert (work.left_out, work.left_out_produced, work.is_complete) == (2, 3, False)
    before, after = work.narrowed_to(ref(10)), work.narrowed_to(ref(11))
    assert before is not None
    assert after is not None
    assert (before.left_out, before.is_complete) == (0, True)
    assert (after.left_out, after.is_complete) == (2, False)


def test_ten_thousand_of_each_are_told_in_several_messages_none_too_large() -> None:
    recorder = ReadRecorder()
    kind = "k" * limits.KIND_CHARS
    reads, made = [ref(n, kind) for n in range(10_000)], [ref(n, kind) for n in range(10_000, 20_000)]
    for was_read, was_made in zip(reads, made, strict=True):
        recorder.read(was_read, 2**40)
        recorder.produced(was_made, 2**40, str(new_event_id()))
    receipt_id = new_event_id()
    events = receipts(recorder.record(), receipt_id=receipt_id, handler="h" * 256)
    assert len(events) > 3
    assert events[-1].id == receipt_id, "the one that says it is done is sent last"
    assert [event.id for event in receipts(recorder.record(), receipt_id=receipt_id)][:-1] == [
        event.id for event in events
    ][:-1]
    work = only(works_of(stored(events)))
    assert [item.ref for item in work.read] == reads
    assert [item.ref for item in work.produced] == made
    assert work.is_complete
    missing = only(works_of(stored(events[1:])))
    assert (missing.missing_parts, missing.is_complete) == (1, False)


def test_a_part_that_is_not_of_the_receipt_is_no_receipt() -> None:
    recorder = ReadRecorder()
    for number in range(20_000):
        recorder.read(ref(number, "k" * 64), 1)
    events = stored(receipts(recorder.record()))
    forged = msgspec.structs.replace(events[0], event_id=new_event_id())
    assert len(events) > 1
    assert works_of([forged]) == []


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "read",
        {"read": "x"},
        {"read": [{"ref": "junk", "size": 1}]},
        {"read": [{"ref": ref(1), "size": -1}]},
        {"read": [], "produced": [{"ref": ref(1), "size": 1}]},
        {"read": [], "produced": [], "parts": 0},
        {"read": [], "produced": [], "receipt": str(new_event_id()), "part": 0},
    ],
)
def test_what_only_has_the_name_of_a_receipt_is_left_out(data: Any) -> None:
    [event] = stored(receipts(Record()))
    assert len(works_of([event])) == 1
    assert works_of([msgspec.structs.replace(event, data=data)]) == []


def test_threads_note_together() -> None:
    recorder = ReadRecorder()

    def note(first: int) -> None:
        for number in range(first, first + 500):
            recorder.read(ref(number), number)
            recorder.produced(ref(number + 100_000), number)

    threads = [threading.Thread(target=note, args=(start,)) for start in range(0, 2_000, 250)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = recorder.record()
    assert len({item.ref for item in record.read}) == len(record.read) == 2_250
    assert len(record.produced) == 2_250
    assert all(item.reads <= len(record.read) for item in record.produced)


Step = tuple[str, int]
STEPS = st.lists(st.tuples(st.sampled_from(["read", "put", "emit", "refer"]), st.integers(0, 6)), max_size=40)


@given(STEPS)
def test_inputs_of_an_output_are_what_was_read_before_it_first_was_there(steps: list[Step]) -> None:
    recorder = ReadRecorder()
    reads: list[Ref] = []
    inputs: dict[Ref, list[Ref]] = {}
    for number, (what, which) in enumerate(steps):
        if what == "read":
            recorder.read(ref(which), which)
            if ref(which) not in reads:
                reads.append(ref(which))
        elif what == "refer":
            recorder.referred(ref(which), f"{number}")
        else:
            recorder.produced(ref(which), which, f"{number}" if what == "emit" else None)
            inputs.setdefault(ref(which), list(reads))
    [event] = stored(receipts(recorder.record()))
    work = only(works_of([msgspec.structs.replace(event, timestamp=datetime(2026, 1, 1, tzinfo=UTC))]))
    assert [item.ref for item in work.read] == reads
    assert list(dict.fromkeys(item.ref for item in work.produced)) == list(inputs)
    for made, expected in inputs.items():
        narrowed = work.narrowed_to(made)
        assert narrowed is not None
        assert [item.ref for item in narrowed.read] == expected
    for was_read in reads:
        assert {item.ref for item in work.after(was_read)} == {
            made for made, expected in inputs.items() if was_read in expected
        }
