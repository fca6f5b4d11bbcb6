"""Request-reply endpoints as a NATS service (ADR-32): discoverable, with errors that name the field and the limit.

nats-py runs the handler of a subscription for one message at a time; here every request is a task of its own, and at
most ``MAX_REQUESTS`` run at once: what comes beyond waits in the connection.  A request whose answer is at hand has no
task: it is answered as it is read, and the answers of all that came together leave together.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import nats.errors
from nats.micro.service import EndpointConfig, Service, ServiceConfig, ServiceStats

from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, InvalidFieldError, TooLargeError
from holdfast.schemas.names import check_namespace, decode_token
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.tolerant_client import read_headers

if TYPE_CHECKING:
    from nats.micro.request import Request

    from holdfast.streams.connection import Connection
    from holdfast.streams.tolerant_client import Sink

logger = logging.getLogger(__name__)

MAX_REQUESTS: Final = 512
"""Requests under way at once: enough to keep the disk and the server busy, bounded for memory's sake."""

_SUBJECTS: Final = 1_000
"""Subjects whose namespace is remembered."""

_FIELD_CHARS: Final = 100
"""Longest name of an unknown member repeated in an error."""

DRAIN_S: Final = 10.0
"""How long a stopping service waits for the requests under way, unless told otherwise."""


_STOP_S: Final = 2.0
"""How long taking back the subscriptions may take, at least."""


class ErrorBody(msgspec.Struct, omit_defaults=True, frozen=True):
    """What an error reply says, as JSON ``{"error": {…}}``; ``code`` is stable, ``message`` is for people."""

    code: str
    message: str
    field: str | None = None
    limit: int | str | None = None
    hint: str | None = None
    details: dict[str, Any] = {}

    @classmethod
    def of(cls, error: HoldfastError) -> ErrorBody:
        """Returns what to tell of an error."""
        return cls(
            code=error.code,
            message=error.message,
            field=error.field,
            limit=error.limit,
            hint=error.hint,
            details={name: getattr(error, name) for name in error.details},
        )


class ErrorReply(msgspec.Struct, frozen=True):
    """The payload of an error reply."""

    error: ErrorBody


class Call:
    """One request.  ``namespace`` is decoded from the subject; ``reply`` may be used several times."""

    __slots__ = ("_request", "data", "headers", "namespace", "subject")

    def __init__(self, request: Request, namespace: str) -> None:
        self._request = request
        self.namespace = namespace
        self.subject = request.subject
        self.data = request.data
        self.headers: Mapping[str, str] = request.headers or {}

    async def reply(self, payload: bytes, headers: dict[str, str] | None = None) -> None:
        """Sends an answer.  Raises TooLargeError when it is over what the server takes."""
        try:
            await self._request.respond(payload, headers)
        except nats.errors.MaxPayloadError as error:
            raise TooLargeError(
                f"the answer of {len(payload)} bytes does not fit one message",
                field="body",
                limit=limits.REPLY_BYTES,
                hint="resolve it with the SDK, which fetches a large body in parts",
            ) from error
        except ValueError:
            logger.debug("a request without a reply subject", extra={"action": "no_reply", "subject": self.subject})


Handler = Callable[[Call], Awaitable[None]]


class Answer(NamedTuple):
    """What is sent in answer to a request."""

    payload: bytes
    headers: dict[str, str] | None = None


AtHand = Callable[[str, bytes, Mapping[str, str]], "Answer | None"]
"""Given namespace, payload and headers of a request, returns its answer if that is at hand, without waiting and in well
under a millisecond; None for whatever else there is to it, which is then the handler's, errors included."""


class EndpointCounters(msgspec.Struct):
    """Requests answered, of them those whose answer was ``at_hand``, refused with a typed error, and failed
    unexpectedly; seconds spent."""

    answered: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    at_hand: int = 0


class _Service(Service):
    """Tells also of requests that never reached nats-py."""

    def __init__(self, connection: Connection, config: ServiceConfig, counters: Mapping[str, EndpointCounters]) -> None:
        super().__init__(connection.client, config)
        self._counters = counters

    def stats(self) -> ServiceStats:
        stats = super().stats()
        for endpoint in stats.endpoints:
            endpoint.num_requests += self._counters[endpoint.name].at_hand
        return stats


