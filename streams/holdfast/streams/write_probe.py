"""Whether a server stores writes, and if not, why: asked within seconds, and without touching anything of worth.

A server that failed once to write a stream's file stores nothing in that stream any more until it is restarted, even
when space is back: each publish is dropped without a word, so that its sender only sees a time-out.  Three questions
find that out, side by side:

* ``/healthz`` of the monitoring address, where it is known, names the streams and their errors;
* a purge of a subject that the stream cannot hold removes nothing, and is refused with the stream's write error;
* a message of two blocks of a file system is stored in ``HOLDFAST_PROBE``, a stream of one message that is made for it.

The last one finds a disk that is full before anybody else has tried to write to it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from holdfast.schemas.errors import HoldfastError, StorageFailedError
from holdfast.schemas.problems import Problem
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.connection import ApiError, ApiFailure, Connection
from holdfast.streams.monitoring import Health, get_health
from holdfast.streams.retry import NoResponderError
from holdfast.streams.wire import DEAD_STREAM, STREAM_OF_TABLE

State = Literal["ok", "refusing", "silent"]

PROBE_STREAM: Final = "HOLDFAST_PROBE"
PROBE_SUBJECT: Final = "holdfast.probe"

STREAMS: Final = (*STREAM_OF_TABLE.values(), DEAD_STREAM)
"""The streams that are asked for their write errors."""

ANSWER_S: Final = 2.0
"""How long each question is waited for: a server that is well answers in milliseconds."""

_PROBE_BYTES: Final = 8192
"""A smaller message may still find room in the last block of its file when the disk is full."""
_NOTHING: Final = "holdfast.nothing"
"""A subject that no stream of ours can hold."""

# Error codes of the server (errors.json of nats-server).
PURGE_FAILED: Final = 10051
_STORE_FAILED: Final = 10077
_NAME_IN_USE: Final = 10058
_CREATE_FAILED: Final = 10049
_NO_STORAGE: Final = frozenset({10023, 10028, 10047})
"""The server's own limits on storage: all streams together, or memory."""
_OFF: Final = frozenset({10039, 10076})
"""JetStream is disabled, which a server of a cluster does to itself when its disk is full."""

_GO_PATH_ERROR: Final = re.compile(r"(?:\A|[\s:])(?P<call>[a-z]+) (?P<path>/.*): (?P<cause>[^:]+)\Z", re.DOTALL)


class WriteError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a stream stores nothing.  ``cause`` is the operating system's word where there is one, as ``no space left on
    device`` or ``input/output error``; ``path`` the file that could not be written."""

    stream: str
    cause: str
    path: str = ""


class WriteState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a server stores writes.

    ``ok``: it does.  ``refusing``: it answers, and does not store: ``errors`` names the streams and the causes.
    ``silent``: it does not answer at all.  ``reason`` is the same in words, for a person.
    """

    state: State
    reason: str = ""
    errors: tuple[WriteError, ...] = ()


async def probe_writes(connection: Connection, *, stores: bool = True) -> WriteState:
    """Says within five seconds whether the server stores writes; never raises for what the server does.

    ``stores``: also store a message, in the stream ``HOLDFAST_PROBE`` that is made where it is missing and may be made.
    """
    monitor_urls = connection.target.monitor_urls
    health = asyncio.ensure_future(_ask_health(monitor_urls))
    purges = [asyncio.ensure_future(_ask_stream(connection, stream)) for stream in STREAMS]
    stored = asyncio.ensure_future(_store(connection) if stores else _nothing_asked())
    asked = [health, *purges, stored]
    try:
        await asyncio.wait(asked)
    finally:
        for task in asked:
            task.cancel()
    outcomes = [task.result() for task in asked]
    found = {error.stream: error for outcome in outcomes for error in outcome.errors}
    # Of a server that only forgets to answer the probe, that is what is wrong; with more to tell it says nothing new.
    errors = tuple(error for error in found.values() if error.cause != _UNACKNOWLEDGED or len(found) == 1)
    if not any(outcome.answered for outcome in outcomes):
        return WriteState(state="silent", reason="the server does not answer")
    if errors:
        return WriteState(state="refusing", reason=in_words(errors), errors=errors)
    return WriteState(state="ok")


