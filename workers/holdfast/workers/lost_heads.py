"""Puts back the newest versions of named contexts that a stream has lost and the lake still holds.

A stream that lost its tail shows an older version as a key's newest.  Whoever writes then gives the next version a
number that other content in the lake has already, so that one of the two, both acknowledged, would have no place.  The
newest archived version, written again behind the old one, closes the gap: readers see it, and writers go on after it.
The archiver, which comes to it again, finds it in the lake and takes it for the repetition that it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import duckdb

from holdfast.lake import connect
from holdfast.lake.lookup import Lookup
from holdfast.schemas import limits
from holdfast.schemas.errors import TooLargeError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.streams.decode import encode_key_version
from holdfast.streams.key_chains import Head
from holdfast.streams.key_log import KeyLog
from holdfast.streams.publish import (
    WRONG_LAST_SEQUENCE,
    Outgoing,
    PubAck,
    Refused,
    publish_batch,
    publish_each,
)
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import H_EXPECT_SUBJECT_SEQ, KEYS_STREAM, key_subject

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.connection import Connection

logger = logging.getLogger(__name__)

_PAGE: Final = 1_000
TOMBSTONES: Final = ("delete", "expire")

_DAY_MS: Final = 86_400_000
TRIMMED_MS: Final = 30 * _DAY_MS
"""Only an archived tombstone that is older than this leaves the stream rightly (see :mod:`holdfast.workers.trim`)."""

_NEWEST: Final = """
SELECT namespace, key, max(version), arg_max(op, version), epoch_ms(arg_max(stored_at, version)) FROM key_versions
GROUP BY namespace, key ORDER BY max(stored_at) DESC, namespace, key"""
"""Those that were written last come first: the next writer is likely to be theirs."""


async def restore_heads(connection: Connection, lake: Lake, index: LakeIndex, executor: Executor) -> int:
    """Writes the newest archived version of each key that is older in the stream, or is not there; returns how many.

    Reads the whole list of keys, in ``executor``, which has one thread.  Doing it again, or a writer who is faster,
    changes nothing that is newer.  What has left the stream rightly, as an old tombstone, stays away.  Raises
    UnavailableError when the list of keys cannot be made now, and a RetryError when the server does not store; after
    that, and after a cancel, some may be put back.
    """
    info = await call_with_retry(lambda: stream_info(connection, KEYS_STREAM), deadline_s=READ_DEADLINE_S)
    # At the leader of a cluster: a copy that lags shows an older head, which nothing can be written behind.
    log = KeyLog(connection, replicas=info.replicas)
    pages = _archived_keys(lake, now_ms() - TRIMMED_MS)
    try:
        restored = await _restore(connection, log, pages, lake, index, executor)
    finally:
        # In the thread that may still be reading a page for a call that was cancelled.
        executor.submit(pages.close)
        await log.close()
    if restored:
        logger.warning("newest versions of keys were put back", extra={"action": "heads_restored", "keys": restored})
    return restored


async def _restore(
    connection: Connection,
    log: KeyLog,
    pages: Iterator[list[_Newest]],
    lake: Lake,
    index: LakeIndex,
    executor: Executor,
) -> int:
    loop = asyncio.get_running_loop()
    restored = 0
    while page := await loop.run_in_executor(executor, lambda: next(pages, None)):
        losses = log.losses
        heads = await _heads(log, page)
        lost = [newest for newest in page if _is_lost(newest, heads.get((newest.namespace, newest.key)))]
        rows = await loop.run_in_executor(executor, _read, lake, index, lost)
        for messages in _batches(_message(row, heads.get((row.namespace, row.key), Head())) for row in rows):
            if log.losses != losses:
                # The stream may have lost its end once more: what is expected may be another version's by now.
                raise UnavailableError("the connection was lost while keys were put back", hint="it is begun again")
            restored += await _write(connection, messages)
    return restored


class _Newest(NamedTuple):
    """The newest archived version of a key; ``is_gone``: it may have left the stream."""

    namespace: str
    key: str
    version: int
    is_gone: bool


async def _heads(log: KeyLog, page: list[_Newest]) -> dict[tuple[str, str], Head]:
    """Returns what the stream has of these keys as the newest, by namespace and key."""
    by_namespace: dict[str, list[str]] = {}
    for newest in page:
        by_namespace.setdefault(newest.namespace, []).append(newest.key)
    return {
        (namespace, key): head
        for namespace, keys in by_namespace.items()
        for key, head in (await log.heads(namespace, keys)).items()
    }


def _is_lost(newest: _Newest, head: Head | None) -> bool:
    if head is None or head.row is None:
        return not newest.is_gone
    return head.row.version < newest.version


def _archived_keys(lake: Lake, gone_before_ms: int) -> Generator[list[_Newest]]:
    try:
        with connect(lake.path) as sql, sql.pinned():
            found: Any = sql.execute(_NEWEST)
            while page := found.fetchmany(_PAGE):
                yield [
                    _Newest(namespace, key, version, op in TOMBSTONES and stored_at_ms < gone_before_ms)
                    for namespace, key, version, op, stored_at_ms in page
                ]
    except duckdb.Error as error:
        # Out of memory, or of space for temporary files.  As it is it would end the archiver, which tries again when
        # it is told that a part of it does not answer; damage of the lake has been told apart by then.
        raise UnavailableError(
            f"the newest archived versions of the keys cannot be listed: {error}",
            hint="free memory, and space in the directory that the worker runs in, where DuckDB keeps what has no room",
        ) from error


def _read(lake: Lake, index: LakeIndex, wanted: list[_Newest]) -> list[KeyVersionRow]:
    if not wanted:
        return []
    index.refresh(lake)
    with Lookup(lake, index) as lookup:
        keys = [(newest.namespace, newest.key, newest.version) for newest in wanted]
        found = lookup.get_key_versions(keys)
        return [found[key] for key in keys if key in found]


def _batches(messages: Iterable[Outgoing]) -> Iterator[list[Outgoing]]:
    batch: list[Outgoing] = []
    size = 0
    for message in messages:
        batch.append(message)
        size += message.size
        if len(batch) >= limits.BATCH_MESSAGES or size >= limits.BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


async def _write(connection: Connection, messages: list[Outgoing]) -> int:
    """Stores them together, and when one does not let the others in, each by itself; returns how many are stored."""
    try:
        return len(await publish_batch(connection, messages))
    except (Refused, TooLargeError):
        outcomes = await publish_each(connection, messages)
    unfit: list[tuple[str, Exception]] = []
    for message, outcome in zip(messages, outcomes, strict=True):
        match outcome:
            case PubAck():
                pass
            case Refused(err_code=code) if code == WRONG_LAST_SEQUENCE:
                pass  # a writer was faster: what it wrote is told as a contradiction when it is archived
            case Refused() | TooLargeError():
                unfit.append((message.subject, outcome))
            case _:
                raise outcome
    if unfit:
        # To wait for them would keep all others from being archived.
        logger.error(
            "newest versions of keys were not put back: who writes such a key gives a number again",
            exc_info=unfit[0][1],
            extra={"action": "heads_not_restored", "keys": len(unfit), "first": unfit[0][0]},
        )
    return sum(isinstance(outcome, PubAck) for outcome in outcomes)


def _message(row: KeyVersionRow, head: Head) -> Outgoing:
    # Without its message id: the server may still know that, of the message that it has lost.
    headers = {H_EXPECT_SUBJECT_SEQ: str(head.last_seq)}
    return Outgoing(key_subject(row.namespace, row.key), headers, encode_key_version(row))