@asynccontextmanager
async def serve(
    connection: Connection,
    *,
    name: str,
    version: str,
    description: str,
    endpoints: Mapping[str, tuple[str, Handler]],
    namespace_at: int | None = 1,
    at_hand: Mapping[str, AtHand] | None = None,
    drain_timeout_s: float = DRAIN_S,
) -> AsyncGenerator[dict[str, EndpointCounters]]:
    """Runs a NATS service while the block lasts; yields the counters of its endpoints, by name.

    ``endpoints``: name → (subject, handler).  ``namespace_at``: which token of the subject is the namespace; None for
    endpoints that have none.  ``at_hand``: by the name of an endpoint, what answers at once what it can, before its
    handler is asked.  At the end no new request is taken, and those under way are waited for up to
    ``drain_timeout_s``, then cancelled.
    """
    room = asyncio.Semaphore(MAX_REQUESTS)
    tasks: set[asyncio.Task[None]] = set()
    counters = {endpoint: EndpointCounters() for endpoint in endpoints}

    def receiver(endpoint: str, handler: Handler) -> Callable[[Request], Awaitable[None]]:
        async def receive(request: Request) -> None:
            await room.acquire()
            task = asyncio.get_running_loop().create_task(
                _answer(request, handler, counters[endpoint], namespace_at), name=f"holdfast-{endpoint}"
            )
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda _: room.release())

        return receive

    config = ServiceConfig(name=name, version=version, description=description)
    service = _Service(connection, config, counters)
    await service.start()
    try:
        for endpoint, (subject, handler) in endpoints.items():
            await service.add_endpoint(
                EndpointConfig(name=endpoint, subject=subject, handler=receiver(endpoint, handler))
            )
        for endpoint, answer in (at_hand or {}).items():
            taker = _taker(connection, answer, counters[endpoint], namespace_at)
            connection.client.divert(endpoints[endpoint][0], taker)
        # Once this has returned, the server routes requests to us.
        await connection.client.flush()
        yield counters
    finally:
        try:
            # Even where nothing is waited for: requests are to go to another one from now on.
            await asyncio.wait_for(service.stop(), max(drain_timeout_s, _STOP_S))
        except (nats.errors.Error, TimeoutError, OSError):
            logger.debug("stopping a service without a connection", exc_info=True)
        if tasks:
            await asyncio.wait(tasks, timeout=drain_timeout_s)
        # Awaited: nothing may still read what the caller closes next.
        left = [task for task in tasks if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _taker(connection: Connection, at_hand: AtHand, counters: EndpointCounters, namespace_at: int | None) -> Sink:
    client = connection.client

    def take(subject: bytes, reply: bytes, payload: bytes, block: bytes | None) -> bool:
        started = time.perf_counter()
        try:
            namespace = "" if namespace_at is None else _namespace_of(subject, namespace_at)
            answer = at_hand(namespace, payload, read_headers(block) or {})
            if answer is None or not client.publish_now(reply.decode(), answer.payload, "", answer.headers):
                return False
        except (HoldfastError, UnicodeDecodeError):
            return False  # the handler refuses it, and says why
        except Exception:
            # Raised, it would end the read loop of the connection.
            logger.exception("request failed", extra={"action": "request_failed", "subject": repr(subject)})
            return False
        counters.answered += 1
        counters.at_hand += 1
        counters.seconds += time.perf_counter() - started
        return True

    return take


async def _answer(request: Request, handler: Handler, counters: EndpointCounters, namespace_at: int | None) -> None:
    started = time.perf_counter()
    try:
        namespace = "" if namespace_at is None else _namespace(request.subject, namespace_at)
        await handler(Call(request, namespace))
        counters.answered += 1
    except HoldfastError as error:
        counters.refused += 1
        await _refuse(request, error)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        counters.failed += 1
        logger.exception("request failed", extra={"action": "request_failed", "subject": request.subject})
        await _refuse(request, HoldfastError(f"internal error: {type(error).__name__}", hint="see the worker's log"))
    finally:
        counters.seconds += time.perf_counter() - started


def _namespace(subject: str, position: int) -> str:
    return check_namespace(decode_token(subject.split(".")[position]))


@lru_cache(_SUBJECTS)
def _namespace_of(subject: bytes, position: int) -> str:
    return _namespace(subject.decode(), position)


async def _refuse(request: Request, error: HoldfastError) -> None:
    body = ErrorReply(ErrorBody.of(error))
    description = str(error).encode("ascii", "backslashreplace").decode()[:500]
    try:
        await request.respond_error(str(error.status), description, msgspec.json.encode(body))
    except (nats.errors.Error, ValueError, OSError):
        logger.debug("an error reply could not be sent", exc_info=True)


# msgspec says which member is wrong, and what its bound is, in its message alone:
#   Expected `str` of length <= 256 - at `$.session_id`
#   Object missing required field `ref`
_AT: Final = re.compile(r" - at `\$\.?([^`]*)`\Z")
_MEMBER: Final = re.compile(r"(?:missing required|contains unknown) field `([^`]+)`")
_BOUND: Final = re.compile(r"[<>]= (\d+)")


def _invalid(message: str) -> InvalidFieldError:
    place = _AT.search(message)
    text = message if place is None else message[: place.start()]
    member = _MEMBER.search(text)
    bound = _BOUND.search(text)
    path = [place[1] if place else "", member[1] if member else ""]
    return InvalidFieldError(
        f"request does not fit: {text[:300]}",
        field=".".join(filter(None, path))[:_FIELD_CHARS] or "request",
        limit=int(bound[1]) if bound else None,
    )


def decode_request(payload: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Returns a request decoded by ``decoder``; raises InvalidFieldError naming what is wrong with it."""
    try:
        return decoder.decode(payload or b"{}")
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except UNDECODABLE as error:
        raise InvalidFieldError(
            f"request is not JSON: {error}", field="request", hint='send a JSON object, such as {"ref": "ctx_…"}'
        ) from error