async def require_writing(connection: Connection) -> None:
    """Returns when a message can be stored now; raises StorageFailedError when the disk is full, or failing.

    To be asked before a purge: one that cannot write its marks may lock up the whole of JetStream, reads included.
    """
    outcome = await _store(connection)
    if outcome.errors:
        raise StorageFailedError(
            f"the server cannot write to its disk: {in_words(outcome.errors)}",
            cause=outcome.errors[0].cause,
            hint="nothing is purged meanwhile; free space on that disk, or mend it",
        )


async def write_error_of(connection: Connection, stream: str, *, timeout_s: float = ANSWER_S) -> WriteError | None:
    """Returns the error that keeps a stream from storing anything, or None when it has none, or does not say so."""
    outcome = await _ask_stream(connection, stream, timeout_s)
    return next((error for error in outcome.errors if error.stream == stream), None)


def in_words(errors: tuple[WriteError, ...]) -> str:
    """Returns what keeps a server from storing, for a person: each cause once, with the streams it concerns."""
    streams_of: dict[str, list[str]] = {}
    for error in errors:
        streams_of.setdefault(error.cause, []).append(error.stream)
    return "; ".join(f"{cause} ({', '.join(streams)})" for cause, streams in streams_of.items())


def parse_write_error(stream: str, text: str) -> WriteError:
    """Returns what the server's words say; they are shown to people, and nothing is decided by them but the advice."""
    match = _GO_PATH_ERROR.search(text.strip())
    if match is None:
        return WriteError(stream=stream, cause=text.rpartition("write error: ")[2].strip() or "unknown")
    return WriteError(stream=stream, cause=match["cause"].strip(), path=match["path"])


def write_errors_in(health: Health) -> tuple[WriteError, ...]:
    """Returns the write errors of streams that ``/healthz`` tells.

    What else may be wrong with a server (no leader yet, a stream being recovered) is no failure to write.
    """
    failures = [item for item in health.errors if item.stream and "write error" in item.error]
    return tuple(parse_write_error(item.stream, item.error) for item in failures)


def problem_of(state: WriteState, server: str) -> Problem | None:
    """Returns what to tell an operator of a server that does not store; None of one that does."""
    if state.state == "ok":
        return None
    if state.state == "silent":
        return Problem(
            invariant="I8",
            object=server,
            what="the server does not answer",
            next_step="see whether its process runs, is stopped or waits for its disk; nothing acknowledged is lost",
        )
    path = next((error.path for error in state.errors if error.path), "")
    free = free_bytes(path)
    what = f"the server cannot write and acknowledges nothing: {state.reason}"
    what += f"; {path}" if path else ""
    what += f"; {free:,} bytes are free there" if free is not None else ""
    return Problem(
        invariant="I8",
        object=server,
        what=what,
        next_step="free space on the server's disk, or mend it; a server that 'holdfast up' runs then restarts by "
        "itself, restart another one. Nothing acknowledged is lost",
    )


def free_bytes(path: str) -> int | None:
    """Returns the bytes that are free on the file system of a path, or None when it is not on this machine."""
    here = Path(path)
    if not path:
        return None
    while not here.exists() and here != here.parent:
        here = here.parent
    if here == here.parent:
        return None
    disk = os.statvfs(here)
    return disk.f_bavail * disk.f_frsize


class _Outcome(msgspec.Struct, frozen=True):
    answered: bool
    errors: tuple[WriteError, ...] = ()


_UNACKNOWLEDGED: Final = "a write is not acknowledged"
_SILENCE: Final = _Outcome(answered=False)
_WELL: Final = _Outcome(answered=True)


async def _nothing_asked() -> _Outcome:
    return _SILENCE


async def _ask_health(monitor_urls: Sequence[str]) -> _Outcome:
    """What the nodes that answer say of themselves."""
    replies = await asyncio.gather(*(get_health(url, ANSWER_S) for url in monitor_urls), return_exceptions=True)
    answered = [reply for reply in replies if reply is None or isinstance(reply, Health)]
    errors = [error for reply in answered if reply is not None for error in write_errors_in(reply)]
    return _Outcome(answered=bool(answered), errors=tuple(errors)) if answered else _SILENCE


