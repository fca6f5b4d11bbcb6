"""The hot tier on a real server: stored once, never overwritten, never served wrong."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
import nats.js.errors
import pytest

from holdfast.client import Holdfast, connect
from holdfast.schemas import limits
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import (
    ConflictError,
    DigestMismatchError,
    HoldfastError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
    InvalidRefError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
)
from holdfast.schemas.refs import JSON, Digest, compute_digest, format_ref, parse_ref
from holdfast.streams.codec import seal
from holdfast.streams.hot import HotTier, NewContext
from holdfast.streams.wire import HOT_STREAM, hot_subject
from tests.support import OwnServer, hpub, plain_client, raw_publish

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client

    from holdfast.schemas.rows import ContextRow
    from holdfast.streams.connection import Connection


def subject_of(namespace: str, ref: str) -> str:
    return hot_subject(namespace, parse_ref(ref).digest)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No resolver runs here, and none is waited for."""
    monkeypatch.setattr("holdfast.client.cold.NOBODY_S", 0.1)


async def stored_count(connection: Connection, namespace: str) -> int:
    answer = await connection.api(f"STREAM.INFO.{HOT_STREAM}", {"subjects_filter": hot_subject(namespace, ">")})
    return len(answer["state"].get("subjects") or {})


class TestPutAndResolve:
    @pytest.mark.parametrize(
        ("body", "content_type"),
        [
            ({"goal": "book a flight", "n": 1, "tags": ["a", None, True, 1.5]}, JSON),
            (["x", {"y": []}], JSON),
            ("plain text, ünïcode", "text/plain; charset=utf-8"),
            (b"\x00\xffraw", BINARY),
            ("", "text/plain; charset=utf-8"),
            (b"", BINARY),
            ({}, JSON),
            (None, JSON),
            (0, JSON),
        ],
    )
    async def test_a_body_comes_back_as_it_went_in(
        self, hf: Holdfast, nats_server: str, body: object, content_type: str
    ) -> None:
        ref = await hf.put(body, kind="completion")  # type: ignore[arg-type]  # every kind of body
        async with connect(nats_server, namespace=hf.namespace) as other:
            context = await other.resolve(ref)
        assert (context.ref, context.kind, context.body) == (ref, "completion", body)
        assert (context.content_type, context.tier) == (content_type, "hot")
        assert context.size == len(context.raw)
        assert abs(context.created_at - datetime.now(UTC)) < timedelta(minutes=1)

    async def test_a_struct_is_stored_as_json(self, hf: Holdfast) -> None:
        class Plan(msgspec.Struct):
            steps: list[str]

        context = await hf.resolve(await hf.put(Plan(["a", "b"])))
        assert context.body == {"steps": ["a", "b"]}

    async def test_what_was_just_stored_is_read_from_this_process(self, hf: Holdfast) -> None:
        ref = await hf.put({"a": 1})
        assert (await hf.resolve(ref)).tier == "cache"
        hf.cache.forget(ref)
        assert (await hf.resolve(ref)).tier == "hot"
        assert (hf.cache.counters.hits, hf.cache.counters.misses) == (1, 1)

    async def test_equal_contexts_of_two_agents_share_one_reference(
        self, nats_server: str, namespace: str, connection: Connection
    ) -> None:
        async with (
            connect(nats_server, namespace=namespace, agent="a") as one,
            connect(nats_server, namespace=namespace, agent="b") as two,
        ):
            first = await one.put({"x": 1, "y": 2})
            second = await two.put({"y": 2, "x": 1})
        assert first == second
        assert await stored_count(connection, namespace) == 1

    async def test_kind_namespace_type_and_expiry_are_part_of_the_identity(
        self, hf: Holdfast, nats_server: str
    ) -> None:
        expires_at = datetime.now(UTC) + timedelta(hours=1)
        refs = [
            await hf.put("x"),
            await hf.put("x", kind="other"),
            await hf.put("x", content_type="text/markdown"),
            await hf.put("x", expires_at=expires_at),
        ]
        async with connect(nats_server, namespace=hf.namespace + "-2") as other:
            refs.append(await other.put("x"))
        assert len({parse_ref(ref).digest for ref in refs}) == 5

    async def test_a_reference_of_another_namespace_is_not_found(self, hf: Holdfast, nats_server: str) -> None:
        ref = await hf.put("mine")
        async with connect(nats_server, namespace=hf.namespace + "-2") as other:
            with pytest.raises((NotFoundError, UnavailableError)):
                await other.resolve(ref)

    async def test_a_reference_that_names_another_kind_is_not_found(self, hf: Holdfast, nats_server: str) -> None:
        digest = parse_ref(await hf.put("x", kind="note")).digest
        async with connect(nats_server, namespace=hf.namespace) as other:
            with pytest.raises(NotFoundError):
                await other.resolve(format_ref("other", digest))

    async def test_an_expired_context_resolves_to_nothing(self, hf: Holdfast, nats_server: str) -> None:
        past = await hf.put("x", expires_at=datetime.now(UTC) - timedelta(seconds=1))
        future = datetime.now(UTC) + timedelta(hours=1)
        alive = await hf.put("x", expires_at=future)
        async with connect(nats_server, namespace=hf.namespace) as other:
            for client in (hf, other):
                outcome = await client.resolve_many([past, alive])
                assert (list(outcome.found), outcome.missing) == ([alive], [past])
                with pytest.raises(NotFoundError):
                    await client.resolve(past)
                kept = outcome.found[alive].expires_at
                assert kept is not None
                assert abs(kept - future) < timedelta(milliseconds=1)

    async def test_resolve_many_keeps_the_order_of_first_mention(self, hf: Holdfast, nats_server: str) -> None:
        refs = await hf.put_many([{"i": i} for i in range(50)])
        asked = [*reversed(refs), *refs]
        async with connect(nats_server, namespace=hf.namespace) as other:
            outcome = await other.resolve_many(asked)
        assert list(outcome.found) == list(reversed(refs))
        assert [context.body["i"] for context in outcome.found.values()] == list(range(49, -1, -1))
        assert outcome.missing == []

    async def test_more_than_a_page_is_resolved_at_once(self, hf: Holdfast, nats_server: str) -> None:
        refs = await hf.put_many([{"i": i} for i in range(2_100)])
        async with connect(nats_server, namespace=hf.namespace) as other:
            outcome = await other.resolve_many(refs)
        assert [context.body["i"] for context in outcome.found.values()] == list(range(2_100))

    async def test_resolve_many_of_nothing_is_nothing(self, hf: Holdfast) -> None:
        outcome = await hf.resolve_many([])
        assert (outcome.found, outcome.missing) == ({}, [])


