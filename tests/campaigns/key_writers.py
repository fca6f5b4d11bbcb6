"""Many writers from several processes patch distinct fields of one key; every patch must be a version of its own::

python -m tests.campaigns.key_writers --rounds 20 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client import Holdfast, connect
from tests.campaigns.rig import Rig, tell

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyValue

MODULE: Final = "tests.campaigns.key_writers"
ROOT: Final = Path(__file__).parents[2]
KEY: Final = "shared.by.all"
PROCESSES: Final = 4
TASKS: Final = 16
FIELDS: Final = 1_000
_AT_ONCE: Final = 64


async def write(url: str, namespace: str, fields: Sequence[int], tasks: int) -> dict[int, int]:
    """Patches each field into the key, from many tasks; returns the version that each one became."""
    left = list(fields)
    written: dict[int, int] = {}
    async with connect(url, namespace, "writer") as hf:

        async def work() -> None:
            while left:
                field = left.pop()
                version = await hf.keys.patch(KEY, {f"f{field}": field}, change_type=str(field))
                written[field] = version.version

        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(work())
    return written


async def write_in_processes(url: str, namespace: str, seed: int) -> dict[int, int]:
    """Has several processes write all fields; returns the version that each field became."""
    fields = list(range(FIELDS))
    random.Random(seed).shuffle(fields)
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULE, "--write", url, namespace),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(PROCESSES)
    ]
    outputs = await asyncio.gather(
        *(process.communicate(msgspec.json.encode(fields[n::PROCESSES])) for n, process in enumerate(processes))
    )
    assert [process.returncode for process in processes] == [0] * PROCESSES
    written: dict[int, int] = {}
    for output, _ in outputs:
        written |= msgspec.json.decode(output, type=dict[int, int])
    return written


async def check(hf: Holdfast, written: Mapping[int, int]) -> None:
    """Every field is a version of its own, there is no other, and each one can be read by its number."""
    assert sorted(written) == list(range(FIELDS))
    assert sorted(written.values()) == list(range(1, FIELDS + 1))
    newest = await hf.keys.get(KEY)
    assert newest.version == FIELDS
    assert newest.body == {f"f{field}": field for field in range(FIELDS)}
    history = [version async for version in hf.keys.history(KEY)]
    assert [version.version for version in history] == list(range(FIELDS, 0, -1))
    assert {int(version.change_type or -1): version.version for version in history} == written
    assert len({version.event_id for version in history}) == FIELDS
    numbers = list(range(1, FIELDS + 1))
    values: list[KeyValue] = []
    for start in range(0, FIELDS, _AT_ONCE):
        values += await asyncio.gather(*(hf.keys.get(KEY, number) for number in numbers[start : start + _AT_ONCE]))
    field_of = {version: field for field, version in written.items()}
    before: dict[str, int] = {}
    for number, value in zip(numbers, values, strict=True):
        assert value.version == number
        before[f"f{field_of[number]}"] = field_of[number]
        # Exactly one field more than the version before.
        assert value.body == before, f"version {number}"


async def trial(rig: Rig, seed: int, is_told: bool = False) -> None:
    """Writes, and checks in all three states: hot, archived, and with the hot tier emptied."""

    def say(what: str) -> None:
        if is_told:
            tell(f"  {what} after {time.perf_counter() - began:.1f} s")

    began = time.perf_counter()
    namespace = f"w{uuid.uuid4().hex}"
    written = await write_in_processes(rig.server.url, namespace, seed)
    say("written")
    async with AsyncExitStack() as stack:

        async def fresh() -> Holdfast:
            return await stack.enter_async_context(connect(rig.server.url, namespace, "reader", cache_bytes=0))

        await check(await fresh(), written)
        say("checked hot")
        await rig.archive()
        await check(await fresh(), written)
        say("checked archived")
        assert await rig.evict() > 0
        assert await rig.trim(ahead_s=2 * 86_400.0) >= FIELDS - 1
        hf = await fresh()
        await check(hf, written)
        say("checked trimmed")
        # The chain goes on from what is left.
        assert (await hf.keys.patch(KEY, {"more": True})).version == FIELDS + 1


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", nargs=2, metavar=("URL", "NAMESPACE"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.write:
        fields = msgspec.json.decode(sys.stdin.buffer.read(), type=list[int])
        sys.stdout.buffer.write(msgspec.json.encode(await write(chosen.write[0], chosen.write[1], fields, TASKS)))
        return
    rig = Rig()
    await rig.start()
    try:
        for number in range(chosen.rounds):
            tell(f"round {number + 1} of {chosen.rounds}, seed {chosen.seed + number}")
            await trial(rig, chosen.seed + number, is_told=True)
    finally:
        await rig.stop()
    tell(f"{chosen.rounds} rounds of {PROCESSES * TASKS} writers and {FIELDS} fields: nothing lost, nothing doubled")


if __name__ == "__main__":
    asyncio.run(main())
