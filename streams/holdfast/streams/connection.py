"""One connection to a NATS server, set up so that a dead link is noticed and nothing is replayed unasked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
import nats.errors
from nats.aio.msg import Msg

from holdfast.schemas.errors import ConfigurationError, HoldfastError, UnavailableError, UnknownOutcomeError
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.connection_target import ConnectionTarget, mask_url
from holdfast.streams.lean import Lean
from holdfast.streams.retry import ATTEMPT_S, NoResponderError
from holdfast.streams.tolerant_client import TolerantClient

logger = logging.getLogger(__name__)

CONNECT_S: Final = 1.0
"""How long the first connection is tried.  A user who forgot to start a server should read so at once; workers,
which may start before their server, ask for longer."""

_PING_S: Final = 10
_PING_OF_CLUSTER_S: Final = 2
"""Where there are other servers to go to, a link that went dead without a word is noticed at the third missing answer,
in 6 s instead of 30: well within the time that a write is tried."""

_RETRY_S: Final = 0.1
_CLOSE_S: Final = 2.0
"""How long a server that does not answer is waited for when a connection is closed, twice at most."""

_PENDING_BYTES: Final = 8 * 1024 * 1024
"""Most bytes that wait to be sent: several batches, so that bursts do not flush one by one."""


class ApiFailure(msgspec.Struct, frozen=True):
    """The ``error`` member of a JetStream answer."""

    code: int = 0
    err_code: int = 0
    description: str = ""


_NOT_NOW: Final = frozenset({10004, 10008, 10009, 10075, 10118, 10119, 10163, 10167})
"""Refusals of a cluster that is choosing a leader, or is overrun (errors.json of nats-server): the same call may
succeed a moment later."""


_SWITCHED_OFF: Final = frozenset({10039, 10076})
"""A server that stops, or whose disk is full, ends JetStream first and still answers for a while."""


class ApiError(HoldfastError):
    """JetStream refused a call; ``err_code`` tells why (its numbers are stable, its words are not)."""

    code = "jetstream"

    def __init__(self, failure: ApiFailure, subject: str) -> None:
        super().__init__(f"JetStream refused {subject}: {failure.description} ({failure.code}/{failure.err_code})")
        self.http_code = failure.code
        self.err_code = failure.err_code
        self.description = failure.description

    @property
    def is_passing(self) -> bool:
        """Whether the server has JetStream switched off just now, as while it stops."""
        return self.err_code in _SWITCHED_OFF


class _Answer(msgspec.Struct):
    error: ApiFailure | None = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])


class Connection:
    """A NATS client with its lean request layer.  Made by :func:`open_connection`."""

    def __init__(self, client: TolerantClient, lean: Lean, target: ConnectionTarget) -> None:
        self.client = client
        self.lean = lean
        self.target = target
        self.reconnects = 0
        self.losses = 0
        """How often the connection was lost: known before anything goes over the next one."""
        self.refusing: set[str] = set()
        """Streams that were found to store nothing; :mod:`holdfast.streams.storing` asks them again."""
        self.unknown_writes = 0
        """Attempts to store something that no acknowledgement came of; each was tried again, or told to the caller."""
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_close: list[Callable[[], None]] = []
        """Called once, when every further call raises ClosedError."""

    def close(self) -> None:
        """Fails what is under way, and every call from now on, with ClosedError.  Harmless when called twice."""
        self.lean.close()
        callbacks, self.on_close = self.on_close, []
        for callback in callbacks:
            callback()

    async def api(self, subject: str, request: object = None, *, timeout_s: float = ATTEMPT_S) -> dict[str, Any]:
        """Calls the JetStream API ``$JS.API.<subject>``; returns its answer, raises ApiError when it refuses.

        Raises UnavailableError when nobody can answer now, as while a cluster chooses a leader.
        """
        payload = b"" if request is None else msgspec.json.encode(request)
        try:
            message = await self.lean.request(f"$JS.API.{subject}", payload, timeout_s=timeout_s)
        except NoResponderError as error:
            raise NoResponderError(
                "the NATS server does not answer JetStream calls",
                hint="start it with JetStream (nats-server -js), or grant this user $JS.API",
            ) from error
        try:
            failure = _ANSWER.decode(message.data).error
            answer: dict[str, Any] = _OBJECT.decode(message.data)
        except UNDECODABLE as error:
            raise UnavailableError(
                f"what came in answer to {subject} is none of JetStream's",
                hint="see who may publish to _INBOX.> on this server; the same call may be sent again",
            ) from error
        if failure is not None:
            if failure.err_code in _NOT_NOW:
                raise UnavailableError(
                    f"the cluster cannot answer {subject} now: {failure.description} ({failure.err_code})",
                    hint="it is tried again; if it lasts, see which servers of the cluster are up",
                )
            raise ApiError(failure, subject)
        return answer


@asynccontextmanager
async def open_connection(
    target: ConnectionTarget | str,
    *,
    name: str = "holdfast",
    connect_s: float = CONNECT_S,
) -> AsyncGenerator[Connection]:
    """Connects to the server that ``target`` names and yields the connection; flushes and closes it at the end.

    Reconnects for ever once connected.  What was not sent when a connection was lost is never sent later, unasked: who
    wrote it is told, and may write it again.  Leaving the block takes some seconds at most, whatever the server does.
    Raises UnavailableError when no server answers within ``connect_s`` seconds, ConfigurationError when it refuses the
    credentials.
    """
    if isinstance(target, str):
        target = ConnectionTarget(url=target, origin="the address given")
    events = _Events()
    client = await _connected(target, name, events, time.monotonic() + connect_s)
    try:
        async with Lean(client) as lean:
            events.connection = connection = Connection(client, lean, target)
            try:
                yield connection
            finally:
                connection.close()
    finally:
        events.is_closing = True
        if not client.is_closed:
            await _close(client)


class _Events:
    """What nats-py tells of a connection."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.is_closing = False

    async def on_error(self, error: Exception) -> None:
        # While connecting, the last error is raised, and says more; while reconnecting, each attempt would be one.
        is_expected = self.connection is None or self.is_closing or not self.connection.client.is_connected
        level = logging.DEBUG if is_expected else logging.WARNING
        logger.log(level, "nats error", extra={"action": "nats_error", "error": repr(error)})

    async def on_disconnected(self) -> None:
        if self.connection is None or self.is_closing:
            return
        self.connection.losses += 1
        logger.warning("connection to nats lost", extra={"action": "nats_disconnected"})
        # No answer can come any more to what is under way: whoever waits shall not wait for a time-out.
        self.connection.lean.fail_in_flight(
            UnknownOutcomeError("the connection was lost before an answer came", hint="the same call may be sent again")
        )

    async def on_reconnected(self) -> None:
        logger.info("connected to nats again", extra={"action": "nats_reconnected"})
        if self.connection is not None:
            self.connection.reconnects += 1
            self.connection.lean.reconnected()
            for callback in self.connection.on_reconnect:
                callback()

    async def on_closed(self) -> None:
        if self.connection is None or self.is_closing:
            return
        # Such as over credentials that are no longer good: nats-py does not connect anew after that.
        logger.error("connection to nats closed for good", extra={"action": "nats_closed"})
        self.connection.close()


