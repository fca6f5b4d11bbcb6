"""A refusal that proves nothing.

When the nodes of a cluster find together again, the leader that was cut off does not know for a moment that it was
deposed.  It hears what is published, as the new leader does, and refuses at once by what it has in flight itself; the
new one stores the message.  Here a client answers in the place of the old leader, and the server's stream is told not
to acknowledge (it stores and is silent), or not to listen for a while (nothing is stored).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
import nats
import pytest
import pytest_asyncio

from holdfast.schemas.errors import InvalidFieldError
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.dead import bury
from holdfast.streams.key_chains import Head
from holdfast.streams.key_log import KeyLog, LostRaceError, NewVersion
from holdfast.streams.messages import StoredMessage
from holdfast.streams.topology import ensure_topology
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, KEYS_STREAM
from tests.key_support import a_version

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from tests.support import OwnServer

REFUSAL = b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 7"},"stream":"S","seq":0}'


class OldLeader:
    """Refuses what is published on a subject."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.refused = 0
        self.when_refused: Callable[[int], Awaitable[None]] | None = None

    async def listen(self, subject: str) -> None:
        await self._client.subscribe(subject, cb=self._refuse)
        await self._client.flush()

    async def _refuse(self, message: Msg) -> None:
        if not message.reply:
            return
        self.refused += 1
        if self.when_refused is not None:
            await self.when_refused(self.refused)
        await message.respond(REFUSAL)

    async def configure(self, stream: str, **changes: object) -> None:
        """Changes the configuration of a stream, as nobody but a test would."""
        js = self._client.jetstream()
        config = (await js.stream_info(stream)).config.as_dict() | changes
        reply = await self._client.request(f"$JS.API.STREAM.UPDATE.{stream}", msgspec.json.encode(config), timeout=5)
        assert b'"error"' not in reply.data, reply.data

    async def messages(self, stream: str) -> int:
        return (await self._client.jetstream().stream_info(stream)).state.messages


@pytest_asyncio.fixture
async def connection(start_server: Callable[[], Awaitable[OwnServer]]) -> AsyncIterator[Connection]:
    server = await start_server()
    async with open_connection(server.url) as opened:
        await ensure_topology(opened)
        yield opened


@pytest_asyncio.fixture
async def old_leader(connection: Connection) -> AsyncIterator[OldLeader]:
    client = await nats.connect(connection.client.connected_url.geturl())  # type: ignore[union-attr]
    yield OldLeader(client)
    await client.close()


async def begun(connection: Connection, old_leader: OldLeader, **changes: object) -> KeyLog:
    """A key with one version, whose stream is then changed and refused for by the old leader."""
    log = KeyLog(connection, replicas=3)
    await log.write(NewVersion(a_version(1)), after=Head(last_seq=0))
    await old_leader.configure(KEYS_STREAM, **changes)
    await old_leader.listen("$KV.ctx-keys.>")
    return log


async def test_a_version_that_was_stored_and_refused_was_written(connection: Connection, old_leader: OldLeader) -> None:
    log = await begun(connection, old_leader, no_ack=True)
    row = a_version(2)
    written = await log.write(NewVersion(row), after=Head(last_seq=1))
    assert old_leader.refused
    assert (written.seq, written.event_id) == (2, row.event_id)
    assert await old_leader.messages(KEYS_STREAM) == 2
    await log.close()


async def test_versions_of_a_batch_that_were_stored_and_refused_were_written(
    connection: Connection, old_leader: OldLeader
) -> None:
    log = await begun(connection, old_leader, no_ack=True)
    written = await log.write_all(
        [
            (NewVersion(a_version(2)), Head(last_seq=1)),
            (NewVersion(a_version(3)), None),
            (NewVersion(a_version(1, key="other")), Head(last_seq=0)),
        ]
    )
    assert old_leader.refused
    assert [(row.key, row.version, row.seq) for row in written] == [("plan", 2, 2), ("plan", 3, 3), ("other", 1, 4)]
    assert await old_leader.messages(KEYS_STREAM) == 4
    await log.close()


async def test_what_nobody_stored_is_sent_again_until_somebody_does(
    connection: Connection, old_leader: OldLeader
) -> None:
    log = await begun(connection, old_leader, subjects=["elsewhere.>"])

    async def retire(refused: int) -> None:
        if refused == 3:
            await old_leader.configure(KEYS_STREAM, subjects=["$KV.ctx-keys.>"], no_ack=True)

    old_leader.when_refused = retire
    row = a_version(2)
    written = await log.write(NewVersion(row), after=Head(last_seq=1))
    assert old_leader.refused > 3
    assert (written.seq, written.event_id) == (2, row.event_id)
    assert await old_leader.messages(KEYS_STREAM) == 2
    await log.close()


async def test_a_race_is_lost_to_what_is_there_to_be_seen(connection: Connection, old_leader: OldLeader) -> None:
    log = KeyLog(connection, replicas=3)
    for number in (1, 2):
        await log.write(NewVersion(a_version(number)), after=Head(last_seq=number - 1))
    with pytest.raises(LostRaceError):
        await log.write(NewVersion(a_version(2)), after=Head(last_seq=1))
    with pytest.raises(LostRaceError):
        await log.write_all(
            [(NewVersion(a_version(1, key="new")), Head(last_seq=0)), (NewVersion(a_version(2)), Head(last_seq=1))]
        )
    assert await old_leader.messages(KEYS_STREAM) == 2
    await log.close()


async def test_a_dead_letter_is_there_before_it_is_believed_to_be(
    connection: Connection, old_leader: OldLeader
) -> None:
    """What is set aside leaves its stream: its letter must not be missing."""
    message = StoredMessage("ctx.default.event.a.b", {}, b"{", 7, 1, "epoch")
    error = InvalidFieldError("no JSON", field="payload")
    await old_leader.configure(DEAD_STREAM, subjects=["elsewhere.>"])
    await old_leader.listen("ctx.default.dead.>")

    async def retire(refused: int) -> None:
        if refused == 2:
            await old_leader.configure(DEAD_STREAM, subjects=["ctx.*.dead.>"], no_ack=True)

    old_leader.when_refused = retire
    assert not await bury(connection, EVENTS_STREAM, message, error)
    assert old_leader.refused > 2
    assert await old_leader.messages(DEAD_STREAM) == 1