class TestPutMany:
    async def test_duplicates_inside_are_stored_once(self, hf: Holdfast, connection: Connection) -> None:
        refs = await hf.put_many([{"i": i % 10} for i in range(300)])
        assert refs == [refs[i % 10] for i in range(300)]
        assert await stored_count(connection, hf.namespace) == 10

    async def test_new_among_known_are_stored_and_the_known_told_apart(
        self, connection: Connection, namespace: str
    ) -> None:
        def contexts(start: int, stop: int) -> list[NewContext]:
            return [NewContext(namespace=namespace, kind="k", body=b"%d" % i) for i in range(start, stop)]

        hot = HotTier(connection)
        first = await hot.put_many(contexts(0, 100))
        second = await hot.put_many(contexts(50, 250))
        await hot.close()
        assert [put.existed for put in first] == [False] * 100
        assert [put.existed for put in second] == [True] * 50 + [False] * 150
        assert [put.ref for put in second[:50]] == [put.ref for put in first[50:]]
        assert await stored_count(connection, namespace) == 250

    async def test_nothing_is_stored_when_one_body_cannot_be_encoded(
        self, hf: Holdfast, connection: Connection
    ) -> None:
        with pytest.raises(InvalidBodyError):
            await hf.put_many([{"a": 1}, {"a": float("nan")}])
        assert await stored_count(connection, hf.namespace) == 0

    async def test_an_empty_list_is_no_write(self, hf: Holdfast) -> None:
        assert await hf.put_many([]) == []

    async def test_a_thousand_concurrent_puts_are_committed_in_groups(
        self, hf: Holdfast, connection: Connection
    ) -> None:
        refs = await asyncio.gather(*(hf.put({"i": i}) for i in range(1_000)))
        assert len(set(refs)) == 1_000
        assert await stored_count(connection, hf.namespace) == 1_000
        # Neighbours in the stream that were stored in one batch carry its id.
        message = await connection.lean.request(
            f"$JS.API.DIRECT.GET.{HOT_STREAM}.{subject_of(hf.namespace, refs[500])}"
        )
        assert "Nats-Batch-Id" in (message.headers or {})

    async def test_concurrent_equal_puts_share_one_write(self, hf: Holdfast, connection: Connection) -> None:
        refs = await asyncio.gather(*(hf.put({"same": True}) for _ in range(200)))
        assert len(set(refs)) == 1
        assert await stored_count(connection, hf.namespace) == 1


