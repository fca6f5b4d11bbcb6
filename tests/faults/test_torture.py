"""The proof of zero loss, in small: a short run of each of its commands, and planted faults that they must notice."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.ops.torture.check import Violation, check
from holdfast.ops.torture.history import History, HistoryWriter, read_history
from holdfast.ops.torture.load import SdkProducer, run_producer
from holdfast.ops.torture.observe import observe
from holdfast.ops.torture.readers import read_notes
from holdfast.ops.torture.rig import TortureRig
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM, KEYS_STREAM
from tests.campaigns.chaos import make_past
from tests.campaigns.kills import Campaign
from tests.running import eventually
from tests.support import OwnServer, api, plain_client

pytestmark = [pytest.mark.asyncio, pytest.mark.faults]


async def holdfast(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs a command; returns its exit status, its JSON and what it told beside."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "holdfast.ops.cli", *arguments, "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, told = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(output or told.splitlines()[-1]), told.decode()


async def test_a_short_torture_finds_nothing(tmp_path: Path) -> None:
    make_past(tmp_path / "lake", 4_000)  # the rows of others are not in the way
    faults = "kill-server,kill-worker,evict,duplicate,poison,oversize,proxy"
    status, report, told = await holdfast(
        *("torture", "--seed", "11", "--seconds", "6", "--rate", "300", "--faults", faults, "--data", str(tmp_path))
    )
    assert report["violations"] == [], told
    assert status == 0
    assert report["acknowledged"] > 100
    assert sum(report["faults"].values()) >= 2
    assert {"context acknowledged", "event acknowledged", "key acknowledged"} <= set(report["by_kind"])
    assert report["read_during"]["contexts"] > 0
    # What was done can be read again.
    assert len(read_history((tmp_path / "history").glob("*.ndjson")).acknowledged()) == report["acknowledged"]


async def test_an_unknown_fault_is_refused_with_those_known() -> None:
    status, answer, _ = await holdfast("torture", "--faults", "kill-server,earthquake")
    assert status == 2
    assert "earthquake" in answer["error"]["message"]
    assert "kill-server" in answer["error"]["hint"]


async def test_killing_the_server_under_load_loses_nothing(tmp_path: Path) -> None:
    outcome = await Campaign(tmp_path, 5, rate=150.0).run(8)
    assert outcome.violations == []
    assert outcome.cycles == 8
    assert outcome.acknowledged > 100
    assert outcome.unexpected_ends == []


# What a run must notice: the same checks on a system whose data were tampered with behind its back


@pytest_asyncio.fixture
async def loaded(own_server: OwnServer, tmp_path: Path) -> AsyncGenerator[tuple[str, History]]:
    """A server with what a producer of each kind has written, and the record of that."""
    stop = asyncio.Event()
    for name, is_raw in (("p", False), ("r", True)):
        path = tmp_path / f"{name}.ndjson"
        await run_producer(own_server.url, path, name, 7, namespace="n", count=60, stop=stop, raw=is_raw, key_space=2)
    yield own_server.url, read_history(tmp_path.glob("*.ndjson"))


async def judged(url: str, history: History) -> list[Violation]:
    refs = [attempt.id for attempt in history.attempts if attempt.kind == "context"]
    return check(history, await observe(url, None, namespaces=["n"], readers=("raw",), refs=refs))


async def test_what_nobody_tampered_with_is_sound(loaded: tuple[str, History]) -> None:
    # Without an ingester, what came inline is in its event alone.
    found = [each for each in await judged(*loaded) if "came with an acknowledged event" not in each.what]
    assert found == []
    counts = loaded[1].counts()
    assert counts["acknowledged"] == len(loaded[1].attempts)
    assert all(counts[f"{kind} acknowledged"] for kind in ("context", "event", "key"))


async def test_a_context_taken_away_behind_the_systems_back_is_named_with_its_history(
    loaded: tuple[str, History],
) -> None:
    url, history = loaded
    victim = history.acknowledged("context")[3]
    async with plain_client(url) as client:
        subject = f"$KV.ctx-hot.n.{victim.id.rpartition('_')[2]}"
        assert (await api(client, f"STREAM.PURGE.{HOT_STREAM}", {"filter": subject}))["purged"] == 1
    found = [each for each in await judged(url, history) if each.object == victim.id]
    assert [(each.invariant, each.what) for each in found] == [("I1", "lost: acknowledged, raw has it not")]
    assert [line.split()[0] for line in found[0].history] == [victim.op]
    assert "acknowledged" in found[0].history[0]


async def test_a_log_that_lost_its_beginning_is_noticed(loaded: tuple[str, History]) -> None:
    url, history = loaded
    async with plain_client(url) as client:
        assert (await api(client, f"STREAM.PURGE.{EVENTS_STREAM}", {"seq": 4}))["purged"] == 3
    found = await judged(url, history)
    assert sum(each.what == "lost: acknowledged, raw has it not" for each in found) >= 3
    assert any(each.invariant == "I3" and "purged above the watermark" in each.what for each in found)


async def test_an_event_and_a_version_that_nobody_wrote_are_noticed(loaded: tuple[str, History]) -> None:
    url, history = loaded
    async with plain_client(url) as client:
        js = client.jetstream()
        await js.publish("ctx.n.event.x.y", b'{"id":"0199aaaa-0000-7000-8000-000000000000","data":1}')
        key = history.acknowledged("key")[0].id
        await js.publish(f"$KV.ctx-keys.n.{key}", b'{"version":1,"op":"put","ref":"ctx_a_b","change_type":"forged"}')
    what = [each.what for each in await judged(url, history)]
    assert "raw shows it, nobody published it" in what
    assert any("nobody wrote it" in each for each in what)
    assert any("a gap or a version twice" in each for each in what)


async def test_a_key_that_lost_its_newest_version_is_noticed(loaded: tuple[str, History]) -> None:
    url, history = loaded
    last = {attempt.id: attempt for attempt in history.acknowledged("key")}
    key, newest = next(iter(last.items()))
    async with plain_client(url) as client:
        assert (await api(client, f"STREAM.PURGE.{KEYS_STREAM}", {"filter": f"$KV.ctx-keys.n.{key}"}))["purged"]
    found = [each for each in await judged(url, history) if each.object == key]
    assert any(newest.op in line for each in found for line in each.history)
    assert {each.invariant for each in found} == {"I1"}


async def test_a_reader_notes_what_is_not_found_during_the_run(own_server: OwnServer, tmp_path: Path) -> None:
    """A record that claims more than was stored: the reader asks for it, and says so."""
    async with TortureRig(tmp_path, seed=3) as rig:
        rig.client_url = own_server.url
        rig.namespace = "n"
        async with connect(own_server.url, "n", "p") as hf:
            with HistoryWriter(tmp_path / "history" / "p.ndjson") as writer:
                producer = SdkProducer(hf, writer, "p", 3, kinds=["key"])
                choice = random.Random(1)
                for _ in range(4):
                    await producer.step(choice)
                invented, _ = producer.next_key(choice)
                writer.begin(invented)
                writer.acknowledged(invented.op, version=99)
        rig.start_reader("reader1", with_lake=False)
        await eventually(lambda: read_notes(rig.notes)[0])
        found = read_notes(rig.notes)[0]
        assert all(invented.id in line and "version 99" in line for line in found)
