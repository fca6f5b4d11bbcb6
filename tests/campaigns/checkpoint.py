"""Checkpoints under load: captured, everything killed, restored elsewhere, compared with what was acknowledged::

    python -m tests.campaigns.checkpoint --rounds 20 --seed 7

In each round a writer process puts, emits and changes keys, and tells what was acknowledged and when; a checkpoint is
captured in between.  Then writer, server and workers are killed (``kill -9``) and the checkpoint is restored into a new
data directory at a new port, by a restore that is cut off at some place and run again.  Everything that was
acknowledged before the capture began is there; what is there is right, once, and refers to nothing that is not there.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import Holdfast, connect
from holdfast.client.checkpoints import Checkpoints
from holdfast.ops.verify import verify
from holdfast.streams.decode import decode_event
from holdfast.streams.pull import StreamReader
from holdfast.streams.restoring import restore_under_way
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.control import flush
from tests.campaigns.rig import tell
from tests.running import free_address, running, settings_in, system_process, until_ready
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from holdfast.client.checkpoints import CheckpointData
    from holdfast.schemas.rows import EventRow

MODULE: Final = "tests.campaigns.checkpoint"
ROOT: Final = Path(__file__).parents[2]
KEYS: Final = 5


class Acknowledged(msgspec.Struct, frozen=True):
    """Something that the server has acknowledged, and when: by the clock that all processes share."""

    at_ns: int
    kind: str
    name: str
    version: int
    mark: str


class Outcome(msgspec.Struct):
    """What a campaign came to."""

    rounds: int = 0
    acknowledged: int = 0
    before_capture: int = 0
    captured: int = 0
    cut_off: int = 0


class CutOffError(Exception):
    """A restore was cut off on purpose."""


def body_of(mark: str) -> dict[str, Any]:
    """The body that stands for a mark: small, large or in several chunks."""
    number = int.from_bytes(hashlib.sha256(mark.encode()).digest()[:2])
    size = 600_000 if number % 97 == 0 else number % 3_000
    return {"mark": mark, "text": f"{mark} " * (size // 10)}


async def write_for_ever(url: str, namespace: str, tasks: int) -> None:
    """Writes until it is killed, and prints what was acknowledged, after it was."""
    async with connect(url, namespace, "writer", cache_bytes=0) as hf, asyncio.TaskGroup() as group:
        for number in range(tasks):
            group.create_task(_write(hf, f"w{number}"))


async def _write(hf: Holdfast, name: str) -> None:
    turn = 0
    while True:
        turn += 1
        mark = f"{name}.{turn}"
        ref = await hf.put(body_of(mark))
        _tell("put", ref, 0, mark)
        event = await hf.emit("step:done", {"mark": mark}, context=ref, session=name)
        _tell("event", str(event.event_id), 0, mark)
        version = await hf.keys.put(f"key.{turn % KEYS}", body_of(f"k{mark}"), change_type=mark)
        _tell("version", version.key, version.version, mark)


def _tell(kind: str, name: str, version: int, mark: str) -> None:
    line = msgspec.json.encode(Acknowledged(time.monotonic_ns(), kind, name, version, mark))
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.flush()


async def campaign(folder: Path, rounds: int, seed: int, *, is_told: bool = False) -> Outcome:
    """Runs that many rounds; raises AssertionError when something acknowledged is missing, or anything is wrong."""
    outcome = Outcome()
    for number in range(rounds):
        choice = random.Random(f"{seed} {number}")
        await _round(folder / f"round{number}", choice, outcome)
        outcome.rounds += 1
        if is_told:
            tell(f"round {number + 1} of {rounds}: {msgspec.json.encode(outcome).decode()}")
    return outcome


async def _round(folder: Path, choice: random.Random, outcome: Outcome) -> None:
    folder.mkdir(parents=True)
    namespace = f"c{uuid.uuid4().hex}"
    records, data, began_ns = await _capture_under_load(folder, namespace, choice)
    before = [record for record in records if record.at_ns < began_ns]
    outcome.acknowledged += len(records)
    outcome.before_capture += len(before)
    outcome.captured += sum(data.info.summary.items)
    assert data.info.summary.elsewhere == 0, "something that is captured refers to what is not"
    server = OwnServer(folder / "elsewhere" / "nats")
    await server.start()
    try:
        async with connect(server.url, namespace, "checker", cache_bytes=0) as hf:
            outcome.cut_off += await _restore(hf, data, choice)
            await _check(hf, data, before, folder / "elsewhere")
    finally:
        await server.stop()


async def _capture_under_load(
    folder: Path, namespace: str, choice: random.Random
) -> tuple[list[Acknowledged], CheckpointData, int]:
    url = await free_address()
    settings = settings_in(folder, archive_interval_s=0.2)
    async with system_process(url, folder / "nats", settings) as system:
        await until_ready(system)
        async with _writer(url, namespace, choice.randint(1, 8)) as writer:
            records: list[Acknowledged] = []
            enough = asyncio.Event()
            reading = asyncio.create_task(_collect(writer, records, choice.randint(50, 600), enough))
            async with asyncio.timeout(LIMIT_S):
                await enough.wait()
            async with connect(url, namespace, "capturer") as hf:
                began_ns = time.monotonic_ns()
                data = await Checkpoints(hf, directory=folder / "kept").capture_context_state()
                path = await Checkpoints(hf, directory=folder / "kept").save_context_checkpoint(data)
                assert path.is_file()
                # Mid-sentence: what runs is killed, not asked.
                system.kill()
                writer.kill()
            await system.wait()
            await reading
    return records, data, began_ns


async def _collect(
    writer: asyncio.subprocess.Process, records: list[Acknowledged], enough_records: int, enough: asyncio.Event
) -> None:
    assert writer.stdout is not None
    async for line in writer.stdout:
        if line.endswith(b"\n"):
            records.append(msgspec.json.decode(line, type=Acknowledged))
        if len(records) >= enough_records:
            enough.set()


async def _restore(hf: Holdfast, data: CheckpointData, choice: random.Random) -> int:
    """Restores, cut off at some place; returns how often it was."""
    store = Checkpoints(hf)
    at = choice.randint(0, sum(data.info.summary.items))

    def cut(done: int, _total: int) -> None:
        if done >= at:
            raise CutOffError

    cuts = 0
    try:
        await store.restore_context_state(data, on_progress=cut)
    except CutOffError:
        cuts = 1
        assert await restore_under_way(hf.connection) == data.info.digest
        await store.restore_context_state(data)
    assert await restore_under_way(hf.connection) is None
    return cuts


async def _check(hf: Holdfast, data: CheckpointData, before: list[Acknowledged], folder: Path) -> None:
    events = await _events(hf)
    versions = {f"key.{number}": await _versions(hf, f"key.{number}") for number in range(KEYS)}
    for record in before:
        if record.kind == "event":
            assert record.name in events, f"event {record.name} was acknowledged and is lost"
        elif record.kind == "version":
            found = versions[record.name]
            assert record.version <= len(found), f"version {record.version} of {record.name} is lost"
            assert found[record.version - 1] == record.mark
    refs = [record.name for record in before if record.kind == "put"]
    marks = {record.name: record.mark for record in before if record.kind == "put"}
    for start in range(0, len(refs), 200):
        resolved = await hf.resolve_many(refs[start : start + 200])
        assert resolved.missing == [], "a context was acknowledged and is lost"
        for ref, context in resolved.found.items():
            assert context.body == body_of(marks[ref])
    # Nothing that is in the file is wrong, whether its writer knew of it or not.
    for row in events.values():
        assert row.data is not None
        assert row.context_ref is not None
        mark = msgspec.json.decode(row.data)["mark"]
        assert (await hf.resolve(row.context_ref)).body == body_of(mark)
    for key, found in versions.items():
        for number in range(1, len(found) + 1):
            assert (await hf.keys.get(key, number)).body == body_of(f"k{found[number - 1]}")
    assert (await Checkpoints(hf).verify_context_checkpoint(data)).ok
    async with running(hf.connection.target.url, settings_in(folder)):
        await flush(hf.connection)
        report = await verify(folder / "lake", hf.connection)
        assert report.violations == []


async def _events(hf: Holdfast) -> dict[str, EventRow]:
    info = await stream_info(hf.connection, EVENTS_STREAM)
    reader = StreamReader(hf.connection, EVENTS_STREAM, max(1, info.first_seq))
    rows: dict[str, EventRow] = {}
    while reader.next_seq <= info.last_seq:
        for message in (await reader.read(limit=1_000))[0]:
            row = decode_event(message).row
            assert row.id not in rows, f"event {row.id} is there twice"
            rows[row.id] = row
    await reader.close()
    return rows


async def _versions(hf: Holdfast, key: str) -> list[str | None]:
    """The marks of a key's versions, oldest first, which have no gap."""
    found = [version async for version in hf.keys.history(key)]
    assert [version.version for version in found] == list(range(len(found), 0, -1))
    return [version.change_type for version in reversed(found)]


@asynccontextmanager
async def _writer(url: str, namespace: str, tasks: int) -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", MODULE, "--write", url, namespace, str(tasks)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help="where the servers keep their data; a folder in /tmp unless given")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
    if chosen.write:
        url, namespace, tasks = chosen.write
        asyncio.run(write_for_ever(url, namespace, int(tasks)))
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-campaign-") as folder:
        outcome = asyncio.run(campaign(chosen.data or Path(folder), chosen.rounds, chosen.seed, is_told=True))
    tell(f"seed {chosen.seed}: {msgspec.json.encode(outcome).decode()}; nothing lost, doubled or wrong")


if __name__ == "__main__":
    main()
