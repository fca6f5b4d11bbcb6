"""Three agents over the standard library: a librarian, a surveyor, a reviewer.

Each has a client of its own and sees nothing of the others but their events: it asks for the events of one name, takes
the reference in them, resolves it, works, stores what it made, and publishes an event that refers to that and names the
event it followed from::

    librarian ──module:found──▶ surveyor ──module:measured──▶ reviewer ──module:reviewed──▶ whoever asks

No body travels in an event, and no object of Python from agent to agent.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Final, Literal, TypeVar

import msgspec

from holdfast.client import Context, Event, Holdfast, Ref, connect
from holdfast.ops.demo.library import RULES, Measures, Module, Review, list_modules, measure, review
from holdfast.streams.connection_target import ConnectionTarget

AgentName = Literal["librarian", "surveyor", "reviewer"]
AGENTS: Final[tuple[AgentName, ...]] = ("librarian", "surveyor", "reviewer")

LISTED: Final = "library:listed"
FOUND: Final = "module:found"
MEASURED: Final = "module:measured"
REVIEWED: Final = "module:reviewed"

_BATCH: Final = 100
"""Modules that an agent works on at once: their writes share a few commits."""
_POLL_S: Final = 0.2
"""Between two questions that found nothing new: each costs the resolver some milliseconds."""

Report = Callable[[AgentName, int], None]
"""Told how many modules an agent has done so far."""

T = TypeVar("T")


async def run_agents(target: ConnectionTarget, namespace: str, session: str, report: Report) -> int:
    """Runs the three agents to the end of their work; returns the number of modules."""
    async with asyncio.TaskGroup() as group:
        listed = group.create_task(_with_client(target, namespace, "librarian", session, librarian, report))
        group.create_task(_with_client(target, namespace, "surveyor", session, surveyor, report))
        group.create_task(_with_client(target, namespace, "reviewer", session, reviewer, report))
    return listed.result()


Agent = Callable[[Holdfast, str, Report], Awaitable[int]]


async def _with_client(
    target: ConnectionTarget, namespace: str, name: AgentName, session: str, agent: Agent, report: Report
) -> int:
    async with connect(target, namespace, name) as hf:
        return await agent(hf, session, report)


async def librarian(hf: Holdfast, session: str, report: Report) -> int:
    """Stores the source of each module and says that it found it."""
    modules = await asyncio.to_thread(lambda: list(list_modules()))
    beginning = await hf.emit(LISTED, {"modules": len(modules)}, session=session)
    done = 0
    for batch in _batches(modules):
        refs = await hf.put_many((module.source for module in batch), kind="source", content_type="text/x-python")
        await asyncio.gather(*(_found(hf, beginning, module, ref) for module, ref in zip(batch, refs, strict=True)))
        done += len(batch)
        report("librarian", done)
    return len(modules)


async def _found(hf: Holdfast, beginning: Event, module: Module, ref: Ref) -> None:
    await hf.emit(FOUND, {"module": module.name}, context=ref, correlation=module.name, parent=beginning)


async def surveyor(hf: Holdfast, session: str, report: Report) -> int:
    """Measures each module that was found."""
    done = 0
    async for batch in events_of(hf, session, FOUND):
        sources = (await hf.resolve_many(_refs(batch))).found
        measured = await asyncio.to_thread(_measure_all, batch, sources)
        refs = await hf.put_many(measured, kind="measures")
        await asyncio.gather(
            *(
                hf.emit(MEASURED, {"module": _module(event)}, context=ref, parent=event)
                for event, ref in zip(batch, refs, strict=True)
            )
        )
        done += len(batch)
        report("surveyor", done)
    return done


async def reviewer(hf: Holdfast, session: str, report: Report) -> int:
    """Reviews each module that was measured; with each review it stores the rules that it went by."""
    done = 0
    async for batch in events_of(hf, session, MEASURED):
        measured = (await hf.resolve_many(_refs(batch))).found
        measures = [msgspec.convert(measured[_ref(event)].body, Measures) for event in batch]
        sources = (await hf.resolve_many(item.source for item in measures)).found
        reviews = await asyncio.to_thread(_review_all, batch, measures, sources)
        refs = await hf.put_many(reviews, kind="review")
        # Equal each time, so stored once: what an agent knew is part of its record at no cost.
        rules = await asyncio.gather(*(hf.put(RULES, kind="rules") for _ in batch))
        await asyncio.gather(
            *(
                hf.emit(REVIEWED, {"module": _module(event), "rules": rule}, context=ref, parent=event)
                for event, ref, rule in zip(batch, refs, rules, strict=True)
            )
        )
        done += len(batch)
        report("reviewer", done)
    return done


async def events_of(hf: Holdfast, session: str, name: str) -> AsyncGenerator[list[Event]]:
    """Yields the events of a name in batches as they come, each once, until there are as many as modules listed."""
    seen: set[str] = set()
    expected: int | None = None
    since: datetime | None = None
    while expected is None or len(seen) < expected:
        if expected is None:
            async for event in hf.query(session=session, name=LISTED, limit=1):
                expected = int(event.data["modules"])
        # From the newest on, inclusive: events of one millisecond may come in two answers.
        found = [event async for event in hf.query(session=session, name=name, since=since)]
        new = [event for event in found if event.event_id not in seen]
        for batch in _batches(new):
            yield batch
        seen.update(event.event_id for event in new)
        if new:
            since = new[-1].stored_at
        else:
            await asyncio.sleep(_POLL_S * (0.5 + random.random()))  # noqa: S311  spreads polls, guards nothing


def _batches(items: Sequence[T]) -> list[list[T]]:
    return [list(items[start : start + _BATCH]) for start in range(0, len(items), _BATCH)]


def _ref(event: Event) -> Ref:
    assert event.context_ref is not None, f"event {event.event_id} of an agent carries no reference"
    return event.context_ref


def _refs(events: Sequence[Event]) -> list[Ref]:
    return [_ref(event) for event in events]


def _module(event: Event) -> str:
    return str(event.data["module"])


def _measure_all(batch: Sequence[Event], sources: Mapping[Ref, Context]) -> list[Measures]:
    return [measure(_module(event), sources[_ref(event)].body, _ref(event)) for event in batch]


def _review_all(batch: Sequence[Event], measures: Sequence[Measures], sources: Mapping[Ref, Context]) -> list[Review]:
    return [
        review(item, sources[Ref(item.source)].body, _ref(event)) for event, item in zip(batch, measures, strict=True)
    ]
