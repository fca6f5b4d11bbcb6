"""Lakes of millions of rows, made without the way through a server: same columns, same encodings, same commits.

Rows are built as Arrow columns, a row group of 2,000 at a time, and written by the product's own ``FileWriter``, which
encodes, fsyncs and counts them as it does for the archiver; they are committed to the Delta log as appends that
carry the watermark.  What is left out is the archiver's reading and decoding.  Bodies and digests are real: every
context can be resolved and is hashed again on its way.  The index is not made here: who opens the lake makes it.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from benchmarks.payloads import text_of
from holdfast.lake.columns import COLUMNS, ROWS_PER_GROUP, arrow_schema, day_of
from holdfast.lake.commit import Change
from holdfast.lake.writer import FileWriter, WrittenFile
from holdfast.schemas.refs import Ref, compute_digest, format_ref

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.schemas.rows import Table

NAMESPACE: Final = "bench"
BODY_BYTES: Final = 980
SESSION_STEPS: Final = 55
SESSIONS_AT_ONCE: Final = 200
AGENTS: Final = 50
VERSIONS_A_KEY: Final = 100
KEYS_AT_ONCE: Final = 1_000
DAYS: Final = 7
FILES_A_COMMIT: Final = 50

_EPOCH: Final = "synthetic"
_BEGAN_MS: Final = 1_760_000_000_000
_DAY_MS: Final = 86_400_000
_TEXT_BYTES: Final = 16 << 20
"""Much more than a row group holds: else zstd would find bodies again that no other body is like."""
_BLOCK: Final = SESSION_STEPS * SESSIONS_AT_ONCE

_LETTERS: Final = str.maketrans("0123456789", "abcdefghij")
"""A reference is spelt in a to z and 2 to 7."""
_SPREAD: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1

Group = Callable[[int, int, int], Any]
"""``group(first, count, stored_at_ms)``: rows ``first`` … as an Arrow table; all were stored at that time or shortly
after it, on the same day."""


class ContextRows:
    """Different contexts of ``BODY_BYTES``.  A context follows from the seed and its number, so any can be asked for
    without keeping ten million references."""

    def __init__(self, seed: int) -> None:
        self._text = text_of(random.Random(seed), _TEXT_BYTES)

    def ref(self, number: int) -> Ref:
        """Returns the reference of a context, the first being number 0."""
        return _ref(self._body(number))

    def _body(self, number: int) -> str:
        # Multiplied so that neighbours begin far apart in the text: zstd finds none of one in another.
        start = (number * _SPREAD & _MASK) % (len(self._text) - BODY_BYTES)
        head = f'{{"role":"assistant","step":{number},"text":"'
        return f'{head}{self._text[start : start + BODY_BYTES - len(head) - 2]}"}}'

    def __call__(self, first: int, count: int, stored_at_ms: int) -> Any:
        bodies = [self._body(number) for number in range(first, first + count)]
        refs = [_ref(body) for body in bodies]
        return _table(
            "contexts",
            count,
            ref=pa.array(refs),
            namespace=NAMESPACE,
            kind="context",
            content_type="application/json",
            form="plain",
            body=pa.array(bodies),
            size=pa.array([BODY_BYTES] * count, pa.int64()),
            created_at=_times(stored_at_ms, count),
            stored_at=_times(stored_at_ms, count),
            epoch=_EPOCH,
            stream_seq=pa.array(range(first + 1, first + count + 1), pa.int64()),
        )


def event_rows(first: int, count: int, stored_at_ms: int) -> Any:
    """Events of sessions of ``SESSION_STEPS`` steps, ``SESSIONS_AT_ONCE`` side by side, each step caused by the one
    before it."""
    numbers = np.arange(first, first + count, dtype=np.int64)
    within = numbers % _BLOCK
    sessions = numbers // _BLOCK * SESSIONS_AT_ONCE + within % SESSIONS_AT_ONCE
    depth = within // SESSIONS_AT_ONCE
    names = pa.array([session_name(int(session)) for session in sessions])
    return _table(
        "events",
        count,
        event_id=_uuids(numbers),
        namespace=NAMESPACE,
        name="plan:step",
        timestamp=_times(stored_at_ms, count),
        stored_at=_times(stored_at_ms, count),
        agent_id=pa.array([f"agent-{session % AGENTS}" for session in sessions]),
        session_id=names,
        correlation_id=names,
        parent_event_id=_uuids(numbers - SESSIONS_AT_ONCE, is_null=depth == 0),
        root_event_id=_uuids(numbers - depth * SESSIONS_AT_ONCE),
        event_depth=pa.array(depth, pa.int32()),
        data=pa.array([f'{{"step":{step},"tokens":{step * 37 % 4001}}}' for step in depth]),
        epoch=_EPOCH,
        stream_seq=pa.array(numbers + 1),
    )


def _ref_of_nothing(number: int) -> Ref:
    return Ref(f"ctx_context_{number:032d}".translate(_LETTERS))


def version_rows(first: int, count: int, stored_at_ms: int, *, ref_of: Callable[[int], Ref] = _ref_of_nothing) -> Any:
    """Versions of named contexts, ``VERSIONS_A_KEY`` of each; ``KEYS_AT_ONCE`` keys are written side by side.

    ``ref_of`` gives the reference of each by its number: :meth:`ContextRows.ref`, where somebody follows them.
    """
    numbers = np.arange(first, first + count, dtype=np.int64)
    block = KEYS_AT_ONCE * VERSIONS_A_KEY
    keys = numbers // block * KEYS_AT_ONCE + numbers % KEYS_AT_ONCE
    return _table(
        "key_versions",
        count,
        namespace=NAMESPACE,
        key=pa.array([key_name(int(key)) for key in keys]),
        version=pa.array(numbers % block // KEYS_AT_ONCE + 1),
        op="put",
        ref=pa.array([ref_of(int(number)) for number in numbers]),
        event_id=_uuids(numbers),
        agent_id="bench",
        timestamp=_times(stored_at_ms, count),
        stored_at=_times(stored_at_ms, count),
        epoch=_EPOCH,
        stream_seq=pa.array(numbers + 1),
    )


def session_name(number: int) -> str:
    """Returns the name of a session of :func:`event_rows`."""
    return f"session-{number}"


def key_name(number: int) -> str:
    """Returns the name of a key of :func:`version_rows`."""
    return f"plan.{number}"


def sessions_in(rows: int) -> int:
    """Returns how many sessions are whole among so many rows of :func:`event_rows`; of few rows, how many began."""
    return rows // _BLOCK * SESSIONS_AT_ONCE or min(rows, SESSIONS_AT_ONCE)


def keys_in(rows: int) -> int:
    """Returns how many keys have all their versions among so many rows of :func:`version_rows`; of few rows, how many
    have one."""
    return rows // (KEYS_AT_ONCE * VERSIONS_A_KEY) * KEYS_AT_ONCE or min(rows, KEYS_AT_ONCE)


def root_of(session: int) -> str:
    """Returns the id of the first event of a session."""
    number = session // SESSIONS_AT_ONCE * _BLOCK + session % SESSIONS_AT_ONCE
    return str(uuid.UUID(bytes=_uuid_bytes(np.array([number], dtype=np.int64))))


def append_rows(lake: Lake, table: Table, group: Group, *, first: int, rows: int, files: int, total: int) -> None:
    """Appends rows ``first`` … to a table, in so many files of about equal size, up to fifty of them in a commit.

    ``total`` is how many rows the table is to have in the end: they are spread over ``DAYS`` days.
    """
    edges = [first + rows * number // files for number in range(files + 1)]
    spans = [(start, end) for start, end in itertools.pairwise(edges) if start < end]
    with ThreadPoolExecutor(1) as executor:
        for position in range(0, len(spans), FILES_A_COMMIT):
            group_of_files = spans[position : position + FILES_A_COMMIT]
            written: list[WrittenFile] = []
            # One file is encoded and flushed while the rows of the next one are made.
            pending: Future[WrittenFile] | None = None
            for start, end in group_of_files:
                groups = list(_groups(group, start, end, total))
                if pending is not None:
                    written.append(pending.result())
                pending = executor.submit(_write_file, lake, table, groups)
            if pending is not None:
                written.append(pending.result())
            _commit(lake, table, written, group_of_files[0][0], group_of_files[-1][1])


def _ref(body: str) -> Ref:
    return format_ref("context", compute_digest(NAMESPACE, "context", body.encode()))


def _groups(group: Group, start: int, end: int, total: int) -> Iterator[tuple[int, Any]]:
    # All rows of a file are of the day of its first one: files are partitioned by it.
    day_ms = _BEGAN_MS + start * DAYS // max(1, total) * _DAY_MS
    span_ms = _DAY_MS - 60_000 - _BEGAN_MS % _DAY_MS
    rows_a_day = max(1, total // DAYS)
    for first in range(start, end, ROWS_PER_GROUP):
        stored_at_ms = day_ms + min(
            span_ms, (first - start * DAYS // max(1, total) * rows_a_day) * span_ms // rows_a_day
        )
        yield stored_at_ms, group(first, min(ROWS_PER_GROUP, end - first), stored_at_ms)


def _write_file(lake: Lake, table: Table, groups: list[tuple[int, Any]]) -> WrittenFile:
    with FileWriter(table, lake.table(table).directory, day_of(groups[0][0]), _EPOCH) as writer:
        for _, rows in groups:
            writer.copy_group(rows)
        return writer.finish()


def _commit(lake: Lake, table: Table, written: list[WrittenFile], start: int, end: int) -> None:
    lake.table(table).commit(
        lambda _: Change(
            action="append",
            app_id=f"{table}/{_EPOCH}",
            version=end,
            expected=start or None,
            adds=[file.add_action() for file in written],
            info={"epoch": _EPOCH, "first_seq": start + 1, "last_seq": end, "anchors": []},
        )
    )


def _table(table: Table, count: int, **given: Any) -> Any:
    """Completes the columns: a text stands for all rows, what is not given is null."""
    arrays: list[Any] = []
    for column in COLUMNS[table]:
        value = given.get(column.name)
        if value is None:
            arrays.append(pa.nulls(count, column.type))
        elif isinstance(value, str):
            arrays.append(pa.array([value] * count))
        else:
            arrays.append(value)
    return pa.Table.from_arrays(arrays, schema=arrow_schema(table))


def _times(stored_at_ms: int, count: int) -> Any:
    return pa.array(np.arange(count, dtype=np.int64) // 100 * 1_000 + stored_at_ms * 1_000, pa.timestamp("us"))


def _uuids(numbers: Any, *, is_null: Any = None) -> Any:
    raw = _uuid_bytes(numbers)
    storage = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(numbers), [None, pa.py_buffer(raw)])
    if is_null is not None:
        storage = pa.array(
            [None if null else value for null, value in zip(is_null, storage.to_pylist(), strict=True)], pa.binary(16)
        )
    return pa.ExtensionArray.from_storage(pa.uuid(), storage)


def _uuid_bytes(numbers: Any) -> bytes:
    """UUIDv7 of the time that a number stands for, 62 bits of it mixed well: as unlike each other as real ones."""
    high = (_BEGAN_MS + numbers).astype(np.uint64) << np.uint64(16)
    mixed = numbers.astype(np.uint64) * np.uint64(_SPREAD)
    high |= np.uint64(0x7000) | (mixed >> np.uint64(52))
    low = np.uint64(0x8000000000000000) | (mixed >> np.uint64(2))
    return np.stack([high, low], axis=1).astype(">u8").tobytes()
