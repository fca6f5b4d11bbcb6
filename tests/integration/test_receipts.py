"""Receipts: which contexts an event read and made, asked by context and by event, hot and cold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Event, Holdfast, connect, lineage
from holdfast.client.receipts import ReadRecorder, Receipts, Record
from holdfast.lake import Lake, compact
from holdfast.schemas.errors import InvalidFieldError, InvalidRefError, NotFoundError
from holdfast.schemas.ids import derived_event_id, new_event_id, now_ms
from holdfast.schemas.lineage import RECEIPT
from holdfast.schemas.refs import Ref, compute_digest, format_ref
from holdfast.streams.connection import open_connection
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in, target_of

if TYPE_CHECKING:
    from holdfast.client.receipts import Inputs, Use

pytestmark = pytest.mark.asyncio(loop_scope="module")

LATER_MS = 2 * 86_400_000


class System:
    """A server with workers that do nothing by the clock."""

    def __init__(self, url: str, lake: Path) -> None:
        self.url = url
        self.lake = lake

    async def archive(self) -> None:
        async with open_connection(target_of(self.url)) as control:
            await flush(control)

    async def make_cold(self) -> None:
        async with open_connection(target_of(self.url)) as control:
            await flush(control)
            assert (await evict(control, 0.0)).left == 0

    async def compact(self) -> int:
        lake = await asyncio.to_thread(Lake.open, self.lake)
        report = await asyncio.to_thread(lambda: compact(lake, at_ms=now_ms() + LATER_MS))
        await asyncio.to_thread(lake.close)
        return report.files_before


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[System]:
    data: Path = tmp_path_factory.mktemp("receipts")
    settings = settings_in(data)
    async with own_server(data) as server, running(server.url, settings):
        yield System(server.url, settings.lake)


@pytest_asyncio.fixture(loop_scope="module")
async def hf(system: System, namespace: str) -> AsyncGenerator[Holdfast]:
    async with connect(system.url, namespace, "worker") as client:
        yield client


def said(inputs: Inputs) -> list[tuple[str, list[tuple[Ref, int]], list[tuple[Ref, int, int]]]]:
    return [
        (
            work.event_id,
            [(item.ref, item.size) for item in work.read],
            [(item.ref, item.size, item.reads) for item in work.produced],
        )
        for work in inputs.works
    ]


def uses(found: list[Use]) -> list[tuple[str, str | None, list[Ref]]]:
    return [
        (use.event_id, None if use.event is None else use.event.name, [i.ref for i in use.produced]) for use in found
    ]


async def test_an_output_has_exactly_the_inputs_read_before_it(hf: Holdfast) -> None:
    brief, notes, late = await hf.put_many([{"goal": "fly"}, "some notes", {"too": "late"}])
    event = await hf.emit("plan:asked", session="s1", correlation="c1")
    async with hf.working_on(event) as context:
        assert context["event_id"] == event.event_id
        await hf.resolve_many([brief, notes])
        plan = await hf.put({"steps": [1, 2, 3]}, kind="plan")
        await hf.resolve(late)
        await hf.resolve(brief)
        answer = await hf.emit("plan:made", context={"done": True})
    assert answer.parent_event_id == event.event_id
    assert answer.context_ref is not None

    read = [(brief, 14), (notes, 10), (late, 14)]
    made = [(plan, len('{"steps":[1,2,3]}'), 2), (answer.context_ref, len('{"done":true}'), 3)]
    assert said(await hf.inputs_of(event)) == [(event.event_id, read, made)]
    assert said(await hf.inputs_of(event.event_id)) == [(event.event_id, read, made)]
    assert said(await hf.inputs_of(plan)) == [(event.event_id, read[:2], made[:1])]
    of_answer = await hf.inputs_of(answer.context_ref)
    assert said(of_answer) == [(event.event_id, read, made[1:])]
    assert [carrier.event_id for carrier in of_answer.carried_by] == [answer.event_id]
    assert of_answer.produced[0].event_id == answer.event_id
    assert of_answer.is_complete
    # Sizes and digests are those of what is stored.
    for item in (*of_answer.read, *of_answer.produced):
        context_of = await hf.resolve(item.ref)
        assert (item.size, item.kind) == (context_of.stored_size, context_of.kind)
        assert item.digest == compute_digest(
            hf.namespace, item.kind, context_of.raw, content_type=context_of.content_type
        )

    assert uses(await hf.used_by(brief)) == [(event.event_id, "plan:asked", [plan, answer.context_ref])]
    assert uses(await hf.used_by(late)) == [(event.event_id, "plan:asked", [answer.context_ref])]
    assert await hf.used_by(plan) == []
    [use] = await hf.used_by(notes)
    assert (use.size, use.agent_id, use.handler, use.is_complete) == (10, "worker", None, True)
    assert use.event is not None
    assert (use.event.session_id, use.event.correlation_id) == ("s1", "c1")


async def test_a_receipt_is_an_event_of_the_lineage_and_stays_out_of_the_way(hf: Holdfast) -> None:
    ref = await hf.put("x")
    root = await hf.emit("a", session="s2")
    event = await hf.emit("b", parent=root)
    async with hf.working_on(event):
        await hf.resolve(ref)
    [receipt] = [found async for found in hf.query(name=RECEIPT)]
    assert (receipt.parent_event_id, receipt.root_event_id, receipt.event_depth) == (event.event_id, root.event_id, 2)
    assert (receipt.session_id, receipt.agent_id, receipt.context_ref) == ("s2", "worker", None)
    assert receipt.data == {"handler": None, "read": [{"ref": ref, "size": 1}], "produced": []}


async def test_work_that_fails_or_is_not_tracked_or_touches_nothing_leaves_no_receipt(hf: Holdfast) -> None:
    ref = await hf.put("x")
    event = await hf.emit("a")

    async def fail() -> None:
        async with hf.working_on(event):
            await hf.resolve(ref)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        await fail()
    async with hf.working_on(event, track=False):
        await hf.resolve(ref)
        await hf.put("y")
    async with hf.working_on(event):
        await hf.resolve(ref, track=False)
        await hf.emit("b")
    assert await hf.used_by(ref) == []
    assert (await hf.inputs_of(event)).works == []
    with pytest.raises(InvalidFieldError, match="no event"):
        async with hf.working_on({"session_id": "s"}):
            pass


async def test_reading_for_an_event_without_a_receipt_is_told_at_once_and_once(hf: Holdfast) -> None:
    ref = await hf.put("x")
    event = await hf.emit("a")
    with lineage.within(event):
        await hf.resolve(ref)
        assert await hf.used_by(ref) == []
        for _ in range(3):
            await hf.resolve(ref, track=True)
    await hf.resolve(ref, track=True, lineage=lineage.of(event))
    # Another process, as it were.
    await Receipts(hf).record_read(event.lineage, ref, 1)
    assert said(await hf.inputs_of(event)) == [(event.event_id, [(ref, 1)], [])]
    assert len([found async for found in hf.query(name=RECEIPT)]) == 1
    with pytest.raises(InvalidFieldError) as refused:
        await hf.resolve(ref, track=True)
    assert refused.value.field == "track"


async def test_equal_outputs_of_several_works_have_an_answer_each(hf: Holdfast) -> None:
    first, second = await hf.put("one"), await hf.put("two")
    events = [await hf.emit("ask"), await hf.emit("ask")]
    answers: set[Ref] = set()
    for event, ref in zip(events, (first, second), strict=True):
        async with hf.working_on(event):
            await hf.resolve(ref)
            answers.add(await hf.put({"answer": 42}))
    [answer] = answers
    inputs = await hf.inputs_of(answer)
    assert [(work.event_id, [item.ref for item in work.read]) for work in inputs.works] == [
        (events[0].event_id, [first]),
        (events[1].event_id, [second]),
    ]
    assert [item.ref for item in inputs.read] == [first, second]
    assert inputs.events == [event.event_id for event in events]


async def test_a_large_receipt_is_asked_as_one(hf: Holdfast) -> None:
    event = await hf.emit("ask")
    kind = "k" * 64
    refs = [format_ref(kind, compute_digest(hf.namespace, kind, b"%d" % n)) for n in range(20_002)]
    recorder = ReadRecorder()
    for number in range(10_000):
        recorder.read(refs[number], number)
        recorder.produced(refs[10_000 + number], number)
    recorder.read(refs[20_000], 1)
    recorder.produced(refs[20_001], 1)
    await hf.receipts.write(event.lineage, recorder.record(), handler="big")
    assert len([found async for found in hf.query(name=RECEIPT)]) > 2
    [use] = await hf.used_by(refs[5])
    assert [item.ref for item in use.produced] == refs[10_005:20_000]
    assert (use.handler, use.is_complete) == ("big", False)
    [work] = (await hf.inputs_of(refs[19_999])).works
    assert [item.ref for item in work.read] == refs[:10_000]
    assert work.is_complete
    [whole] = (await hf.inputs_of(event)).works
    assert (whole.left_out, whole.left_out_produced) == (1, 1)


async def test_answers_are_the_same_hot_half_archived_cold_and_compacted(system: System, namespace: str) -> None:
    async with connect(system.url, namespace, "worker", cache_bytes=0) as hf:
        brief = await hf.put({"goal": "fly"})
        made: list[Ref] = []
        events: list[Event] = []
        for number in range(6):
            events.append(await hf.emit("ask", {"n": number}))
            async with hf.working_on(events[-1]):
                await hf.resolve(brief)
                made.append(await hf.put({"answer": number}))
                await hf.emit("answer", context=made[-1])
            if number == 2:
                await system.archive()

        async def answers() -> Any:
            return (
                await hf.used_by(brief),
                [await hf.inputs_of(ref) for ref in made],
                [await hf.inputs_of(event) for event in events],
            )

        half_archived = await answers()
        assert uses(half_archived[0]) == [
            (event.event_id, "ask", [ref]) for event, ref in zip(events, made, strict=True)
        ]
        assert [[item.ref for item in inputs.read] for inputs in half_archived[1]] == [[brief]] * 6
        assert [len(inputs.carried_by) for inputs in half_archived[1]] == [1] * 6
        await system.make_cold()
        assert await answers() == half_archived
        assert await system.compact() >= 2
        assert await answers() == half_archived
        # What the receipts name is still there, and of that size.
        for item in half_archived[1][0].read:
            assert len((await hf.resolve(item.ref)).raw) == item.size


async def test_a_text_that_only_looks_the_same_is_no_reading(hf: Holdfast) -> None:
    ref = await hf.put("x")
    event = await hf.emit("a")
    strange: list[Any] = [
        {"handler": ref, "read": [], "produced": []},
        {"read": [{"ref": f"{ref}a", "size": 1}], "produced": []},
        {"read": [], "produced": [{"ref": ref, "size": 1, "reads": 0}]},
        {"read": [{"ref": [ref], "size": 1}], "produced": []},
        {"read": [{"ref": ref, "size": "one"}], "produced": []},
        {"read": ref, "produced": 5},
        [ref],
    ]
    for data in strange:
        await hf.emit(RECEIPT, data, parent=event)
    await hf.emit(RECEIPT, {"read": [{"ref": ref, "size": 1}], "produced": []})  # of no event
    await hf.emit("note", {"read": [{"ref": ref, "size": 1}], "produced": []}, parent=event)
    assert await hf.used_by(ref) == []
    assert [item.ref for work in (await hf.inputs_of(ref)).works for item in work.produced] == [ref]


async def test_pages_and_refusals_of_the_endpoint(hf: Holdfast) -> None:
    ref = await hf.put("x")
    for number in range(5):
        event = await hf.emit("a", {"text": "x" * 400_000, "n": number})
        async with hf.working_on(event):
            await hf.resolve(ref)
            await hf.put(number)
    carrier = await hf.emit("b", context=ref)
    seen: list[str] = []
    request: dict[str, Any] = {"ref": ref, "limit": 2}
    while (page := await hf.call_resolver("receipts", request))["events"]:
        assert len(page["events"]) <= 2
        seen += [item["name"] for item in page["events"]]
        request["cursor"] = page["cursor"]
    assert seen == [RECEIPT] * 5 + ["b"]
    assert [
        item["event_id"] for item in (await hf.call_resolver("receipts", {"ref": ref, "role": "produced"}))["events"]
    ] == [carrier.event_id]
    # Events that are too large for one answer come all the same.
    assert [len(use.event.data["text"]) for use in await hf.used_by(ref) if use.event is not None] == [400_000] * 5
    for refused, field in (
        ({}, "ref"),
        ({"ref": ref, "event_id": carrier.event_id}, "ref"),
        ({"ref": "junk"}, "ref"),
        ({"event_id": carrier.event_id, "role": "read"}, "role"),
        ({"ref": ref, "role": "eaten"}, "role"),
        ({"ref": ref, "limit": 0}, "limit"),
        ({"ref": ref, "cursor": "junk"}, "cursor"),
    ):
        with pytest.raises(InvalidFieldError) as error:
            await hf.call_resolver("receipts", refused)
        assert error.value.field == field
    with pytest.raises(InvalidRefError):
        await hf.inputs_of("ctx_no")
    with pytest.raises(InvalidRefError):
        await hf.used_by("junk")
    assert (await hf.inputs_of("an-event-that-is-not")).works == []


async def test_a_mark_without_anything_to_tell_is_stored_once(hf: Holdfast) -> None:
    event = await hf.emit("a")
    mark = derived_event_id(hf.namespace, "receipt", "h", event.event_id)
    for _ in range(3):
        await hf.receipts.write(event.lineage, Record(), handler="h", receipt_id=mark)
    found = [receipt async for receipt in hf.query(name=RECEIPT)]
    assert [receipt.event_id for receipt in found] == [mark]
    await hf.receipts.write(event.lineage, Record())
    assert len([receipt async for receipt in hf.query(name=RECEIPT)]) == 1


async def test_bodies_of_named_contexts_are_noted_like_others(hf: Holdfast) -> None:
    old = await hf.keys.put("plan.current", {"step": 1})
    event = await hf.emit("plan:asked")
    async with hf.working_on(event):
        value = await hf.keys.get("plan.current")
        new = await hf.keys.put("plan.next", {"step": value.body["step"] + 1})
    [work] = (await hf.inputs_of(event)).works
    assert [(item.ref, item.size) for item in work.read] == [(old.ref, len(old.raw))]
    assert [item.ref for item in work.produced] == [new.ref]


async def test_what_is_made_with_an_explicit_lineage_is_told_at_once_and_once(hf: Holdfast) -> None:
    event = await hf.emit("plan:asked")
    [ref] = await hf.put_many([{"step": 1}], lineage=event.lineage)
    assert ref == await hf.put({"step": 1}, lineage=event.lineage)
    [work] = (await hf.inputs_of(ref)).works
    assert (work.event_id, [item.ref for item in work.produced]) == (event.event_id, [ref])
    with pytest.raises(InvalidFieldError):
        await hf.put({"step": 2}, lineage={"session_id": "s1"})


async def test_what_is_made_by_the_explicit_path_has_the_inputs_of_the_work_it_was_made_in(hf: Holdfast) -> None:
    brief = await hf.put({"goal": "fly"})
    event = await hf.emit("plan:asked")
    async with hf.working_on(event) as context:
        await hf.resolve(brief, lineage=context)
        plan = await hf.put({"steps": ["fly"]}, lineage={**context, "budget": 3})
    [work] = (await hf.inputs_of(plan)).works
    assert (work.event_id, [item.ref for item in work.read]) == (event.event_id, [brief])


async def test_an_event_that_is_not_stored_is_told_by_its_id(hf: Holdfast) -> None:
    ref = await hf.put("x")
    absent = str(new_event_id())
    async with hf.working_on({"event_id": absent}):
        await hf.resolve(ref)
        with pytest.raises(NotFoundError):
            await hf.resolve(format_ref("note", compute_digest(hf.namespace, "note", b"nowhere")))
    [use] = await hf.used_by(ref)
    assert (use.event_id, use.event) == (absent, None)


async def test_another_namespace_sees_nothing(hf: Holdfast, system: System) -> None:
    ref = await hf.put("x")
    event = await hf.emit("a", context=ref)
    async with hf.working_on(event):
        await hf.resolve(ref)
    async with connect(system.url, f"{hf.namespace}-2", "other") as other:
        assert await other.used_by(ref) == []
        inputs = await other.inputs_of(ref)
        assert (inputs.works, inputs.carried_by) == ([], [])
        assert (await other.inputs_of(event)).works == []
