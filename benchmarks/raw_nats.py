"""The raw limits on NATS: plain nats-py and nothing of Holdfast.

``OwnInbox`` is the leanest request loop that nats-py's public API allows: one subscription, counter tokens, a future
a request; no deadline for each, no retry.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import nats

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

API_S: Final = 30.0
_PULL: Final = 5_000
_NO_LIMIT: Final = 0


class Message(NamedTuple):
    """A message to be stored, as its bytes stand on the wire."""

    subject: str
    headers: dict[str, str]
    payload: bytes


class _Ack(msgspec.Struct):
    count: int = 0
    seq: int = 0
    error: dict[str, Any] | None = None


_ACK: Final = msgspec.json.Decoder(_Ack)


@asynccontextmanager
async def plain_client(url: str) -> AsyncGenerator[Client]:
    """A nats-py client as anybody would open one."""
    client = await nats.connect(url, allow_reconnect=False)
    try:
        yield client
    finally:
        await client.close()


async def api(client: Client, subject: str, request: object = None) -> dict[str, Any]:
    """Calls the JetStream API; raises RuntimeError when it refuses."""
    payload = b"" if request is None else msgspec.json.encode(request)
    reply = await client.request(f"$JS.API.{subject}", payload, timeout=API_S)
    answer = msgspec.json.decode(reply.data, type=dict[str, Any])
    if "error" in answer:
        raise RuntimeError(f"{subject}: {answer['error']}")
    return answer


class AtomicBatches:
    """Atomic batches (ADR-50) by plain publishes and one request that commits."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._prefix = client.new_inbox().rpartition(".")[2]
        self._numbers = count(1)

    async def publish(self, messages: Sequence[Message]) -> None:
        """Stores the messages, all or none; raises RuntimeError when the server refuses."""
        batch = f"{self._prefix}-{next(self._numbers)}"
        last = len(messages)
        for number, message in enumerate(messages[:-1], start=1):
            headers = {**message.headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            await self._client.publish(message.subject, message.payload, headers=headers)
        message = messages[-1]
        headers = {
            **message.headers,
            "Nats-Batch-Id": batch,
            "Nats-Batch-Sequence": str(last),
            "Nats-Batch-Commit": "1",
        }
        reply = await self._client.request(message.subject, message.payload, timeout=API_S, headers=headers)
        ack = _ACK.decode(reply.data)
        if ack.error is not None or ack.count != last:
            raise RuntimeError(f"batch of {last}: {reply.data.decode()}")


class OwnInbox:
    """Requests over one subscription.  Use as a context manager."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._prefix = f"{client.new_inbox()}."
        self._skip = len(self._prefix)
        self._numbers = count(1)
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._gathering: dict[str, tuple[list[Msg], asyncio.Future[list[Msg]]]] = {}
        self._subscription: Any = None

    async def __aenter__(self) -> OwnInbox:
        self._subscription = await self._client.subscribe(
            f"{self._prefix}*", cb=self._receive, pending_msgs_limit=_NO_LIMIT, pending_bytes_limit=_NO_LIMIT
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._subscription.unsubscribe()

    async def request(self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None) -> Msg:
        """Sends a request and returns its reply."""
        token = str(next(self._numbers))
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        await self._client.publish(subject, payload, reply=self._prefix + token, headers=headers)
        return await future

    async def gather(self, subject: str, payload: bytes) -> list[Msg]:
        """Sends a batched direct get and returns the messages that come before its closing word."""
        token = str(next(self._numbers))
        future: asyncio.Future[list[Msg]] = asyncio.get_running_loop().create_future()
        self._gathering[token] = ([], future)
        await self._client.publish(subject, payload, reply=self._prefix + token)
        return await future

    async def _receive(self, message: Msg) -> None:
        token = message.subject[self._skip :]
        waiting = self._waiting.pop(token, None)
        if waiting is not None:
            waiting.set_result(message)
            return
        messages, future = self._gathering[token]
        if message.headers and "Nats-Subject" in message.headers:
            messages.append(message)
        else:
            del self._gathering[token]
            future.set_result(messages)


async def pull_all(client: Client, stream: str, number: int) -> list[Msg]:
    """Pulls the first ``number`` messages of a stream by an ephemeral consumer without acknowledgements."""
    name = f"bench{client.new_inbox().rpartition('.')[2]}"
    config = {"name": name, "ack_policy": "none", "deliver_policy": "all", "mem_storage": True, "num_replicas": 1}
    await api(client, f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config})
    inbox = client.new_inbox()
    messages: list[Msg] = []
    done = asyncio.Event()
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += min(_PULL, number - asked)
        request = msgspec.json.encode({"batch": min(_PULL, asked - len(messages)), "no_wait": True})
        await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", request, reply=inbox)

    async def receive(message: Msg) -> None:
        messages.append(message)
        if len(messages) == number:
            done.set()
        elif len(messages) == asked:
            await ask()

    subscription = await client.subscribe(
        inbox, cb=receive, pending_msgs_limit=_NO_LIMIT, pending_bytes_limit=_NO_LIMIT
    )
    try:
        await ask()
        await done.wait()
    finally:
        await subscription.unsubscribe()
        await api(client, f"CONSUMER.DELETE.{stream}.{name}")
    return messages