class TestExistingKeys:
    """AMENDMENT 1: nobody overwrites or deletes a context by the ordinary means of a KV client."""

    async def test_a_plain_kv_client_cannot_change_a_context(
        self, hf: Holdfast, nats_server: str, connection: Connection
    ) -> None:
        ref = await hf.put({"original": True})
        key = subject_of(hf.namespace, ref).removeprefix("$KV.ctx-hot.")
        async with plain_client(nats_server) as client:
            bucket = await client.jetstream().key_value("ctx-hot")
            refused = nats.js.errors.APIError
            with pytest.raises(refused):
                await bucket.put(key, b"changed")
            with pytest.raises(refused):
                await bucket.delete(key)
            with pytest.raises(refused):
                await bucket.purge(key)
            with pytest.raises(refused):
                await bucket.create(key, b"changed")
            entry = await bucket.get(key)
            with pytest.raises(refused):
                await bucket.update(key, b"changed", entry.revision)
        async with connect(nats_server, namespace=hf.namespace) as other:
            assert (await other.resolve(ref)).body == {"original": True}
        assert await stored_count(connection, hf.namespace) == 1

    @pytest.mark.parametrize(
        "headers",
        [
            None,
            {"Nats-Rollup": "sub"},
            {"Nats-Rollup": "all"},
            {"KV-Operation": "DEL"},
            {"Nats-Msg-Id": "x"},
            {"Nats-TTL": "1s"},
        ],
        ids=str,
    )
    async def test_a_plain_publish_on_a_context_is_refused(
        self, hf: Holdfast, nats_server: str, headers: dict[str, str] | None
    ) -> None:
        ref = await hf.put({"original": True})
        async with plain_client(nats_server) as client:
            with pytest.raises(nats.js.errors.APIError):
                await client.jetstream().publish(subject_of(hf.namespace, ref), b"changed", headers=headers)
        async with connect(nats_server, namespace=hf.namespace) as other:
            assert (await other.resolve(ref)).body == {"original": True}

    async def test_a_single_message_cannot_be_deleted_or_erased(self, hf: Holdfast, nats_server: str) -> None:
        ref = await hf.put({"original": True})
        async with plain_client(nats_server) as client:
            stream = client.jetstream()
            message = await stream.get_last_msg(HOT_STREAM, subject_of(hf.namespace, ref))
            assert message.seq is not None
            with pytest.raises(nats.js.errors.APIError):
                await stream.delete_msg(HOT_STREAM, message.seq)
        async with connect(nats_server, namespace=hf.namespace) as other:
            assert (await other.resolve(ref)).body == {"original": True}


async def publish_under(client: Client, namespace: str, ref: str, payload: bytes, headers: dict[str, str]) -> None:
    await client.jetstream().publish(subject_of(namespace, ref), payload, headers=headers)