async def _connected(target: ConnectionTarget, name: str, events: _Events, deadline: float) -> TolerantClient:
    options = target.connect_options()
    ping_s = _PING_S if len(options.get("servers", ())) == 1 else _PING_OF_CLUSTER_S
    while True:
        client = TolerantClient()
        try:
            await asyncio.wait_for(
                client.connect(
                    name=name,
                    error_cb=events.on_error,
                    disconnected_cb=events.on_disconnected,
                    reconnected_cb=events.on_reconnected,
                    closed_cb=events.on_closed,
                    # The first connection is ours to retry: nats-py would go on for ever, also over a refusal.
                    # So each address has two attempts of nats-py's, then the error comes to us.
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=_RETRY_S,  # type: ignore[arg-type]  # seconds for asyncio.sleep
                    ping_interval=ping_s,
                    max_outstanding_pings=2,
                    pending_size=_PENDING_BYTES,
                    **options,
                ),
                ATTEMPT_S,
            )
            client.options["allow_reconnect"] = True
            client.options["max_reconnect_attempts"] = -1
            if client.is_closed:
                # The server went away in between, and nats-py had not yet been told to connect anew.
                raise nats.errors.ConnectionClosedError
            return client
        except asyncio.CancelledError:
            await client.close()
            raise
        except (TimeoutError, OSError, nats.errors.Error) as error:
            await client.close()
            if "authorization" in str(error).lower():
                raise ConfigurationError(
                    f"the NATS server at {mask_url(target.url)} refuses these credentials",
                    hint="check --nats-creds, the NATS context or the user in the URL",
                ) from error
            if time.monotonic() >= deadline:
                raise UnavailableError(
                    f"no NATS server answers at {mask_url(target.url)}",
                    hint="start one with 'holdfast up', or check the URL",
                ) from error
            await asyncio.sleep(_RETRY_S)


async def _close(client: TolerantClient) -> None:
    """Sends what is pending, bounded in time, and closes."""
    has_sent = False
    try:
        if client.is_connected:
            await asyncio.wait_for(client.flush(), _CLOSE_S)
            has_sent = True
    except (TimeoutError, nats.errors.Error, OSError):
        logger.debug("flush before closing failed", exc_info=True)
    finally:
        # Also when the flush was cancelled: a client that is not closed connects anew for ever.
        if not has_sent:
            client.abort()
        # A farewell that the other side does not take, as TLS has one, would be waited for.
        cut_off = asyncio.get_running_loop().call_later(_CLOSE_S, client.abort)
        try:
            await client.close()
        except OSError:
            logger.debug("closing failed", exc_info=True)
        finally:
            cut_off.cancel()
            client.abort()


__all__ = ["ApiError", "Connection", "Msg", "open_connection"]
