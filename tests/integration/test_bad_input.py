"""Bad input of every kind, on every stream and every endpoint: a typed error or a dead letter, and all goes on (I7)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil
import pytest
import pytest_asyncio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client

from holdfast.client import Holdfast, connect
from holdfast.schemas import limits
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import HoldfastError, InputError, NotFoundError, TooLargeError
from holdfast.schemas.names import CHUNK_KIND, encode_token
from holdfast.schemas.refs import compute_digest, format_ref
from holdfast.streams.codec import seal
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, HOT_STREAM, KEYS_STREAM
from holdfast.workers.control import evict, flush
from holdfast.workers.system import RunningWorkers
from tests.running import dead_letters, own_server, put_version, running, settings_in
from tests.support import LIMIT_S, plain_client, raw_publish

if TYPE_CHECKING:
    from holdfast.streams.dead import DeadLetter

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = pytest.mark.asyncio(loop_scope="module")

Headers = dict[str, str]
Members = list[dict[str, object]]
EXAMPLES: Final = 800
DEEP: Final = b"[" * 65 + b"]" * 65


class System(msgspec.Struct):
    """A whole system, a plain client of it, and an SDK client."""

    url: str
    workers: RunningWorkers
    plain: Client
    hf: Holdfast

    async def store(self, subject: str, payload: bytes, headers: Headers | None = None) -> tuple[str, int]:
        """Stores a message with a plain client; returns its stream and sequence."""
        ack = await self.plain.jetstream().publish(subject, payload, headers=headers, timeout=LIMIT_S)
        return ack.stream, ack.seq

    async def letters(self) -> dict[tuple[str, int], DeadLetter]:
        return {(letter.stream, letter.seq): letter for letter in await dead_letters(self.hf)}

    async def check_well(self) -> None:
        """Every worker runs, and good requests of every kind work."""
        for name in ("archiver", "ingester", "compactor", "janitor", "resolver"):
            assert name in self.workers.counters()
        failed = asyncio.ensure_future(self.workers.wait_failed())
        await asyncio.sleep(0)
        assert not failed.done(), failed.result()
        failed.cancel()
        ref = await self.hf.put({"good": 1})
        event = await self.hf.emit("all:well", {"n": 1}, context=ref)
        assert [found.event_id async for found in self.hf.query(event_id=event.event_id)] == [event.event_id]
        await flush(self.hf.connection)
        await evict(self.hf.connection, 0.0)
        async with connect(self.url, self.hf.namespace, cache_bytes=0) as reader:
            assert (await reader.resolve(ref)).body == {"good": 1}
        # That much was set aside is told, and is what these tests do.
        assert [found for found in (await self.hf.health())["problems"] if found["object"] != DEAD_STREAM] == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[System]:
    data: Path = tmp_path_factory.mktemp("bad-input")
    async with (
        own_server(data) as server,
        running(server.url, settings_in(data)) as workers,
        plain_client(server.url) as plain,
        connect(server.url, "bad", "tester") as hf,
    ):
        yield System(server.url, workers, plain, hf)


# Messages on the streams


def wrong_values(*allowed: type) -> list[object]:
    """A value of every JSON type but the allowed ones; null is the same as absence."""
    return [value for value in (True, 1, 1.5, "x", [1], {"a": 1}) if type(value) not in allowed]


def one_each(names: Sequence[str], *values: object) -> Members:
    """Members of messages: each name with each value."""
    return [{name: value} for name in names for value in values]


def garbage_events() -> list[bytes]:
    texts = ("id", "event_id", "session_id", "correlation_id", "parent_event_id", "root_event_id", "client_id",
             "originator", "source_id")  # fmt: skip
    fields: Members = [{field: value} for field in texts for value in wrong_values(str)]
    fields += one_each(texts, "", "x" * (limits.ID_CHARS + 1))
    fields += one_each(["timestamp"], True, "yesterday", [1], {"a": 1}, -1, 10**30, "0000-01-01T00:00:00")
    fields += one_each(["event_depth"], *wrong_values(int), -1, 2**31, 2**70)
    fields += one_each(["context_ref"], *wrong_values())
    fields.append({"context": 1, "context_ref": "ctx_note_" + "a" * 32})
    kinds = one_each(["context_kind"], *wrong_values(str), "a b", "", "k" * 65, "é")
    fields += [{"context": 1} | members for members in kinds]
    fields += one_each(["v"], 2, 0, "1", [1])
    # An inline context counts as a part of its message: the message is what has the limit.
    over = json.dumps({"data": "x" * (limits.EVENT_BYTES - 11)}).encode()
    assert len(over) == limits.EVENT_BYTES + 1
    return [
        *(b"", b"{", b"null", b"1", b'"text"', b"[]", b"\xff\xfe", b'{"data":"\xff"}', b'{"a":1}{"b":2}'),
        *(b'{"data":NaN}', b'{"data":Infinity}', b"{'data':1}", b'{"session_id":"\\ud800"}', b'{"data":"\\ud800"}'),
        *(b'{"data":' + DEEP + b"}", b'{"context":' + DEEP + b"}", b"[" * 100_000, b'{"a":' * 100_000),
        b'{"timestamp":1e400}',
        over,
        *(json.dumps(members).encode() for members in fields),
    ]


def good_digest(body: bytes, kind: str = "note") -> str:
    return compute_digest("bad", kind, body)


def garbage_contexts() -> list[tuple[str, bytes, Headers]]:
    """(key, payload, headers) of messages in the hot tier that are no contexts."""
    kind = {"Hf-Kind": "note"}
    zipped = kind | {"Hf-Enc": "zstd"}
    frame = zstd.compress(b'"' + b"x" * 5_000 + b'"')
    garbage: list[tuple[str, bytes, Headers]] = []
    for number, (payload, headers) in enumerate(
        [
            (b"", {}),
            (b"1", {}),
            (b"not what its key says", kind),
            (b"1", {"Hf-Kind": "a b"}),
            (b"1", {"Hf-Kind": "k" * 65}),
            (b"1", kind | {"Hf-V": "9"}),
            (b"1", kind | {"Hf-Exp": "soon"}),
            (b"1", kind | {"Hf-Exp": "-1"}),
            (b"1", kind | {"Hf-Exp": "9" * 16}),
            (b"1", kind | {"Hf-Enc": "gzip"}),
            (b"1", kind | {"Hf-Enc": ""}),
            (b"1", kind | {"Hf-Form": "weird"}),
            (b"not a frame", zipped),
            (frame[:-5], zipped),
            (frame + b"more", zipped),
            (zstd.compress(b"\0" * (64 * limits.MIB)), zipped),
        ]
    ):
        garbage.append((f"bad.{good_digest(b'garbage %d' % number)}", payload, headers))
    # A digest of the body, but of another namespace, kind or content type than the message says.
    garbage.append((f"bad.{compute_digest('other', 'note', b'1')}", b"1", kind))
    garbage.append((f"bad.{good_digest(b'2')}", b"2", {"Hf-Kind": "other"}))
    garbage.append((f"bad.{good_digest(b'3')}", b"3", kind | {"Hf-Type": "text/plain"}))
    garbage += [(key, b"1", kind) for key in ("bad.short", "bad.UPPER", "bad.a.b", "onlyone", "x--zz." + "a" * 32)]
    return garbage


def garbage_versions() -> list[bytes]:
    good = {"version": 1, "op": "put"}
    texts = ("event_id", "changed_by", "change_type", "session_id", "agent_id", "source", "proposed_by", "approved_by")
    fields: Members = [{field: value} for field in texts for value in wrong_values(str)]
    # Far over any name: nothing of this size is a label.
    fields += one_each(texts, "x" * 100_000)
    fields += one_each(["version"], *wrong_values(int), -1, 2**63, 2**70)
    fields += one_each(["op"], *wrong_values(), "")
    fields += one_each(["ref"], *wrong_values())
    fields += one_each(["tags"], "x", 1, {"a": 1}, [1], [["x"]])
    times = ("timestamp_ms", "expires_at_ms", "approved_at_ms")
    fields += one_each(times, *wrong_values(int), -1, 2**63, 2**70)
    fields += one_each(["confidence"], *wrong_values(int, float))
    fields += one_each(["v"], 2, "1")
    return [
        *(b"", b"{", b"null", b"[]", b"\xff", b"{}", b'{"version":1}', b'{"op":"put"}', DEEP),
        *(b'{"version":1,"op":"put","confidence":NaN}', b'{"version":1,"op":"put","confidence":1e400}'),
        *(json.dumps(good | members).encode() for members in fields),
    ]


async def check_buried(system: System, stored: list[tuple[str, int]], payloads: list[bytes]) -> None:
    """Every message stored is a dead letter with its origin, its bytes and a reason, and nothing else is."""
    await flush(system.hf.connection)
    letters = await system.letters()
    wrongly_taken = [payload[:100] for place, payload in zip(stored, payloads, strict=True) if place not in letters]
    assert wrongly_taken == []
    for place, payload in zip(stored, payloads, strict=True):
        letter = letters[place]
        assert letter.payload == payload
        assert letter.code
        assert letter.reason
        assert (await stream_info(system.hf.connection, place[0])).epoch == letter.epoch
    assert (await system.hf.stats())["dead"] == len(letters)


async def test_every_kind_of_garbage_event_is_a_dead_letter(system: System) -> None:
    payloads = garbage_events()
    stored = [await system.store("ctx.bad.event.agent.x", payload) for payload in payloads]
    for subject in ("ctx.bad.event.x--zz.y", "ctx.x--.event.a.y", "ctx.bad.event.a." + "s." * 16 + "s"):
        stored.append(await system.store(subject, b"{}"))
        payloads.append(b"{}")
    assert {stream for stream, _ in stored} == {EVENTS_STREAM}
    await check_buried(system, stored, payloads)
    await system.check_well()


async def test_every_kind_of_garbage_context_is_a_dead_letter(system: System) -> None:
    garbage = garbage_contexts()
    stored = [await system.store(f"$KV.ctx-hot.{key}", payload, headers) for key, payload, headers in garbage]
    assert {stream for stream, _ in stored} == {HOT_STREAM}
    # Not one of them is an answer, hot or cold.
    for is_cold in (False, True):
        for key, _, _ in garbage:
            digest = key.rpartition(".")[2]
            if len(digest) == 32:
                with pytest.raises(HoldfastError):
                    await system.hf.resolve(format_ref("note", digest))
        if not is_cold:
            await check_buried(system, stored, [payload for _, payload, _ in garbage])
            await evict(system.hf.connection, 0.0)
    await system.check_well()


async def test_every_kind_of_garbage_key_version_is_a_dead_letter(system: System) -> None:
    payloads = garbage_versions()
    stored = [await system.store(f"$KV.ctx-keys.bad.k{n}", payload) for n, payload in enumerate(payloads)]
    stored.append(await system.store("$KV.ctx-keys.x--zz.k", b'{"version":1,"op":"put"}'))
    payloads.append(b'{"version":1,"op":"put"}')
    assert {stream for stream, _ in stored} == {KEYS_STREAM}
    await check_buried(system, stored, payloads)
    await system.check_well()


async def test_messages_that_no_client_library_would_send_stop_nobody(system: System) -> None:
    before = len(await system.letters())
    await raw_publish(system.url, b"PUB ctx.bad.event.\xff\xfe.x 2\r\n{}\r\n")
    await raw_publish(system.url, b"HPUB ctx.bad.event.a.x 8 10\r\nNATS/1.0{}\r\n")
    await raw_publish(system.url, b"HPUB ctx.bad.event.a.x 29 31\r\nNATS/1.0 503\r\nStatus: 404\r\n\r\n{}\r\n")
    await flush(system.hf.connection)
    assert len(await system.letters()) > before
    await system.check_well()


async def test_odd_but_good_events_are_kept_exactly(system: System) -> None:
    ids = ["\0", " ", "a.b", "*", ">", "$SYS", "é" * 256, "x" * 256, "'; DROP TABLE events --", "\u202e", "🙂"]
    for session in ids:
        await system.store("ctx.bad.event.odd.x", json.dumps({"session_id": session, "id": session}).encode())
    for _ in range(2):
        for session in ids:
            [event] = [found async for found in system.hf.query(session=session, agent="odd")]
            assert (event.session_id, event.source_id) == (session, session)
        await flush(system.hf.connection)


# Forged manifests


def manifest_of(body: bytes, digests: list[str], **changes: object) -> bytes:
    return msgspec.json.encode({"v": 1, "size": len(body), "chunks": digests, **changes})


async def test_forged_manifests_neither_are_served_nor_hide_the_true_context(system: System) -> None:
    hf = system.hf
    part = b"z" * 100
    chunk = compute_digest("bad", CHUNK_KIND, part, content_type=BINARY)
    await system.store(f"$KV.ctx-hot.bad.{chunk}", part, {"Hf-Kind": CHUNK_KIND, "Hf-Type": BINARY, "Hf-Form": "chunk"})
    bodies = [b'{"true": %d}' % n for n in range(8)]
    forgeries = [
        manifest_of(part, [chunk]),  # its chunk is there, and makes another body
        manifest_of(part, ["a" * 32]),  # its chunk is nowhere
        manifest_of(b"", []),
        manifest_of(part, [chunk, chunk]),
        manifest_of(part, [chunk], size=-1),
        manifest_of(part, [chunk], size=limits.BODY_BYTES + 1),
        manifest_of(part, [chunk], v=2),
        b"not json",
    ]
    stored = [
        await system.store(f"$KV.ctx-hot.bad.{good_digest(body)}", forgery, {"Hf-Kind": "note", "Hf-Form": "manifest"})
        for body, forgery in zip(bodies, forgeries, strict=True)
    ]
    for body in bodies:
        # While the forgery holds its place, nothing is stored over it, and nothing wrong is said.
        with pytest.raises(HoldfastError):
            await hf.put(body, kind="note", content_type="application/json")
        with pytest.raises(HoldfastError):
            await hf.resolve(format_ref("note", good_digest(body)))
    await check_buried(system, stored, forgeries)
    await evict(hf.connection, 0.0)
    refs = [await hf.put(body, kind="note", content_type="application/json") for body in bodies]
    await flush(hf.connection)
    await evict(hf.connection, 0.0)
    async with connect(system.url, "bad", cache_bytes=0) as reader:
        assert [(await reader.resolve(ref)).raw for ref in refs] == bodies
    await system.check_well()


async def test_a_forged_hot_copy_does_not_hide_the_archived_one(system: System) -> None:
    hf = system.hf
    small = await hf.put({"archived": "small"}, kind="note")
    large = await hf.put("archived large " * 50_000, kind="note")
    await flush(hf.connection)
    await evict(hf.connection, 0.0)
    forged = manifest_of(b"z" * 100, ["b" * 32])
    for ref in (small, large):
        digest = ref[-32:]
        await system.store(f"$KV.ctx-hot.bad.{digest}", forged, {"Hf-Kind": "note", "Hf-Form": "manifest"})
    async with connect(system.url, "bad", cache_bytes=0) as reader:
        assert (await reader.resolve(small)).body == {"archived": "small"}
        assert (await reader.resolve(large)).body == "archived large " * 50_000
        assert len((await reader.resolve_many([small, large])).found) == 2
    reply = await system.plain.request("ctx.bad.resolve", json.dumps({"ref": small}).encode(), timeout=LIMIT_S)
    assert json.loads(reply.data)["body"] == {"archived": "small"}
    await flush(hf.connection)
    await evict(hf.connection, 0.0)


async def test_a_taken_place_of_an_inline_context_makes_one_dead_letter_and_holds_up_nothing(system: System) -> None:
    """Somebody has put garbage where the context of an event belongs."""
    body = b'{"squatted": true}'
    digest = compute_digest("bad", "event", body)
    await system.store(f"$KV.ctx-hot.bad.{digest}", b"garbage", {"Hf-Kind": "event"})
    place = await system.store("ctx.bad.event.squat.x", b'{"context": ' + body + b"}")
    for n in range(3):
        await system.store("ctx.bad.event.squat.x", b'{"context": {"good": %d}}' % n)
    found = [event async for event in system.hf.query(agent="squat")]
    assert len([event for event in found if event.context_ref and event.context_ref[-32:] != digest]) == 3
    await flush(system.hf.connection)
    letter = (await system.letters())[place]
    assert letter.code == "conflict"
    found = [event async for event in system.hf.query(agent="squat")]
    assert [(await system.hf.resolve(event.context_ref or "")).body for event in found] == [
        {"good": n} for n in range(3)
    ]
    await evict(system.hf.connection, 0.0)
    # With the garbage gone, the same is good again.
    await system.store("ctx.bad.event.squat.x", b'{"context": ' + body + b"}")
    await flush(system.hf.connection)
    assert (await system.hf.resolve(format_ref("event", digest))).body == {"squatted": True}
    await system.check_well()


# Names and sizes at the edge of the client


NAMES: Final = [
    *("a.b", "*", ">", "$KV", "a b", "\0", "\r\n", "é", "日本", "🙂", "x--", "x--zz", "_", ".", "..", "/", "\\"),
    *("a:b", " ", "\t", "'", '"', "%", "\u202e", "NaN", "null", "x" * 64),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
async def test_any_name_goes_round(system: System, name: str) -> None:
    async with connect(system.url, name, name) as hf:
        ref = await hf.put({"of": name})
        event = await hf.emit("x", {"of": name}, context=ref, session=name, correlation=name)
        [found] = [item async for item in hf.query(session=name, agent=name)]
        assert (found.namespace, found.agent_id, found.event_id) == (name, name, event.event_id)
        assert (await hf.resolve(ref)).body == {"of": name}
    reply = await system.plain.request(
        f"ctx.{encode_token(name)}.resolve", json.dumps({"ref": ref}).encode(), timeout=LIMIT_S
    )
    assert json.loads(reply.data)["body"] == {"of": name}


@pytest.mark.parametrize("name", ["", "x" * 10_000, "é" * 5_000, "\ud800"], ids=["empty", "long", "wide", "surrogate"])
async def test_an_impossible_name_is_a_typed_error(system: System, name: str) -> None:
    for call in (
        lambda: connect(system.url, name).__aenter__(),
        lambda: connect(system.url, "bad", name).__aenter__(),
        lambda: system.hf.emit(name),
        lambda: system.hf.put(1, kind=name),
        lambda: system.hf.emit("x", session=name),
        lambda: system.hf.resolve(name),
    ):
        with pytest.raises(InputError) as caught:
            await call()
        assert caught.value.field


async def test_a_body_one_byte_over_the_limit_is_refused_and_one_at_it_is_stored(system: System) -> None:
    with pytest.raises(TooLargeError) as caught:
        await system.hf.put(b"\0" * (limits.BODY_BYTES + 1))
    assert (caught.value.field, caught.value.limit) == ("body", limits.BODY_BYTES)
    ref = await system.hf.put(b"\0" * limits.BODY_BYTES)
    async with connect(system.url, "bad", cache_bytes=0) as reader:
        assert (await reader.resolve(ref)).size == limits.BODY_BYTES


async def test_unknown_references_are_not_found(system: System) -> None:
    ref = await system.hf.put({"known": 1}, kind="note")
    for unknown in ("ctx_note_" + "a" * 32, "ctx_other_" + ref[-32:]):
        with pytest.raises(NotFoundError):
            await system.hf.resolve(unknown)


# Requests: anything at all


ENDPOINTS: Final = ("resolve", "resolve_batch", "put", "query", "stats", "health", "fetch")
MEMBERS: Final = (
    "ref", "refs", "fields", "kind", "body", "body_text", "body_base64", "content_type", "expires_at", "session_id",
    "agent_id", "correlation_id", "event_id", "name", "since", "until", "limit", "cursor", "digests",
)  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.sampled_from(MEMBERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
requests = st.one_of(
    st.binary(max_size=200),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(MEMBERS), json_values, max_size=4).map(lambda value: json.dumps(value).encode()),
)
messages = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(
        st.sampled_from(("id", "timestamp", "context", "context_ref", "context_kind", "event_depth", "data", "v",
                         "session_id", "version", "op", "ref", "tags", "confidence", "expires_at_ms", "x")),
        json_values,
        max_size=5,
    ).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Values as hypothesis draws them, to be sent many at once; the same each time."""
    drawn: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(strategy)
    def draw(value: Any) -> None:
        drawn.append(value)

    draw()
    return drawn


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_arbitrary_requests_and_messages_stop_nobody(system: System) -> None:
    process = psutil.Process()
    await system.check_well()
    before = process.memory_info().rss
    # Few enough that the last in the row is answered in time on a busy machine: counting everything takes a while.
    room = asyncio.Semaphore(16)
    published: set[tuple[str, int]] = set()

    async def ask(endpoint: str, request: bytes) -> None:
        async with room:
            reply = await system.plain.request(f"ctx.bad.{endpoint}", request, timeout=LIMIT_S)
        code = (reply.headers or {}).get("Nats-Service-Error-Code")
        if code is not None:
            answer = msgspec.json.decode(reply.data)
            # Never a failure of ours: a typed refusal.
            assert 400 <= int(code) < 500, (endpoint, request, answer)
            assert answer["error"]["code"]
            assert answer["error"]["field"]

    async def store(number: int, payload: bytes, unique: int) -> None:
        digest = good_digest(b"fuzz %d" % unique)
        subject = ("ctx.bad.event.fuzz.x", f"$KV.ctx-keys.bad.fuzz{unique}", f"$KV.ctx-hot.bad.{digest}")[number]
        async with room:
            published.add(await system.store(subject, payload, {"Hf-Kind": "note"} if number == 2 else None))

    asked = examples(st.tuples(st.sampled_from(ENDPOINTS), requests), EXAMPLES)
    await asyncio.gather(*(ask(*request) for request in asked))
    stored = examples(st.tuples(st.integers(0, 2), messages), EXAMPLES)
    await asyncio.gather(*(store(number, payload, unique) for unique, (number, payload) in enumerate(stored)))
    await flush(system.hf.connection)
    letters = await system.letters()
    # Each message is a row or a dead letter: the watermark has passed them all.
    marks = (await system.hf.stats())["watermarks"]
    assert all(mark["lag"] == 0 for mark in marks.values())
    assert len(published & set(letters)) > EXAMPLES / 4
    await system.check_well()
    assert process.memory_info().rss - before < 300 * limits.MIB


async def test_sealed_forms_in_another_place_are_refused(system: System) -> None:
    """A true context copied to another namespace, where its digest says something else."""
    [form] = seal("elsewhere", "note", b'{"secret": 1}')
    place = await system.store(f"$KV.ctx-hot.bad.{form.digest}", form.payload, form.headers)
    await check_buried(system, [place], [form.payload])
    with pytest.raises(HoldfastError):
        await system.hf.resolve(format_ref("note", form.digest))
    await evict(system.hf.connection, 0.0)


async def test_key_versions_survive_what_surrounds_them(system: System) -> None:
    await system.store("$KV.ctx-keys.bad.among", b"garbage")
    await put_version(system.hf.connection, "bad", "among", 1)
    await system.store("$KV.ctx-keys.bad.among", b"more garbage")
    await put_version(system.hf.connection, "bad", "among", 2)
    before = (await system.hf.stats())["lake"]["key_versions"]
    await flush(system.hf.connection)
    assert (await system.hf.stats())["lake"]["key_versions"] == before + 2
