"""Asking the resolver: for contexts that have left the hot tier, and for events."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.errors import HoldfastError, InvalidFieldError, UnavailableError
from holdfast.schemas.refs import Digest
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.arrivals import next_of
from holdfast.streams.codec import unseal
from holdfast.streams.lean import is_no_responder
from holdfast.streams.retry import NOBODY_S, READ_DEADLINE_S, NoResponderError, call_with_retry
from holdfast.streams.service import ErrorBody, ErrorReply
from holdfast.streams.wire import H_CREATED, H_DIGEST, H_END, H_SERVICE_ERROR, service_subject

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow
    from holdfast.streams.connection import Connection, Msg
    from holdfast.streams.hot import ColdChunks

_FETCH: Final = 1_000
"""Digests in one request."""

_SILENCE_S: Final = 10.0
"""How long one answer of many may take: a cold look-up is some milliseconds, a busy lake some hundred."""


class FetchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for stored forms by digest; the answer is a message for each that was found, then one with ``Hf-End``.

    ``cold``: of the lake alone, when the hot copy has proved to be damaged.
    """

    digests: list[Digest]
    cold: bool = False


class FetchEnd(msgspec.Struct, frozen=True):
    """Ends the answer: how many messages came before, and the digests that could not be served, with the reason."""

    sent: int
    failed: dict[Digest, ErrorBody] = {}


_FOREIGN: Final = "does another service answer on this subject? see 'nats micro ls'"

_ERROR: Final = msgspec.json.Decoder(ErrorReply)
_END: Final = msgspec.json.Decoder(FetchEnd)
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])


class ResolverClient:
    """Calls of the resolver service for one namespace."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        self._connection = connection
        self._namespace = namespace

    async def fetch(
        self, digests: Sequence[Digest], *, cold: bool = False
    ) -> tuple[dict[Digest, ContextRow], dict[Digest, HoldfastError]]:
        """Returns stored forms (a manifest stays one) by digest, each checked, and the errors of the damaged ones.

        Digests that are stored nowhere are in neither; with ``cold``, those that the lake does not hold.  Raises
        UnavailableError when no resolver runs.
        """
        found: dict[Digest, ContextRow] = {}
        failed: dict[Digest, HoldfastError] = {}
        for start in range(0, len(digests), _FETCH):
            page = list(digests[start : start + _FETCH])
            rows, errors = await call_with_retry(
                partial(self._fetch, FetchRequest(page, cold)), deadline_s=READ_DEADLINE_S, nobody_s=NOBODY_S
            )
            found |= rows
            failed |= errors
        return found, failed

    async def call(self, endpoint: str, request: object) -> dict[str, Any]:
        """Calls an endpoint with a JSON request and returns its JSON answer; raises what the resolver refused with."""
        return await call_with_retry(
            lambda: self._call(endpoint, request), deadline_s=READ_DEADLINE_S, nobody_s=NOBODY_S
        )

    async def _call(self, endpoint: str, request: object) -> dict[str, Any]:
        subject = service_subject(self._namespace, endpoint)
        try:
            reply = await self._connection.lean.request(subject, msgspec.json.encode(request), timeout_s=_SILENCE_S)
        except NoResponderError as error:
            raise _no_resolver() from error
        if reply.headers and H_SERVICE_ERROR in reply.headers:
            raise _refusal(reply)
        try:
            return _OBJECT.decode(reply.data)
        except UNDECODABLE as error:
            raise UnavailableError(f"the answer of {subject} is not a JSON object", hint=_FOREIGN) from error

    async def _fetch(self, asked: FetchRequest) -> tuple[dict[Digest, ContextRow], dict[Digest, HoldfastError]]:
        found: dict[Digest, ContextRow] = {}
        failed: dict[Digest, HoldfastError] = {}
        request = msgspec.json.encode(asked)
        async with self._connection.lean.stream(service_subject(self._namespace, "fetch"), request) as queue:
            while True:
                try:
                    message = await next_of(queue, _SILENCE_S)
                except TimeoutError as error:
                    raise UnavailableError("the resolver stopped answering", hint="see 'holdfast health'") from error
                headers = message.headers or {}
                if H_SERVICE_ERROR in headers:
                    raise _refusal(message)
                if is_no_responder(message):
                    raise _no_resolver()
                if H_END in headers:
                    end = _end(message)
                    if end.sent != len(found) + len(failed):
                        raise UnavailableError("the resolver's answer arrived in part")
                    return found, failed | {digest: error_of(body) for digest, body in end.failed.items()}
                digest = Digest(headers.get(H_DIGEST, ""))
                try:
                    found[digest] = unseal(
                        self._namespace,
                        digest,
                        headers,
                        message.data,
                        stored_at_ms=_milliseconds(headers.get(H_CREATED, "")),
                    )
                except HoldfastError as error:
                    failed[digest] = error


def cold_chunks(connection: Connection) -> ColdChunks:
    """Returns a reader of parts that have left the hot tier, for a :class:`HotTier` of any namespace."""

    async def read(namespace: str, digests: Sequence[Digest]) -> dict[Digest, ContextRow]:
        rows, errors = await ResolverClient(connection, namespace).fetch(digests, cold=True)
        for error in errors.values():
            raise error
        return rows

    return read


def error_of(body: ErrorBody) -> HoldfastError:
    """Returns the error that an error reply describes, of the class whose code it names."""
    chosen = _BY_CODE.get(body.code, HoldfastError)
    details = {name: body.details[name] for name in chosen.details if name in body.details}
    return chosen(body.message, hint=body.hint, field=body.field, limit=body.limit, **details)


def _refusal(message: Msg) -> HoldfastError:
    try:
        return error_of(_ERROR.decode(message.data).error)
    except UNDECODABLE:
        description = (message.headers or {}).get(H_SERVICE_ERROR, "")
        return UnavailableError(f"a service refused the call with code {description[:40]}", hint=_FOREIGN)


def _end(message: Msg) -> FetchEnd:
    try:
        return _END.decode(message.data)
    except UNDECODABLE as error:
        raise UnavailableError("the end of the resolver's answer does not decode", hint=_FOREIGN) from error


def _milliseconds(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 15:
        return int(text)
    raise InvalidFieldError(f"{text[:20]!r} is not a time in milliseconds", field=H_CREATED, hint=_FOREIGN)


def _no_resolver() -> UnavailableError:
    return NoResponderError(
        "no resolver answers on this server",
        hint="start one with 'holdfast up' or 'holdfast worker resolver'",
    )


def _by_code() -> dict[str, type[HoldfastError]]:
    classes: dict[str, type[HoldfastError]] = {}
    pending: list[type[HoldfastError]] = [HoldfastError]
    while pending:
        current = pending.pop()
        pending.extend(current.__subclasses__())
        # DriftError takes differences, which do not travel; it is never a reply.
        if current.__init__ is HoldfastError.__init__ or current.details:
            classes.setdefault(current.code, current)
    return classes


_BY_CODE: Final = _by_code()

__all__ = ["FetchEnd", "FetchRequest", "ResolverClient", "error_of"]
