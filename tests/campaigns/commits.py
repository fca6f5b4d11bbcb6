"""Commits of twenty keys by a client that is killed again and again, while another one writes single keys::

    python -m tests.campaigns.commits --kills 1000 --seed 7

After each kill the whole stream since the last one is read: each commit is on all its keys or on none, its versions
stand together, every chain is without gaps, and what was acknowledged is there, once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import Holdfast, connect
from holdfast.schemas.errors import NotFoundError, VersionConflictError
from holdfast.streams.decode import decode_key_version
from holdfast.streams.pull import StreamReader
from holdfast.streams.wire import KEYS_STREAM
from tests.campaigns.rig import tell
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from holdfast.schemas.rows import KeyVersionRow

MODULE: Final = "tests.campaigns.commits"
ROOT: Final = Path(__file__).parents[2]
COUNT: Final = 20
KEYS: Final = [f"order.{number}" for number in range(COUNT)]
MESSAGES: Final = 2 * COUNT
"""Of one commit: bodies and versions."""

LONGEST_S: Final = 0.08
"""How long a client lives at most: some commits."""

_SETTLE_S: Final = 2.0
"""How long the server may work on what a dead client has sent."""


class Command(msgspec.Struct):
    """What a client is to do: commit under this name, and die by itself at a message, half sent, if there is one."""

    name: str
    seed: int
    dies_at: int | None = None


# The client that is killed: forked from a process that has everything imported, since it lives for some milliseconds.


def serve_clients(url: str, namespace: str) -> None:
    """Forks a client for each command that comes, and tells how it ended."""
    for line in sys.stdin.buffer:
        command = msgspec.json.decode(line, type=Command)
        child = os.fork()
        if not child:
            try:
                asyncio.run(commit_for_ever(url, namespace, command))
            finally:
                os._exit(1)
        _print(f"pid {child}")
        _, status = os.waitpid(child, 0)
        _print(f"end {os.waitstatus_to_exitcode(status)}")


async def commit_for_ever(url: str, namespace: str, command: Command) -> None:
    """Commits all keys, again and again; tells each name before and after."""
    choice = random.Random(command.seed)
    async with connect(url, namespace, "committer") as hf:
        if command.dies_at is not None:
            _die_at(hf, command.dies_at)
        _print("ready")
        number = 0
        while True:
            number += 1
            name = f"{command.name}.{number}"
            gone = choice.sample(KEYS, choice.choice((0, 0, 3)))
            bodies = {key: {"commit": name, "n": n} for n, key in enumerate(KEYS) if key not in gone}
            expected: dict[str, int] = {}
            if choice.random() < 0.3:
                key = choice.choice(list(bodies))
                head = await hf.keys.head(key)
                expected[key] = 0 if head is None or head.deleted else head.version
            try:
                await hf.keys.commit(bodies, expected, deletes=gone, change_type=name)
            except (VersionConflictError, NotFoundError):
                _print(f"not {name}")
            else:
                _print(f"ack {name}")


def _die_at(hf: Holdfast, message: int) -> None:
    """Has the process kill itself before it sends its nth message; what came before is on its way to the server."""
    lean = hf.connection.lean
    publish, sent = lean.publish, 0

    async def publish_or_die(subject: str, *args: Any, **options: Any) -> None:
        nonlocal sent
        if subject.startswith("$KV."):
            sent += 1
            if sent == message:
                await hf.connection.client.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        await publish(subject, *args, **options)

    vars(lean)["publish"] = publish_or_die


async def compete(url: str, namespace: str, seed: int) -> None:
    """Writes single keys until its input ends; tells each write that was acknowledged."""
    choice = random.Random(seed)
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    number = 0
    async with connect(url, namespace, "competitor") as hf:
        while not ended.done():
            number += 1
            key, name = choice.choice(KEYS), f"single.{number}"
            if choice.random() < 0.5:
                await hf.keys.put(key, {"single": number}, change_type=name)
            else:
                await hf.keys.patch(key, {"single": number}, change_type=name)
            _print(f"ack {name}")
            await asyncio.sleep(choice.uniform(0.0, 0.03))


def _print(line: str) -> None:
    # One write: a process that is killed has told the line or has not.
    os.write(1, f"{line}\n".encode())


# The one who kills, and checks.


class Ledger:
    """Everything that stands in the stream, read as it comes."""

    def __init__(self, hf: Holdfast) -> None:
        self._reader = StreamReader(hf.connection, KEYS_STREAM, 1)
        self.versions: dict[str, int] = dict.fromkeys(KEYS, 0)
        self.names: Counter[str] = Counter()
        self.rows: dict[str, list[KeyVersionRow]] = {}
        self.commits = 0

    async def read(self) -> list[str]:
        """Reads on; returns the names of new commits that stand there in part."""
        while True:
            messages, _ = await self._reader.read(limit=1_000)
            if not messages:
                break
            for message in messages:
                self._add(decode_key_version(message))
        for name, rows in list(self.rows.items()):
            if len(rows) == COUNT:
                self._check_whole(name, rows)
                del self.rows[name]
        return list(self.rows)

    async def close(self) -> None:
        await self._reader.close()

    def _add(self, row: KeyVersionRow) -> None:
        self.versions[row.key] += 1
        assert row.version == self.versions[row.key], f"{row.key} has {row.version} after {self.versions[row.key] - 1}"
        assert row.change_type is not None
        if row.change_type.startswith("single."):
            self.names[row.change_type] += 1
            assert self.names[row.change_type] == 1, f"{row.change_type} was written twice"
        else:
            assert row.change_type not in self.names, f"{row.change_type} goes on after its {COUNT} versions"
            self.rows.setdefault(row.change_type, []).append(row)

    def _check_whole(self, name: str, rows: list[KeyVersionRow]) -> None:
        self.commits += 1
        self.names[name] += 1
        assert {row.key for row in rows} == set(KEYS), f"{name} is twice on a key"
        first = rows[0].seq
        assert [row.seq for row in rows] == list(range(first, first + COUNT)), f"{name} does not stand together"


class Outcome(msgspec.Struct):
    """What a campaign came to."""

    kills: int = 0
    commits: int = 0
    acknowledged: int = 0
    unanswered: int = 0
    """Commits that are there, though their client died before it knew."""
    singles: int = 0


async def campaign(data: Path, kills: int, seed: int, *, is_told: bool = False) -> Outcome:
    """Kills that many clients; raises AssertionError when a commit is there in part, or anything is lost or doubled."""
    server = OwnServer(data / "nats")
    await server.start()
    namespace = f"c{uuid.uuid4().hex}"
    choice = random.Random(seed)
    outcome = Outcome()
    began = time.perf_counter()
    acknowledged: set[str] = set()
    try:
        async with (
            connect(server.url, namespace, "checker", cache_bytes=0) as hf,
            _process("--compete", server.url, namespace, str(seed)) as competitor,
            _process("--serve", server.url, namespace) as clients,
        ):
            singles = asyncio.create_task(_acknowledged(competitor))
            ledger = Ledger(hf)
            for number in range(kills):
                acknowledged |= await _kill_one(clients, f"c{number}", choice)
                await _settled(ledger, f"seed {seed}, kill {number}")
                outcome.kills += 1
                if number % 50 == 0:
                    await _check_by_client(hf, ledger)
                if is_told and (number + 1) % 50 == 0:
                    elapsed_s = time.perf_counter() - began
                    tell(f"{number + 1} of {kills} kills, {ledger.commits} commits whole, {elapsed_s:.0f} s")
            assert competitor.stdin is not None
            competitor.stdin.close()
            written = await asyncio.wait_for(singles, LIMIT_S)
            await _settled(ledger, f"seed {seed}, the end")
            await _check_by_client(hf, ledger)
            await ledger.close()
        assert not (acknowledged | written) - set(ledger.names), "what was acknowledged is lost"
    finally:
        await server.stop()
    outcome.commits = ledger.commits
    outcome.acknowledged = len(acknowledged)
    outcome.unanswered = ledger.commits - len(acknowledged)
    outcome.singles = len(written)
    return outcome


async def _kill_one(clients: asyncio.subprocess.Process, name: str, choice: random.Random) -> set[str]:
    """Has a client commit until it is killed; returns the commits that it knew of."""
    assert clients.stdin is not None
    assert clients.stdout is not None
    # Half of them die in the middle of a commit's messages, half at any time.
    dies_at = choice.randint(1, 3 * MESSAGES) if choice.random() < 0.5 else None
    lives_s = choice.uniform(0.0, LONGEST_S)
    command = Command(name, choice.randrange(2**31), dies_at)
    clients.stdin.write(msgspec.json.encode(command) + b"\n")
    known: set[str] = set()
    pid = 0
    killer: asyncio.TimerHandle | None = None
    async with asyncio.timeout(LIMIT_S):
        while True:
            what, _, said = (await clients.stdout.readline()).decode().strip().partition(" ")
            if what == "pid":
                pid = int(said)
            elif what == "ready" and dies_at is None:
                killer = asyncio.get_running_loop().call_later(lives_s, _kill, pid)
            elif what == "ack":
                known.add(said)
            elif what == "end":
                assert int(said) == -signal.SIGKILL, f"the client ended with {said}"
                break
            else:
                assert what in ("ready", "not"), f"the client said {what!r}"
    if killer is not None:
        killer.cancel()
    return known


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _settled(ledger: Ledger, when: str) -> None:
    """Reads what there is; what the server was still storing when it was read is whole a moment later."""
    until = time.monotonic() + _SETTLE_S
    while torn := await ledger.read():
        assert time.monotonic() < until, f"{when}: {torn} stand on {[len(ledger.rows[name]) for name in torn]} keys"
        await asyncio.sleep(0.01)


async def _check_by_client(hf: Holdfast, ledger: Ledger) -> None:
    """What the SDK tells of every key is what stands in the stream."""
    for key in KEYS:
        numbers: list[int] = []
        names: Counter[str | None] = Counter()
        async for version in hf.keys.history(key):
            numbers.append(version.version)
            names[version.change_type] += 1
        assert numbers == list(range(len(numbers), 0, -1))
        assert len(numbers) >= ledger.versions[key]
        assert set(names.values()) <= {1}


async def _acknowledged(competitor: asyncio.subprocess.Process) -> set[str]:
    assert competitor.stdout is not None
    return {line.decode().split()[1] async for line in competitor.stdout}


@asynccontextmanager
async def _process(*arguments: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", MODULE, *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help="where the server keeps its data; a folder in /tmp unless given")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--compete", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
    if chosen.serve:
        serve_clients(*chosen.serve)
    elif chosen.compete:
        url, namespace, seed = chosen.compete
        asyncio.run(compete(url, namespace, int(seed)))
    else:
        with contextlib.ExitStack() as stack:
            data = chosen.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-campaign-")))
            outcome = asyncio.run(campaign(data, chosen.kills, chosen.seed, is_told=True))
        tell(f"seed {chosen.seed}: {msgspec.json.encode(outcome).decode()}; every commit whole or absent")


if __name__ == "__main__":
    main()
