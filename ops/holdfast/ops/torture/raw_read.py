"""The streams as anybody may read them: plain nats-py, message by message, by sequence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import nats
import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from holdfast.ops.torture.plain import (
    EPOCH,
    EPOCH_START,
    STREAMS,
    UnreadableError,
    body_of_message,
    canonical,
    digest_text,
    plain_payload,
    ref_of,
)
from holdfast.ops.torture.seen import MISSING, Placed, SeenEvent, SeenVersion, View

if TYPE_CHECKING:
    from nats.aio.client import Client

_FETCH: Final = 500
_TIMEOUT_S: Final = 10.0


class Info(msgspec.Struct, frozen=True):
    """What a stream says of itself."""

    epoch: str
    first_seq: int
    last_seq: int
    messages: int
    epoch_start: int = 1
    """What stands before belongs to an earlier life of the stream, and is archived."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message as it is stored."""

    seq: int
    subject: str
    headers: Mapping[str, str]
    payload: bytes


class RawStreams:
    """What some streams held when they were read, of some namespaces; the rest is only counted as read."""

    def __init__(self, namespaces: Sequence[str]) -> None:
        self.infos: dict[str, Info] = {}
        self._namespaces = set(namespaces)
        self._contexts: list[tuple[int, str, str]] = []
        self._events: list[tuple[int, str, str, str | None]] = []
        self._versions: list[tuple[int, str, int, str | None, str | None]] = []
        self.placed: list[Placed] = []
        self.errors: list[str] = []

    def view(self, *, is_whole: bool, above: Mapping[str, int] | None = None) -> View:
        """Returns what the streams show, of each only what stands above a sequence."""
        floor = dict.fromkeys(STREAMS.values(), 0) | dict(above or {})
        view = View(is_whole=is_whole, errors=list(self.errors))
        contexts, events, keys = (floor[STREAMS[table]] for table in ("contexts", "events", "key_versions"))
        view.contexts = [(ref, found) for seq, ref, found in self._contexts if seq > contexts]
        bodies = {ref: found for _, ref, found in self._contexts}
        view.events = [
            SeenEvent(identity, found, context, seq) for seq, identity, found, context in self._events if seq > events
        ]
        view.versions = [
            SeenVersion(key, version, ref, "" if ref is None else bodies.get(ref, MISSING), change)
            for seq, key, version, ref, change in self._versions
            if seq > keys
        ]
        return view

    def add_contexts(self, messages: Sequence[Message], chunks: Mapping[str, bytes]) -> None:
        """Takes in the messages of the hot tier; ``chunks`` are those that have left it."""
        hot: dict[str, Message] = {}
        for message in messages:
            namespace, digest = message.subject.split(".")[2:4]
            if namespace in self._namespaces:
                hot[digest] = message

        def find(digest: str) -> bytes | None:
            message = hot.get(digest)
            return chunks.get(digest) if message is None else plain_payload(message.headers, message.payload)

        for digest, message in hot.items():
            namespace = message.subject.split(".")[2]
            kind = "chunk" if message.headers.get("Hf-Form") == "chunk" else message.headers.get("Hf-Kind")
            self._place("contexts", message.seq, f"ctx_{kind}_{digest}")
            try:
                found = body_of_message(namespace, digest, message.headers, message.payload, find)
            except (UnreadableError, ValueError, KeyError) as error:
                self.errors.append(f"{STREAMS['contexts']} {message.seq} {message.subject}: {error}")
                continue
            if found is not None:
                self._contexts.append((message.seq, found[0], digest_text(found[1])))

    def add_event(self, message: Message) -> None:
        """Takes in one message of the event log."""
        namespace = message.subject.split(".")[1]
        if namespace not in self._namespaces:
            return
        try:
            members = json.loads(message.payload)
            identity = members.get("id") or message.headers["Nats-Msg-Id"].partition(".")[2]
            context = members.get("context_ref")
            if context is None and "context" in members:
                context = ref_of(namespace, "event", canonical(members["context"]))
        except (ValueError, KeyError, AttributeError) as error:
            self.errors.append(f"{STREAMS['events']} {message.seq} {message.subject}: {error!r}")
            return
        self._events.append((message.seq, identity, digest_text(canonical(members.get("data"))), context))
        self._place("events", message.seq, identity)

    def add_version(self, message: Message) -> None:
        """Takes in one version of a key."""
        _, _, namespace, key = message.subject.split(".", 3)
        if namespace not in self._namespaces:
            return
        try:
            members = json.loads(message.payload)
            version, ref = members["version"], members.get("ref")
            self._versions.append((message.seq, key, version, ref, members.get("change_type")))
            identity = f"{key}@{version}:{ref or members['op']}"
        except (ValueError, KeyError, TypeError) as error:
            self.errors.append(f"{STREAMS['key_versions']} {message.seq} {message.subject}: {error!r}")
            return
        self._place("key_versions", message.seq, identity)

    def _place(self, table: str, seq: int, identity: str) -> None:
        info = self.infos[STREAMS[table]]
        # What stands before the epoch's start has its place in an earlier one, which nothing here says.
        if seq >= info.epoch_start:
            self.placed.append(Placed(STREAMS[table], info.epoch, seq, identity, "stream"))


async def read_streams(url: str, namespaces: Sequence[str], *, chunks: Mapping[str, bytes]) -> RawStreams:
    """Reads all three streams from their first message to what was their last when the reading began."""
    raw = RawStreams(namespaces)
    client = await nats.connect(url.split(","), name="torture-observer", connect_timeout=5, max_reconnect_attempts=20)
    try:
        for stream in STREAMS.values():
            raw.infos[stream] = await stream_state(client, stream)
        contexts = await _read_all(client, STREAMS["contexts"], raw.infos[STREAMS["contexts"]].last_seq)
        raw.add_contexts(contexts, chunks)
        for message in await _read_all(client, STREAMS["events"], raw.infos[STREAMS["events"]].last_seq):
            raw.add_event(message)
        for message in await _read_all(client, STREAMS["key_versions"], raw.infos[STREAMS["key_versions"]].last_seq):
            raw.add_version(message)
    finally:
        await client.close()
    return raw


async def stream_state(client: Client, stream: str) -> Info:
    """Returns the state of a stream."""
    answer: Any = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=_TIMEOUT_S)).data)
    if "error" in answer:
        raise UnreadableError(f"stream {stream}: {answer['error']}")
    state: dict[str, Any] = answer["state"]
    metadata: dict[str, str] = answer["config"].get("metadata", {})
    start = int(metadata.get(EPOCH_START, 1))
    return Info(metadata.get(EPOCH, ""), state["first_seq"], state["last_seq"], state["messages"], start)


async def _read_all(client: Client, stream: str, up_to: int) -> list[Message]:
    if not up_to:
        return []
    subscription = await client.jetstream(timeout=_TIMEOUT_S).pull_subscribe(
        "",
        stream=stream,
        config=ConsumerConfig(ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL, mem_storage=True),
    )
    found: list[Message] = []
    try:
        while True:
            try:
                page = await subscription.fetch(_FETCH, timeout=1.0 if found else _TIMEOUT_S)
            except (TimeoutError, nats.errors.TimeoutError):
                return found
            for message in page:
                seq = message.metadata.sequence.stream
                if seq > up_to:
                    return found
                found.append(Message(seq, message.subject, message.headers or {}, message.data))
            if page and not page[-1].metadata.num_pending:
                return found
    finally:
        await subscription.unsubscribe()