async def _ask_stream(connection: Connection, stream: str, timeout_s: float = ANSWER_S) -> _Outcome:
    # A sequence above 1, or the server answers without a look at its store.
    request = {"filter": _NOTHING, "seq": 2}
    try:
        await connection.api(f"STREAM.PURGE.{stream}", request, timeout_s=timeout_s)
    except ApiError as error:
        return _judged(stream, ApiFailure(error.http_code, error.err_code, error.description))
    except HoldfastError:
        return _SILENCE
    return _WELL


async def _store(connection: Connection) -> _Outcome:
    # Made anew, it has none of the errors that an earlier full disk left on it; and it is not left behind with one,
    # for ``/healthz`` would be unwell over nothing when space is back.
    outcome = await _store_once(connection)
    if outcome.errors and await _delete(connection):
        outcome = await _store_once(connection)
        if outcome.errors:
            await _delete(connection)
    return outcome


async def _delete(connection: Connection) -> bool:
    try:
        await connection.api(f"STREAM.DELETE.{PROBE_STREAM}", timeout_s=ANSWER_S / 4)
    except HoldfastError:
        return False
    return True


async def _store_once(connection: Connection) -> _Outcome:
    payload = bytes(_PROBE_BYTES)
    for _ in range(2):
        try:
            reply = await connection.lean.request(PROBE_SUBJECT, payload, timeout_s=ANSWER_S / 2)
        except NoResponderError:
            outcome = await _create(connection)
            if outcome is not None:
                return outcome
            continue
        except HoldfastError:
            return await _unacknowledged(connection)
        try:
            failure = msgspec.json.decode(reply.data, type=_Ack).error
        except UNDECODABLE:
            return _WELL
        return _WELL if failure is None else _judged(PROBE_STREAM, failure)
    return _WELL


class _Ack(msgspec.Struct):
    error: ApiFailure | None = None


async def _unacknowledged(connection: Connection) -> _Outcome:
    """The outcome when a probe got no answer: of a server that answers other calls, it is a failure to store."""
    outcome = await _ask_stream(connection, PROBE_STREAM, ANSWER_S / 4)
    if not outcome.answered or outcome.errors:
        return outcome
    return _Outcome(answered=True, errors=(WriteError(stream=PROBE_STREAM, cause=_UNACKNOWLEDGED),))


async def _create(connection: Connection) -> _Outcome | None:
    """Makes the stream of the probe; returns the outcome when it cannot be made, None when it is there."""
    config: dict[str, Any] = {
        "name": PROBE_STREAM,
        "subjects": [PROBE_SUBJECT],
        "storage": "file",
        "retention": "limits",
        "discard": "old",
        "max_msgs": 1,
        "num_replicas": await _replicas(connection),
    }
    try:
        await connection.api(f"STREAM.CREATE.{PROBE_STREAM}", config, timeout_s=ANSWER_S / 2)
    except ApiError as error:
        if error.err_code == _NAME_IN_USE:
            return None
        failure = ApiFailure(error.http_code, error.err_code, error.description)
        if error.err_code in (_STORE_FAILED, _CREATE_FAILED):
            cause = f"no stream can be made: {error.description}"
            return _Outcome(answered=True, errors=(WriteError(stream=PROBE_STREAM, cause=cause),))
        return _judged(PROBE_STREAM, failure)
    except HoldfastError:
        return _SILENCE
    return None


async def _replicas(connection: Connection) -> int:
    """As many copies as the streams of events have; one when there are none yet."""
    try:
        info = await connection.api(f"STREAM.INFO.{STREAM_OF_TABLE['events']}", timeout_s=ANSWER_S / 4)
    except HoldfastError:
        return 1
    return int(info["config"].get("num_replicas", 1))


def _judged(stream: str, failure: ApiFailure) -> _Outcome:
    """What a refusal says: of a write error, of a limit on storage, or (no rights, no such stream) nothing."""
    code = failure.err_code
    if code == PURGE_FAILED:
        return _Outcome(answered=True, errors=(parse_write_error(stream, failure.description),))
    if code in _NO_STORAGE:
        return _Outcome(
            answered=True, errors=(WriteError(stream=stream, cause=f"storage limit: {failure.description}"),)
        )
    if code in _OFF:
        return _Outcome(answered=True, errors=(WriteError(stream=stream, cause="JetStream is disabled"),))
    return _WELL