class TestForeignMessages:
    """Anybody may publish to an unused key before us: it is never taken for the context, nor served."""

    @pytest.mark.parametrize(
        ("payload", "headers"),
        [
            (b"garbage", {}),
            (b"garbage", {"Hf-Kind": "context"}),
            (b'{"a":1}', {"Hf-Kind": "another"}),
            (b'{"a":1}', {"Hf-Kind": "context", "Hf-V": "2"}),
            (b'{"a":1}', {"Hf-Kind": "context", "Hf-Form": "strange"}),
            (b'{"a":1}', {"Hf-Kind": "context", "Hf-Exp": "tomorrow"}),
            (b"\x28\xb5\x2f\xfd", {"Hf-Kind": "context", "Hf-Enc": "zstd"}),
            (b'{"a":1}', {"Hf-Kind": "context", "Hf-Enc": "gzip"}),
            (b"", {"Hf-Kind": "context", "Status": "404"}),
            (b"", {"Status": "503"}),
            (b"", {"Status": "204"}),
            (b"", {"KV-Operation": "DEL"}),
        ],
    )
    async def test_a_foreign_message_under_a_digest_is_a_conflict_and_an_error(
        self, hf: Holdfast, nats_server: str, payload: bytes, headers: dict[str, str]
    ) -> None:
        ref = format_ref("context", compute_digest(hf.namespace, "context", b'{"a":1}'))
        other_refs = await hf.put_many([{"b": i} for i in range(3)])
        async with plain_client(nats_server) as client:
            await publish_under(client, hf.namespace, ref, payload, headers)
        with pytest.raises(ConflictError):
            await hf.put({"a": 1})
        with pytest.raises(ConflictError):
            await hf.put_many([{"a": 1}, *({"c": i} for i in range(40))])
        hot = HotTier(hf.connection)
        with pytest.raises(HoldfastError) as caught:
            await hot.get(hf.namespace, parse_ref(ref).digest)
        assert not isinstance(caught.value, UnavailableError)
        digests = [parse_ref(each).digest for each in (*other_refs, ref)]
        found, damaged = await hot.get_stored_many(hf.namespace, digests)
        assert set(found) == set(digests[:3])
        assert set(damaged) == {digests[3]}

    async def test_the_others_of_a_batch_are_stored_beside_a_conflict(self, hf: Holdfast, nats_server: str) -> None:
        ref = format_ref("context", compute_digest(hf.namespace, "context", b'{"a":1}'))
        async with plain_client(nats_server) as client:
            await publish_under(client, hf.namespace, ref, b"x", {"Hf-Kind": "context"})
        with pytest.raises(ConflictError):
            await hf.put_many([{"a": 1}, *({"c": i} for i in range(100))])
        hot = HotTier(hf.connection)
        digests = [Digest(compute_digest(hf.namespace, "context", b'{"c":%d}' % i)) for i in range(100)]
        found, _ = await hot.get_stored_many(hf.namespace, digests)
        assert len(found) == 100

    async def test_a_forged_manifest_is_no_stored_context(self, hf: Holdfast, nats_server: str) -> None:
        """The manifest's key is the digest of the whole body: what it lists must make that body."""
        body = os.urandom(limits.CHUNK_BYTES + 1)
        forms = seal(hf.namespace, "context", os.urandom(limits.CHUNK_BYTES + 1), content_type=BINARY)
        ref = format_ref("context", compute_digest(hf.namespace, "context", body, content_type=BINARY))
        async with plain_client(nats_server) as client:
            for form in forms[:-1]:
                subject = hot_subject(hf.namespace, form.digest)
                await client.jetstream().publish(subject, form.payload, headers=form.headers)
            await publish_under(client, hf.namespace, ref, forms[-1].payload, forms[-1].headers)
        with pytest.raises(ConflictError):
            await hf.put(body)
        with pytest.raises(DigestMismatchError):
            await HotTier(hf.connection).get(hf.namespace, parse_ref(ref).digest)

    async def test_a_manifest_without_its_chunks_is_no_stored_context(self, hf: Holdfast, nats_server: str) -> None:
        body = os.urandom(limits.CHUNK_BYTES + 1)
        forged = seal(hf.namespace, "context", os.urandom(limits.CHUNK_BYTES + 1), content_type=BINARY)[-1]
        ref = format_ref("context", compute_digest(hf.namespace, "context", body, content_type=BINARY))
        async with plain_client(nats_server) as client:
            await publish_under(client, hf.namespace, ref, forged.payload, forged.headers)

        async def nothing_archived(_namespace: str, _digests: Sequence[Digest]) -> dict[Digest, ContextRow]:
            return {}

        hot = HotTier(hf.connection, cold=nothing_archived)
        with pytest.raises(ConflictError):
            await hot.put_many([NewContext(namespace=hf.namespace, kind="context", body=body, content_type=BINARY)])
        await hot.close()

    async def test_a_message_with_broken_headers_does_not_silence_the_connection(
        self, hf: Holdfast, nats_server: str
    ) -> None:
        ref = format_ref("context", compute_digest(hf.namespace, "context", b'{"a":1}'))
        subject = subject_of(hf.namespace, ref).encode()
        await raw_publish(nats_server, hpub(subject, b"NATS/1.0"))
        with pytest.raises(ConflictError):
            await hf.put({"a": 1})
        assert (await hf.resolve(await hf.put({"b": 1}))).body == {"b": 1}


