"""Request-reply on a real server: errors with a type, calls beside each other, an orderly end."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.client.cold import ResolverClient, error_of
from holdfast.schemas.errors import (
    HoldfastError,
    InvalidFieldError,
    InvalidNameError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
)
from holdfast.streams import service as service_module
from holdfast.streams.service import Answer, Call, EndpointCounters, ErrorReply, Handler, decode_request, serve
from tests.support import LIMIT_S, plain_client, raw_publish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from holdfast.streams.connection import Connection


@asynccontextmanager
async def serving(
    connection: Connection, *, drain_timeout_s: float = LIMIT_S, **handlers: Handler
) -> AsyncGenerator[dict[str, EndpointCounters]]:
    endpoints = {name: (f"ctx.*.{name}", handler) for name, handler in handlers.items()}
    async with serve(
        connection,
        name="test",
        version="1.0.0",
        description="tests",
        endpoints=endpoints,
        drain_timeout_s=drain_timeout_s,
    ) as counters:
        yield counters


async def echo(call: Call) -> None:
    await call.reply(call.data)


async def ask(client: Client, subject: str, payload: bytes = b"{}") -> Msg:
    return await client.request(subject, payload, timeout=LIMIT_S)


def error_in(reply: Msg) -> dict[str, Any]:
    assert reply.headers is not None
    body = msgspec.json.decode(reply.data, type=ErrorReply).error
    return {"status": reply.headers["Nats-Service-Error-Code"], **msgspec.to_builtins(body)}


class Request(msgspec.Struct, forbid_unknown_fields=True):
    limit: int = 5
    ref: str = ""


DECODER = msgspec.json.Decoder(Request)


async def test_a_call_knows_its_namespace_and_its_subject(connection: Connection, nats_server: str) -> None:
    seen: list[tuple[str, str]] = []

    async def note(call: Call) -> None:
        seen.append((call.namespace, call.subject))
        await call.reply(b"{}", {"A": "b"})

    async with serving(connection, note=note) as counters, plain_client(nats_server) as client:
        reply = await ask(client, "ctx.x--a_2eb.note")
        assert (reply.data, reply.headers) == (b"{}", {"A": "b"})
        await ask(client, "ctx.n.note")
        assert seen == [("a.b", "ctx.x--a_2eb.note"), ("n", "ctx.n.note")]
        assert counters["note"].answered == 2
        assert counters["note"].seconds > 0


async def test_a_typed_error_becomes_an_error_reply(connection: Connection, nats_server: str) -> None:
    async def refuse(call: Call) -> None:
        raise TooLargeError("too much → ✓", field="refs", limit=1_000, hint="ask for less")

    async with serving(connection, refuse=refuse) as counters, plain_client(nats_server) as client:
        reply = await ask(client, "ctx.n.refuse")
        assert error_in(reply) == {
            "status": "413",
            "code": "too_large",
            "message": "too much → ✓",
            "field": "refs",
            "limit": 1_000,
            "hint": "ask for less",
        }
        assert (reply.headers or {})["Nats-Service-Error"].isascii()
        assert (counters["refuse"].refused, counters["refuse"].failed) == (1, 0)


async def test_an_unknown_exception_is_a_500_that_tells_no_secrets(connection: Connection, nats_server: str) -> None:
    async def crash(call: Call) -> None:
        raise ZeroDivisionError("a secret")

    async with serving(connection, crash=crash, echo=echo) as counters, plain_client(nats_server) as client:
        found = error_in(await ask(client, "ctx.n.crash"))
        assert (found["status"], found["code"]) == ("500", "error")
        assert "secret" not in repr(found)
        assert counters["crash"].failed == 1
        assert (await ask(client, "ctx.n.echo", b"[1]")).data == b"[1]"


@pytest.mark.parametrize("token", ["x--zz", "x--_41", "x" * 65])
async def test_a_namespace_that_is_none_is_refused(connection: Connection, nats_server: str, token: str) -> None:
    async with serving(connection, echo=echo), plain_client(nats_server) as client:
        found = error_in(await ask(client, f"ctx.{token}.echo"))
        assert (found["status"], found["code"]) == ("400", "invalid_name")


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"", None),
        (b"{}", None),
        (b'{"limit": "x"}', "limit"),
        (b'{"limit": 1.5}', "limit"),
        (b'{"ref": 5}', "ref"),
        (b'{"unknown": 1}', "unknown"),
        (b"[1]", "request"),
        (b"5", "request"),
        (b"not json", "request"),
        (b'{"limit": NaN}', "request"),
        (b"\xff\xfe", "request"),
        (b'{"ref": "\xff"}', "request"),
        (b'{"ref": "\\ud800"}', "request"),
        (b"[" * 100_000, "request"),
        (b'{"ref":' * 100_000, None),
        (b'{"limit": 1' + b"0" * 5_000 + b"}", None),
        (b"\x00" * 1_000, "request"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_a_bad_request_is_refused_and_the_service_goes_on(
    connection: Connection, nats_server: str, payload: bytes, field: str | None
) -> None:
    async def read(call: Call) -> None:
        decode_request(call.data, DECODER)
        await call.reply(b"{}")

    async with serving(connection, read=read) as counters, plain_client(nats_server) as client:
        reply = await ask(client, "ctx.n.read", payload)
        if payload in (b"", b"{}"):
            assert reply.data == b"{}"
        else:
            found = error_in(reply)
            assert (found["status"], found["code"]) == ("400", "invalid_field")
            assert field in (None, found["field"])
        assert counters["read"].failed == 0
        assert (await ask(client, "ctx.n.read")).data == b"{}"


@pytest.mark.parametrize(
    "frame",
    [
        b"PUB ctx.\xff.echo reply.to 2\r\n{}\r\n",
        b"PUB ctx.n.echo reply.\xff 2\r\n{}\r\n",
        b"PUB ctx.n.echo 2\r\n{}\r\n",
        b"PUB ctx.a\x00b.echo 2\r\n{}\r\n",
        b"HPUB ctx.n.echo reply.to 8 10\r\nNATS/1.0{}\r\n",
    ],
)
async def test_a_malformed_frame_does_not_stop_the_service(
    connection: Connection, nats_server: str, frame: bytes
) -> None:
    async with serving(connection, echo=echo), plain_client(nats_server) as client:
        await raw_publish(nats_server, frame)
        assert (await ask(client, "ctx.n.echo", b"[1]")).data == b"[1]"
        assert connection.reconnects == 0


async def test_what_is_at_hand_is_answered_at_once_and_the_rest_by_the_handler(
    connection: Connection, nats_server: str
) -> None:
    def at_hand(namespace: str, payload: bytes, headers: Mapping[str, str]) -> Answer | None:
        if payload == b"known":
            return Answer(f"{namespace} {headers.get('A')}".encode(), {"From": "hand"})
        if payload == b"broken":
            raise ZeroDivisionError
        if payload == b"large":
            return Answer(b"x" * (connection.client.max_payload + 1))
        return None

    service = serve(
        connection,
        name="test",
        version="1.0.0",
        description="tests",
        endpoints={"echo": ("ctx.*.echo", echo)},
        at_hand={"echo": at_hand},
    )
    async with service as counters, plain_client(nats_server) as client:
        replies = await asyncio.gather(
            *(client.request("ctx.x--a_2eb.echo", b"known", timeout=LIMIT_S, headers={"A": "b"}) for _ in range(50))
        )
        assert {(reply.data, (reply.headers or {})["From"]) for reply in replies} == {(b"a.b b", "hand")}
        for payload in (b"unknown", b"broken", b"large"):
            assert (await ask(client, "ctx.n.echo", payload)).data == payload
        assert error_in(await ask(client, "ctx.x--zz.echo", b"known"))["code"] == "invalid_name"
        await client.publish("ctx.n.echo", b"known")  # nobody to answer
        assert (await ask(client, "ctx.n.echo", b"known")).data == b"n None"
        assert (counters["echo"].at_hand, counters["echo"].refused) == (51, 1)
        stats = msgspec.json.decode((await ask(client, "$SRV.STATS.test", b"")).data)
        assert stats["endpoints"][0]["num_requests"] == 56
        assert connection.reconnects == 0


async def test_a_slow_call_does_not_hold_up_the_others(connection: Connection, nats_server: str) -> None:
    go_on = asyncio.Event()

    async def slow(call: Call) -> None:
        await go_on.wait()
        await call.reply(b"slow")

    async with serving(connection, slow=slow, echo=echo), plain_client(nats_server) as client:
        waiting = [asyncio.ensure_future(ask(client, "ctx.n.slow")) for _ in range(20)]
        for _ in range(20):
            assert (await ask(client, "ctx.n.echo")).data == b"{}"
        go_on.set()
        assert {reply.data for reply in await asyncio.gather(*waiting)} == {b"slow"}


async def test_calls_under_way_are_bounded(
    connection: Connection, nats_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_REQUESTS", 4)
    at_once = most = 0

    async def busy(call: Call) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        for _ in range(5):
            await asyncio.sleep(0)
        at_once -= 1
        await call.reply(b"{}")

    async with serving(connection, busy=busy), plain_client(nats_server) as client:
        await asyncio.gather(*(ask(client, "ctx.n.busy") for _ in range(100)))
    assert most == 4


async def test_leaving_waits_for_the_calls_under_way_and_takes_no_more(
    connection: Connection, nats_server: str
) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(call: Call) -> None:
        began.set()
        await go_on.wait()
        await call.reply(b"done")

    async with plain_client(nats_server) as client:
        async with serving(connection, slow=slow):
            waiting = asyncio.ensure_future(ask(client, "ctx.n.slow"))
            await asyncio.wait_for(began.wait(), LIMIT_S)
            asyncio.get_running_loop().call_later(0.05, go_on.set)
        assert (await waiting).data == b"done"
        with pytest.raises(Exception, match="no responders"):
            await ask(client, "ctx.n.slow")


async def test_a_call_that_never_ends_is_cancelled_at_the_end(connection: Connection, nats_server: str) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def endless(call: Call) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with plain_client(nats_server) as client:
        async with serving(connection, drain_timeout_s=0.1, endless=endless):
            await client.publish("ctx.n.endless", b"{}")
            await asyncio.wait_for(began.wait(), LIMIT_S)
        await asyncio.wait_for(ended.wait(), LIMIT_S)


async def test_a_service_that_waits_for_nobody_takes_no_request_after_its_end(
    connection: Connection, nats_server: str
) -> None:
    async with plain_client(nats_server) as client:
        async with serving(connection, drain_timeout_s=0.0, echo=echo):
            assert (await ask(client, "ctx.n.echo", b"{}")).data == b"{}"
        with pytest.raises(Exception, match="no responders"):
            await ask(client, "ctx.n.echo")


async def test_an_answer_that_does_not_fit_is_a_typed_error(connection: Connection, nats_server: str) -> None:
    async def large(call: Call) -> None:
        await call.reply(b"x" * (connection.client.max_payload + 1))

    async with serving(connection, large=large), plain_client(nats_server) as client:
        found = error_in(await ask(client, "ctx.n.large"))
        assert (found["status"], found["code"], found["field"]) == ("413", "too_large", "body")
    assert connection.reconnects == 0


async def test_the_service_is_discoverable(connection: Connection, nats_server: str) -> None:
    async with serving(connection, echo=echo), plain_client(nats_server) as client:
        info = msgspec.json.decode((await ask(client, "$SRV.INFO.test", b"")).data)
        assert (info["name"], info["version"]) == ("test", "1.0.0")
        assert [(each["name"], each["subject"]) for each in info["endpoints"]] == [("echo", "ctx.*.echo")]


class TestResolverClient:
    async def test_an_error_reply_is_raised_as_its_class(self, connection: Connection, namespace: str) -> None:
        async def query(call: Call) -> None:
            raise InvalidFieldError("no such field", field="limit", limit=1_000, hint="ask for less")

        resolver = ResolverClient(connection, namespace)
        async with serving(connection, query=query):
            with pytest.raises(InvalidFieldError) as caught:
                await resolver.call("query", {})
        error = caught.value
        assert (error.message, error.field, error.limit, error.hint) == (
            "no such field",
            "limit",
            1_000,
            "ask for less",
        )

    async def test_no_resolver_is_told_within_two_seconds(self, connection: Connection, namespace: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(UnavailableError, match="no resolver") as caught:
            await ResolverClient(connection, namespace).call("stats", {})
        assert "holdfast up" in str(caught.value)
        assert loop.time() - began < 4  # far below the deadline of a read that may yet succeed

    @pytest.mark.parametrize("payload", [b"", b"not json", b"[1]", b"\xff"])
    async def test_an_answer_that_is_no_object_is_a_typed_error(
        self, connection: Connection, namespace: str, payload: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("holdfast.client.cold.READ_DEADLINE_S", 0.0)

        async def stats(call: Call) -> None:
            await call.reply(payload)

        async with serving(connection, stats=stats):
            with pytest.raises(HoldfastError):
                await asyncio.wait_for(ResolverClient(connection, namespace).call("stats", {}), LIMIT_S)

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("not_found", NotFoundError),
            ("too_large", TooLargeError),
            ("invalid_name", InvalidNameError),
            ("unavailable", UnavailableError),
            ("some future code", HoldfastError),
            ("drift", HoldfastError),
        ],
    )
    def test_a_code_names_its_class(self, code: str, expected: type[HoldfastError]) -> None:
        error = error_of(service_module.ErrorBody(code=code, message="m"))
        assert type(error) is expected
