"""A producer that knows nothing of the SDK: plain nats-py, subjects and headers written out."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client

from holdfast.ops.torture.history import Attempt, HistoryWriter, Via
from holdfast.ops.torture.load import CONTEXT_KIND, EVENT_NAME, Producer
from holdfast.ops.torture.plain import STREAMS, canonical, ref_of
from holdfast.schemas.errors import UnavailableError

_TIMEOUT_S: Final = 3.0
_OCCUPIED: Final = (10071, 10077)
"""The subject holds a message already."""
_RETRYABLE: Final = (10164, 10167, 10008, 10076, 10174)
_PENDING_BYTES: Final = 256 * 1024
"""A publish may be sent long after it timed out, when the server is back: then it is unknown, as it is noted."""


@asynccontextmanager
async def connected(url: str, name: str) -> AsyncGenerator[Client]:
    """Yields a client as anybody would open one, who does not give up; raises UnavailableError when none answers."""

    async def ignore(_error: Exception) -> None:
        """Errors of the connection come back as what the calls raise."""

    client = Client()
    try:
        await client.connect(
            url.split(","),
            name=name,
            allow_reconnect=True,
            max_reconnect_attempts=3,
            reconnect_time_wait=0.1,  # type: ignore[arg-type]  # seconds for asyncio.sleep
            pending_size=_PENDING_BYTES,
            error_cb=ignore,
        )
    except (OSError, nats.errors.Error, TimeoutError) as error:
        await client.close()
        raise UnavailableError(f"no NATS server answers at {url}") from error
    client.options["max_reconnect_attempts"] = -1
    try:
        yield client
    finally:
        await client.close()


class RawProducer(Producer):
    """Writes contexts, events (with contexts inline, too) and versions of keys by hand."""

    via: Via = "raw"

    def __init__(self, client: Client, writer: HistoryWriter, producer: str, seed: int, **options: Any) -> None:
        # A message holds a whole body: nobody splits it for a raw client.
        options["large_one_in"] = 0
        super().__init__(writer, producer, seed, **options)
        self._js = client.jetstream(timeout=_TIMEOUT_S)

    async def step(self, choice: random.Random) -> None:
        """Stores one message, of a key two."""
        kind = choice.choice(self.kinds)
        if kind == "context":
            await self._put()
        elif kind == "event":
            await self._emit(is_inline=choice.random() < 0.3)
        else:
            await self._change_key(choice)

    def _is_expected(self, error: Exception) -> bool:
        return isinstance(error, nats.errors.Error | TimeoutError | OSError)

    async def _put(self) -> None:
        attempt, body = self.next_context()
        self.writer.begin(attempt)
        await self._noted(attempt, lambda: self._store(attempt.id, body))

    async def _emit(self, *, is_inline: bool) -> None:
        attempt, data = self.next_event()
        message: dict[str, Any] = {"id": attempt.id, "data": data, "session_id": self.producer}
        if is_inline:
            # The reference of what comes inline is that of its text as it stands in the message.
            ref = ref_of(self.namespace, "event", canonical(data))
            message["context"] = data
            attempt = msgspec.structs.replace(attempt, context=ref)
        elif attempt.context is not None:
            message["context_ref"] = attempt.context
        subject = f"ctx.{self.namespace}.event.{self.producer}.{EVENT_NAME.replace(':', '.')}"
        headers = {"Nats-Msg-Id": f"{self.namespace}.{attempt.id}"}

        async def publish() -> int:
            return (await self._js.publish(subject, canonical(message), headers=headers)).seq

        self.writer.begin(attempt)
        await self._noted(attempt, publish)

    async def _change_key(self, choice: random.Random) -> None:
        attempt, body = self.next_key(choice)
        self.writer.begin(attempt)
        subject = f"$KV.ctx-keys.{self.namespace}.{attempt.id}"
        event_id = str(uuid.UUID(int=choice.getrandbits(128), version=4))
        seq = 0
        try:
            ref = ref_of(self.namespace, CONTEXT_KIND, body)
            await self._store(ref, body)
            seq, version = await self._head(subject)
            message = {
                "version": version + 1,
                "op": "put",
                "ref": ref,
                "event_id": event_id,
                "timestamp_ms": time.time_ns() // 1_000_000,
                "change_type": attempt.op,
            }
            ack = await self._js.publish(
                subject,
                canonical(message),
                headers={"Nats-Expected-Last-Subject-Sequence": str(seq)},
            )
        except nats.js.errors.APIError as error:
            # In a cluster, a leader that was deposed and does not know it refuses what the new one stores.
            if error.err_code in _OCCUPIED and await self._is_taken(subject, seq, event_id):
                self.writer.refused(attempt.op, error)
            else:
                self.note_error([attempt], error)
        except Exception as error:  # noqa: BLE001  whatever it is, it is noted
            self.note_error([attempt], error)
        else:
            self.note_acknowledged(attempt, seq=ack.seq, version=version + 1)

    async def _is_taken(self, subject: str, seq: int, event_id: str) -> bool:
        """Whether a version of somebody else stands behind a sequence, where ours can never come any more."""
        try:
            found = await self._js.get_msg(STREAMS["key_versions"], seq=seq + 1, subject=subject, next=True)
        except (nats.errors.Error, OSError, TimeoutError):
            return False
        return bool(json.loads(found.data or b"{}").get("event_id") != event_id)

    async def _head(self, subject: str) -> tuple[int, int]:
        """The sequence and the version of a key's newest message; zeros when it has none."""
        try:
            found = await self._js.get_last_msg(STREAMS["key_versions"], subject)
        except nats.js.errors.NotFoundError:
            return 0, 0
        return found.seq or 0, json.loads(found.data or b"{}")["version"]

    async def _store(self, ref: str, body: bytes) -> int | None:
        digest = ref.rpartition("_")[2]
        subject = f"$KV.ctx-hot.{self.namespace}.{digest}"
        try:
            ack = await self._js.publish(subject, body, headers={"Hf-Kind": CONTEXT_KIND})
        except nats.js.errors.APIError as error:
            if error.err_code not in _OCCUPIED:
                raise
            # An earlier attempt without an answer has stored it: by its name it can be nothing else, and is compared.
            found = await self._js.get_last_msg(STREAMS["contexts"], subject)
            if found.data != body:
                raise
            return found.seq
        return ack.seq

    async def _noted(self, attempt: Attempt, send: Callable[[], Awaitable[int | None]]) -> None:
        try:
            seq = await send()
        except nats.js.errors.APIError as error:
            if error.err_code in _RETRYABLE or error.code == 503:
                self.note_error([attempt], error, send)
            else:
                self.writer.refused(attempt.op, error)
        except Exception as error:  # noqa: BLE001  whatever it is, it is noted
            self.note_error([attempt], error, send)
        else:
            self.note_acknowledged(attempt, seq=seq)