class TestLargeBodies:
    async def test_a_body_of_several_chunks_comes_back_whole(self, hf: Holdfast, nats_server: str) -> None:
        body = os.urandom(3 * limits.MIB + 17)
        ref = await hf.put(body)
        async with connect(nats_server, namespace=hf.namespace) as other:
            context = await other.resolve(ref)
            assert context.raw == body
            assert (context.size, context.tier) == (len(body), "hot")
            both = await other.resolve_many([ref, await hf.put("small")])
            assert len(both.found) == 2

    async def test_a_second_put_of_a_large_body_stores_nothing(self, hf: Holdfast, connection: Connection) -> None:
        body = os.urandom(2 * limits.MIB)
        ref = await hf.put(body)
        before = await stored_count(connection, hf.namespace)
        assert before == 5  # four chunks and their manifest
        assert await hf.put(body) == ref
        assert await stored_count(connection, hf.namespace) == before

    async def test_shared_chunks_are_stored_once(self, hf: Holdfast, connection: Connection) -> None:
        shared = os.urandom(2 * limits.CHUNK_BYTES)
        await hf.put(shared + b"a")
        await hf.put(shared + b"b")
        assert await stored_count(connection, hf.namespace) == 2 + 2 * 2

    @pytest.mark.parametrize("size", [limits.COMPRESS_OVER_BYTES, limits.CHUNK_BYTES])
    @pytest.mark.parametrize("more", [0, 1])
    async def test_bodies_at_the_thresholds_come_back(
        self, hf: Holdfast, nats_server: str, size: int, more: int
    ) -> None:
        text = "x" * (size + more)
        ref = await hf.put(text)
        async with connect(nats_server, namespace=hf.namespace) as other:
            assert (await other.resolve(ref)).body == text

    @pytest.mark.slow
    async def test_the_largest_body_comes_back_and_a_byte_more_is_refused(self, hf: Holdfast) -> None:
        body = os.urandom(limits.MIB) * 64
        ref = await hf.put(body)
        hf.cache.forget(ref)
        assert (await hf.resolve(ref)).raw == body
        with pytest.raises(TooLargeError) as caught:
            await hf.put(body + b"x")
        assert (caught.value.field, caught.value.limit) == ("body", limits.BODY_BYTES)

    async def test_a_lost_chunk_is_an_error_that_says_so(self, own_server: OwnServer) -> None:
        async with connect(own_server.url) as hf:
            ref = await hf.put(os.urandom(limits.CHUNK_BYTES + 1))
            hf.cache.forget(ref)
            await hf.connection.api(f"STREAM.PURGE.{HOT_STREAM}", {"seq": 2})
            assert await HotTier(hf.connection).get("default", parse_ref(ref).digest) is None
            with pytest.raises(HoldfastError):
                await hf.resolve(ref)


class TestRefusedInput:
    @pytest.mark.parametrize(
        ("ref", "error"),
        [
            ("", InvalidRefError),
            ("nonsense", InvalidRefError),
            ("ctx_a_short", InvalidRefError),
            ("ctx__" + "a" * 32, InvalidRefError),
            ("ctx_a_" + "A" * 32, InvalidRefError),
            ("ctx_a.b_" + "a" * 32, InvalidRefError),
            ("ctx_a_" + "a" * 32 + "\n", InvalidRefError),
            (5, InvalidRefError),
            (None, InvalidRefError),
            ({"ref": "ctx_a_" + "a" * 32}, InvalidRefError),
        ],
    )
    async def test_what_is_no_reference_is_refused(self, hf: Holdfast, ref: str, error: type[HoldfastError]) -> None:
        with pytest.raises(error):
            await hf.resolve(ref)
        with pytest.raises(error):
            await hf.resolve_many([ref])

    @pytest.mark.parametrize("kind", ["", "a b", "a.b", "ü", "x" * 65, "a\n", 5, None, "*", ">"])
    async def test_a_bad_kind_is_refused(self, hf: Holdfast, kind: str) -> None:
        with pytest.raises(InvalidNameError) as caught:
            await hf.put("x", kind=kind)
        assert caught.value.field == "kind"

    @pytest.mark.parametrize("moment", [datetime(2030, 1, 1), 5, "tomorrow"])  # noqa: DTZ001  naive on purpose
    async def test_an_expiry_without_a_zone_is_refused(self, hf: Holdfast, moment: datetime) -> None:
        with pytest.raises(InvalidFieldError) as caught:
            await hf.put("x", expires_at=moment)
        assert caught.value.field == "expires_at"

    async def test_an_expiry_before_1970_is_refused(self, hf: Holdfast) -> None:
        with pytest.raises(InvalidFieldError):
            await hf.put("x", expires_at=datetime(1960, 1, 1, tzinfo=UTC))

    @pytest.mark.parametrize("content_type", ["", "a\nb", "ü", " x", "x" * 129])
    async def test_a_bad_content_type_is_refused(self, hf: Holdfast, content_type: str) -> None:
        with pytest.raises(InvalidFieldError) as caught:
            await hf.put("x", content_type=content_type)
        assert caught.value.field == "content_type"
