"""Named contexts in SQL: current keys, keys as of a time, totals; and contexts whose parts are shared."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import msgspec
import pytest

from holdfast.lake import Lake, LakeIndex, Lookup, compact, connect, verify_lake, write_views_file
from holdfast.schemas.errors import DigestMismatchError, IntegrityError
from tests.test_lake_samples import EPOCH, T0_MS, MemoryTail, archive, context, event, key_version, key_versions, touch

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow, KeyVersionRow, Row

LATER_MS = 2_000_000_000_000
T0 = datetime(1970, 1, 1) + timedelta(milliseconds=T0_MS)  # noqa: DTZ001  as the views give it


def chain(first_seq: int, key: str, ops: str, **changes: Any) -> list[KeyVersionRow]:
    """Versions 1, 2 … of a key: p(ut), d(elete), e(xpire)."""
    names: dict[str, Any] = {"p": "put", "d": "delete", "e": "expire"}
    return [key_version(first_seq + n, key=key, version=n + 1, op=names[op], **changes) for n, op in enumerate(ops)]


def keys_of_all_kinds() -> list[Row]:
    future, past = LATER_MS * 2, T0_MS + 500
    return [
        *chain(1, "plain", "ppp"),
        *chain(4, "gone", "pd"),
        *chain(6, "back", "pdp"),
        *chain(9, "expired", "pe"),
        *chain(11, "late", "p", expires_at_ms=past),
        *chain(12, "lives", "p", expires_at_ms=future),
        *chain(13, "plain", "p", namespace="other"),
    ]


LIVE = {
    ("default", "plain", 3, True),
    ("default", "gone", 2, False),
    ("default", "back", 3, True),
    ("default", "expired", 2, False),
    ("default", "late", 1, False),
    ("default", "lives", 1, True),
    ("other", "plain", 1, True),
}


def test_current_keys_are_the_newest_versions_and_whether_they_live(lake: Lake) -> None:
    rows = keys_of_all_kinds()
    archive(lake, "key_versions", rows[:5])
    archive(lake, "key_versions", rows[5:])
    with connect(lake.path) as sql:
        assert set(sql.execute("SELECT namespace, key, version, live FROM current_keys").fetchall()) == LIVE
        columns = sql.execute("DESCRIBE current_keys").fetchall()
        stored = sql.execute("DESCRIBE key_versions").fetchall()
        assert columns[: len(stored)] == stored
        assert [(name, kind) for name, kind, *_ in columns[len(stored) :]] == [("live", "BOOLEAN")]


def test_current_keys_take_in_what_is_not_archived_yet(lake: Lake) -> None:
    archive(lake, "key_versions", [*chain(1, "k", "pp")])
    tail = MemoryTail()
    for row in [*chain(1, "k", "ppdp"), key_version(5, key="new", version=1)]:
        tail.streams["key_versions"].publish(row)
    with connect(lake.path, tail=tail) as sql:
        query = "SELECT key, version, live FROM current_keys ORDER BY key"
        assert sql.execute(query).fetchall() == [("k", 4, True), ("new", 1, True)]
        tail.streams["key_versions"].publish(key_version(6, key="k", version=5, op="delete"))
        assert sql.execute(query).fetchall() == [("k", 5, False), ("new", 1, True)]


@pytest.mark.parametrize(
    ("moment", "value"),
    [
        ("?", T0 + timedelta(milliseconds=7)),
        ("?", (T0 + timedelta(milliseconds=7)).replace(tzinfo=UTC)),
        (f"'{T0 + timedelta(milliseconds=7)}'", None),
        (f"TIMESTAMP '{T0 + timedelta(milliseconds=7)}'", None),
        (f"TIMESTAMPTZ '{T0 + timedelta(milliseconds=7)}+00'", None),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_keys_as_of_a_moment_are_those_that_the_server_had_by_then(
    lake: Lake, moment: str, value: datetime | None, zone: str
) -> None:
    archive(lake, "key_versions", keys_of_all_kinds())
    with connect(lake.path) as sql:
        sql.execute(f"SET TimeZone = '{zone}'")
        found = sql.execute(
            f"SELECT key, version, live FROM keys_as_of({moment}) ORDER BY key", [] if value is None else [value]
        ).fetchall()
    assert found == [("back", 2, False), ("gone", 2, False), ("plain", 3, True)]


def test_an_expiry_counts_as_of_the_moment_asked_for(lake: Lake) -> None:
    archive(lake, "key_versions", [*chain(1, "k", "p", expires_at_ms=T0_MS + 500)])
    with connect(lake.path) as sql:
        for later_ms, live in ((1, True), (499, True), (500, False)):
            moment = T0 + timedelta(milliseconds=later_ms)
            assert sql.execute("SELECT live FROM keys_as_of(?)", [moment]).fetchall() == [(live,)]
        assert sql.execute("SELECT live FROM current_keys").fetchall() == [(False,)]
        assert sql.execute("SELECT * FROM keys_as_of(?)", [T0]).fetchall() == []


def stats_of(sql: Any) -> dict[str, Any]:
    result = sql.execute("SELECT * FROM get_context_stats()")
    return dict(zip((column[0] for column in result.description), result.fetchone(), strict=True))


def test_E77_get_context_stats_counts_contexts_keys_sessions_and_agents(lake: Lake) -> None:
    archive(lake, "key_versions", keys_of_all_kinds())
    whole = shared(1, [b"a" * 100, b"b" * 50], "tail")
    plain = context(5, b'{"n":1}', expires_at_ms=T0_MS)
    archive(lake, "contexts", [*whole, plain, touch(plain, 6)])
    archive(lake, "events", [event(seq, session_id=f"s{seq % 2}", agent_id=f"a{seq % 3}") for seq in range(1, 13)])
    expected = {
        "total_contexts": 2,
        "expired_contexts": 1,
        "total_keys": 7,
        "live_keys": 4,
        "expired_keys": 2,
        "deleted_keys": 1,
        "total_versions": 13,
        "total_events": 12,
        "unique_sessions": 2,
        "unique_agents": 3,
        "context_bytes": 154 + 7,
        "stored_bytes": 150 + 7,
        "oldest_stored_at": T0 + timedelta(milliseconds=1),
        "newest_stored_at": T0 + timedelta(milliseconds=13),
    }
    with connect(lake.path) as sql:
        assert stats_of(sql) == expected
    write_views_file(lake)
    with duckdb.connect(str(lake.path / "holdfast.duckdb"), read_only=True) as plain_sql:
        assert stats_of(plain_sql) == expected
        assert set(plain_sql.execute("SELECT namespace, key, version, live FROM current_keys").fetchall()) == LIVE
        moment = T0 + timedelta(milliseconds=4)
        found = plain_sql.execute("SELECT key, version FROM keys_as_of(?) ORDER BY key", [moment]).fetchall()
        assert found == [("gone", 1), ("plain", 3)]


def test_E77_the_totals_of_an_empty_lake_are_zero(lake: Lake) -> None:
    with connect(lake.path) as sql:
        totals = stats_of(sql)
        assert {name: value for name, value in totals.items() if not name.endswith("_at")} == dict.fromkeys(
            [name for name in totals if not name.endswith("_at")], 0
        )
        archive(lake, "contexts", [context(1)])
        assert stats_of(sql)["total_contexts"] == 1


# Manifests whose chunks other manifests share


def shared(first_seq: int, parts: list[bytes], tail: str = "", known: tuple[bytes, ...] = ()) -> list[ContextRow]:
    """The rows of a body of some parts, less those parts that are known, and a tail; the manifest comes last."""
    rows: list[ContextRow] = []
    digests: list[str] = []
    for part in parts:
        row = context(first_seq + len(rows), part, kind="chunk", content_type="application/octet-stream", form="chunk")
        if part not in known and row.digest not in digests:
            rows.append(row)
        digests.append(row.digest)
    whole = context(first_seq + len(rows), b"".join(parts) + tail.encode())
    manifest = msgspec.json.encode({"size": whole.size, "chunks": digests, "tail": tail, "v": 2})
    return [*rows, msgspec.structs.replace(whole, body=manifest, form="manifest")]


def conversation(turns: int) -> tuple[list[ContextRow], list[bytes]]:
    """A list that grows by an item a turn, stored after each; rows, and the body after each turn."""
    rows: list[ContextRow] = []
    bodies: list[bytes] = []
    parts: list[bytes] = []
    tail = ""
    for turn in range(turns):
        tail += f'turn {turn} ä€😀\\u0000 \x00"quoted" {hashlib.sha256(b"%d" % turn).hexdigest()}\n'
        known = tuple(parts)
        if len(tail) > 300:
            raw = tail.encode()
            parts.append(raw[:-2])  # parts may end within a character
            tail = ""
            parts.append(raw[-2:])
        if parts:
            rows += shared(len(rows) + 1, parts, tail, known)
        else:
            rows.append(context(len(rows) + 1, tail.encode()))
        bodies.append(b"".join(parts) + tail.encode())
    return rows, bodies


def test_a_growing_conversation_is_read_back_turn_by_turn(lake: Lake, tmp_path: Path) -> None:
    rows, bodies = conversation(40)
    archive(lake, "contexts", [*rows[:30]])
    archive(lake, "contexts", [*rows[30:]])
    compact(lake, at_ms=LATER_MS)
    assert len(lake.files("contexts")) == 1
    wholes = [row for row in rows if row.form in ("plain", "manifest")]
    with LakeIndex.open(tmp_path / "index") as index, Lookup(lake, index) as lookup:
        for row, body in zip(wholes, bodies, strict=True):
            assert lookup.get_body(row.digest) == (row, body)
    write_views_file(lake)
    with connect(lake.path) as sql, duckdb.connect(str(lake.path / "holdfast.duckdb"), read_only=True) as plain:
        for connection in (sql, plain):
            found = connection.execute(
                "SELECT ref, body, body_bytes, size FROM contexts ORDER BY stream_seq"
            ).fetchall()
            assert [ref for ref, *_ in found] == [row.ref for row in wholes]
            assert [raw for _, _, raw, _ in found] == bodies
            assert [text for _, text, _, _ in found] == [body.decode() for body in bodies]
            assert [size for *_, size in found] == [len(body) for body in bodies]
            one = connection.execute("SELECT body FROM contexts WHERE ref = ?", [wholes[-1].ref]).fetchall()
            assert one == [(bodies[-1].decode(),)]
            newest = "SELECT body FROM contexts ORDER BY created_at DESC LIMIT 2"
            assert connection.execute(newest).fetchall() == [(body.decode(),) for body in bodies[:-3:-1]]
    assert verify_lake(lake.path).violations == []


def test_versions_are_joined_with_their_bodies(lake: Lake) -> None:
    rows, bodies = conversation(20)
    wholes = [row for row in rows if row.form in ("plain", "manifest")]
    archive(lake, "contexts", [*rows])
    archive(
        lake,
        "key_versions",
        [key_version(n + 1, key="talk", version=n + 1, ref=row.ref) for n, row in enumerate(wholes)],
    )
    with connect(lake.path) as sql:
        query = "SELECT body FROM {} JOIN contexts USING (namespace, ref) ORDER BY version"
        assert sql.execute(query.format("current_keys")).fetchall() == [(bodies[-1].decode(),)]
        assert sql.execute(query.format("key_versions")).fetchall() == [(body.decode(),) for body in bodies]
        some = "(SELECT list(ref) FROM key_versions WHERE version IN (1, 15))"
        query = (
            f"SELECT version, body FROM key_versions JOIN contexts_of({some}) USING (namespace, ref) ORDER BY version"
        )
        assert sql.execute(query).fetchall() == [(1, bodies[0].decode()), (15, bodies[14].decode())]
        assert sql.execute("SELECT body FROM contexts_of([?])", [wholes[7].ref]).fetchall() == [(bodies[7].decode(),)]
        for none in ("[]", "NULL", "['nothing']"):
            assert sql.execute(f"SELECT * FROM contexts_of({none})").fetchall() == []
        assert sql.execute("DESCRIBE FROM contexts_of([])").fetchall() == sql.execute("DESCRIBE contexts").fetchall()
    write_views_file(lake)
    with duckdb.connect(str(lake.path / "holdfast.duckdb"), read_only=True) as plain:
        assert plain.execute(query).fetchall() == [(1, bodies[0].decode()), (15, bodies[14].decode())]


def test_bodies_are_not_read_by_a_query_that_does_not_ask_for_them(lake: Lake) -> None:
    """Twenty conversations of 60 turns: 60 MB of bodies put together, 2 MB of parts."""
    rows: list[ContextRow] = []
    for number in range(20):
        parts: list[bytes] = []
        for turn in range(60):
            known = tuple(parts)
            parts.append(b"%d/%d " % (number, turn) + hashlib.sha256(b"%d" % turn).hexdigest().encode() * 25)
            rows += shared(len(rows) + 1, parts, known=known)
    archive(lake, "contexts", [*rows])
    # With so little memory, putting them together fails: what succeeds has not done it.
    with connect(lake.path, config={"memory_limit": "40MB", "threads": 1}) as sql:
        sql.execute("SET temp_directory = ''")
        assert sql.execute("SELECT count(*), sum(size) FROM contexts").fetchone() == (
            1_200,
            sum(row.size for row in rows if row.form == "manifest"),
        )
        sql.execute("SELECT ref, size, created_at FROM contexts ORDER BY created_at DESC LIMIT 5").fetchall()
        ref, size = rows[-1].ref, rows[-1].size
        assert sql.execute("SELECT length(body) FROM contexts WHERE ref = ?", [ref]).fetchall() == [(size,)]
        newest = "SELECT length(body) FROM contexts WHERE stream_seq > ?"
        assert sql.execute(newest, [rows[-3].seq]).fetchall() == [(size,)]
        sql.execute("CREATE TABLE wanted AS SELECT ? AS ref", [ref])
        few = "SELECT length(body) FROM wanted JOIN contexts_of((SELECT list(ref) FROM wanted)) USING (ref)"
        assert sql.execute(few).fetchall() == [(size,)]
        with pytest.raises(duckdb.OutOfMemoryException):
            sql.execute("SELECT max(length(body)) FROM contexts").fetchall()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_shared_body_without_a_chunk_is_null_in_sql_and_an_error_elsewhere(
    lake: Lake, tmp_path: Path, missing: int
) -> None:
    rows = shared(1, [b"one", b"two"], "tail")
    archive(lake, "contexts", [row for n, row in enumerate(rows) if n != missing])
    with connect(lake.path) as sql:
        found = sql.execute("SELECT ref, body, body_bytes, size FROM contexts").fetchall()
        assert found == [(rows[-1].ref, None, None, 10)]
    with (
        LakeIndex.open(tmp_path / "index") as index,
        Lookup(lake, index) as lookup,
        pytest.raises(IntegrityError, match="lacks 1 of 2 chunks"),
    ):
        lookup.get_body(rows[-1].digest)
    [violation] = verify_lake(lake.path).violations
    assert (violation.invariant, violation.object) == ("I4", rows[-1].ref)
    assert "lacks 1 of 2 chunks" in violation.what


def test_a_manifest_that_promises_another_size_is_not_put_together(lake: Lake, tmp_path: Path) -> None:
    """Naming one chunk four thousand times over makes gigabytes of a few bytes."""
    part = b"x" * 500_000
    chunk, honest = shared(1, [part])
    body = msgspec.json.encode({"size": len(part), "chunks": [chunk.digest] * 4_000, "v": 2})
    archive(lake, "contexts", [chunk, msgspec.structs.replace(honest, body=body)])
    with (
        LakeIndex.open(tmp_path / "index") as index,
        Lookup(lake, index) as lookup,
        pytest.raises(DigestMismatchError, match="2000000000 bytes or more, not 500000"),
    ):
        lookup.get_body(honest.digest)
    [violation] = verify_lake(lake.path).violations
    assert "2000000000 bytes, not 500000" in violation.what


@pytest.mark.parametrize(
    "body",
    [
        b'{"size":-1,"chunks":[]}',
        b'{"size":5,"chunks":["x"],"v":2}',
        b'{"size":5,"chunks":[],"v":9}',
        b"[]",
        b'{"size":99999999999,"chunks":[],"v":2}',
    ],
)
def test_a_manifest_of_another_form_is_an_error_not_an_answer(lake: Lake, tmp_path: Path, body: bytes) -> None:
    archive(lake, "contexts", [msgspec.structs.replace(context(1), body=body, form="manifest")])
    with LakeIndex.open(tmp_path / "index") as index, Lookup(lake, index) as lookup, pytest.raises(IntegrityError):
        lookup.get_body(context(1).digest)
    [violation] = verify_lake(lake.path).violations
    assert violation.object == context(1).ref


def test_verifying_reads_each_conversation_once(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of chunks far smaller than they are still gives the same verdict."""
    rows, _ = conversation(60)
    rows[-1] = msgspec.structs.replace(rows[-1], digest=context(1).digest)
    archive(lake, "contexts", [*rows])
    for budget in (1_000, 10**9):
        monkeypatch.setattr("holdfast.lake.manifests.CACHE_BYTES", budget)
        report = verify_lake(lake.path)
        assert report.checked["manifests"] == sum(row.form == "manifest" for row in rows)
        [violation] = report.violations
        assert "hash to" in violation.what


def test_key_versions_and_shared_parts_survive_compaction(lake: Lake) -> None:
    rows, _ = conversation(30)
    for start in range(0, len(rows), 5):
        archive(lake, "contexts", [*rows[start : start + 5]])
    for start in range(1, 101, 10):
        archive(lake, "key_versions", [*key_versions(start, start + 9)])
    with connect(lake.path) as sql:
        stored = "SELECT * FROM contexts_stored ORDER BY epoch, stream_seq"
        versions = "SELECT * FROM key_versions ORDER BY epoch, stream_seq"
        before = sql.execute(stored).fetchall(), sql.execute(versions).fetchall()
        compact(lake, at_ms=LATER_MS)
        assert (len(lake.files("contexts")), len(lake.files("key_versions"))) == (1, 1)
        assert (sql.execute(stored).fetchall(), sql.execute(versions).fetchall()) == before
    assert {row.epoch for row in rows} == {EPOCH}
