"""``holdfast export`` and ``import``: every version, body, tag and time comes back; a damaged file changes nothing."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.client.encryption import SEALED
from holdfast.client.key_ring import KeyRing
from holdfast.ops import export_import, exporting
from holdfast.ops.export_format import ExportWriter, read_export
from holdfast.ops.export_import import ExportImport, ExportImportCounts, KeyOutcome
from holdfast.ops.exporting import ExportCounts, KeyExport, keys_in_lake
from holdfast.ops.traces import find_traces, read_file
from holdfast.schemas.errors import (
    IntegrityError,
    InvalidFieldError,
    NotFoundError,
)
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import ContextRow, KeyVersionRow
from holdfast.streams.key_log import KeyLog
from holdfast.streams.wire import hot_subject
from holdfast.workers.control import evict, flush
from tests.command_line import CommandLine
from tests.running import own_server, running, settings_in
from tests.support import OwnServer

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

NAMESPACE: Final = "default"
RING: Final = KeyRing.of({"k1": bytes(range(32))}, "k1")
SESSIONS: Final = 6
TURNS: Final = 60


class Store(msgspec.Struct):
    """A running system of the test's own: a client, its address and its data."""

    hf: Holdfast
    url: str
    data: Path
    server: OwnServer


@asynccontextmanager
async def a_store(data: Path) -> AsyncGenerator[Store]:
    """A server with an archiver, a janitor that does nothing by the clock, and a resolver, on a data directory."""
    async with (
        own_server(data) as server,
        running(server.url, settings_in(data), ["archiver", "janitor", "resolver"]),
        connect(server.url, NAMESPACE, "tester", key_ring=RING) as hf,
    ):
        yield Store(hf, server.url, data, server)


@pytest_asyncio.fixture
async def source(tmp_path: Path) -> AsyncIterator[Store]:
    async with a_store(tmp_path / "source") as store:
        yield store


@pytest_asyncio.fixture
async def target(tmp_path: Path) -> AsyncIterator[Store]:
    async with a_store(tmp_path / "target") as store:
        yield store


async def export(hf: Holdfast, path: Path, *, prefix: str = "", **options: Any) -> ExportCounts:
    with path.open("wb") as file:
        writer = ExportWriter(file, hf.namespace, prefix=prefix, created_at_ms=now_ms())
        return await KeyExport(hf, writer, prefix=prefix, **options).run()


async def import_(hf: Holdfast, path: Path, *, overwrite: bool = False) -> tuple[ExportImportCounts, list[KeyOutcome]]:
    outcomes: list[KeyOutcome] = []
    counts = await ExportImport(hf, overwrite=overwrite, on_key=outcomes.append).run(path)
    return counts, outcomes


async def all_keys(hf: Holdfast) -> list[str]:
    """Every key of the namespace, deleted ones too."""
    return await KeyLog(hf.connection).keys(hf.namespace, "")


def said(row: KeyVersionRow) -> KeyVersionRow:
    """A version less its place in the stream and the time at which the server stored it."""
    return msgspec.structs.replace(row, stored_at_ms=0, epoch="", seq=0)


async def everything(hf: Holdfast, keys: Iterable[str]) -> dict[str, list[tuple[KeyVersionRow, Any]]]:
    """Every version of these keys, newest first, with its body as it is stored and as it opens."""
    found: dict[str, list[tuple[KeyVersionRow, Any]]] = {}
    for key in keys:
        versions = found[key] = []
        async for version in hf.keys.history(key):
            body = None
            if not version.deleted:
                context = await version.load()
                body = (context.stored, context.body, context.kind)
            versions.append((said(version.row), body))
    return found


async def put_sessions(hf: Holdfast, traces: Path) -> list[str]:
    """Sessions of recorded traces, each stored turn by turn as a list that grows, with the turns of any store."""
    sessions: dict[str, list[Any]] = {}
    for file in find_traces([traces / "steps"]).files:
        for record in read_file(file):
            body = getattr(record, "body", None)
            if body is not None:
                sessions.setdefault(record.session_id, []).append(msgspec.json.decode(body))  # type: ignore[union-attr]
        if len(sessions) > 20 * SESSIONS:
            break
    longest = sorted(sessions, key=lambda name: len(sessions[name]), reverse=True)[:SESSIONS]
    keys = [f"session.{name}" for name in longest]

    async def tell(key: str, steps: list[Any]) -> None:
        for number, step in enumerate(steps[:TURNS]):
            await hf.keys.append(key, step, tags=["trace", f"turn{number % 3}"], session=key[8:], changed_by="agent")

    await asyncio.gather(*(tell(key, sessions[name]) for key, name in zip(keys, longest, strict=True)))
    return keys


async def put_oddities(hf: Holdfast) -> list[str]:
    """Keys of every sort that there is."""
    keys = hf.keys
    await keys.put("odd.text", 'text with\nlines, "quotes" and ünïcödé \x00', tags=["ü", "b"])
    await keys.put("odd.binary", bytes(range(256)) * 20, kind="blob", content_type="application/x-thing")
    await keys.put("odd.json", b'{ "spaced" : 1.0,\n "b": [1e2] }', content_type="application/json")
    await keys.put("odd.precise", b'{"n":1.10,"big":123456789012345678901234567890}', content_type="application/json")
    await keys.put("odd.empty", b"")
    await keys.put("odd.null", None)
    await keys.put("odd.large", [random.Random(1).randbytes(300).hex() for _ in range(3000)])
    await keys.put("odd.name: ü.*.>", {"a": 1}, session="a session", change_type="made", ttl=86_400)
    await keys.put("odd.secret", {"canary": "nobody sees this"}, encrypt=True, changed_by="me")
    await keys.put("odd.secret", {"canary": "nor this " * 100_000}, encrypt=True)
    await keys.put("odd.deleted", 1, tags=["gone"])
    await keys.delete("odd.deleted", changed_by="cleaner", change_type="clean")
    await keys.put("odd.again", {"n": 1})
    await keys.put("odd.again", {"n": 2}, agent="another")
    await keys.delete("odd.again")
    await keys.rollback("odd.again", 1, changed_by="operator")
    await keys.patch("odd.again", {"m": 2})
    return [key for key in await all_keys(hf) if key.startswith("odd.")]


async def test_E80_E81_everything_comes_back(traces: Path, source: Store, target: Store, tmp_path: Path) -> None:
    keys = await put_sessions(source.hf, traces) + await put_oddities(source.hf)
    before = await everything(source.hf, keys)
    exported = await export(source.hf, tmp_path / "all.jsonl")
    versions = sum(map(len, before.values()))
    assert (exported.keys, exported.versions, exported.missing) == (len(keys), versions, 0)
    counts, outcomes = await import_(target.hf, tmp_path / "all.jsonl")
    assert (counts.keys, counts.versions, counts.contexts) == (len(keys), versions, exported.contexts)
    assert (counts.imported, counts.skipped, counts.failed, counts.written) == (len(keys), 0, 0, versions)
    assert outcomes == []
    assert await everything(target.hf, keys) == before
    # What was imported is archived as anything else, and reads the same from the lake.
    await flush(target.hf.connection)
    await evict(target.hf.connection, older_than_s=0)
    async with connect(target.url, NAMESPACE, "reader", key_ring=RING) as cold:
        assert await everything(cold, keys) == before


async def test_E80_E81_what_has_left_the_hot_tier_is_exported_too(
    traces: Path, source: Store, target: Store, tmp_path: Path
) -> None:
    keys = await put_sessions(source.hf, traces) + await put_oddities(source.hf)
    before = await everything(source.hf, keys)
    hot = await export(source.hf, tmp_path / "hot.jsonl")
    await flush(source.hf.connection)
    await evict(source.hf.connection, older_than_s=0)
    async with connect(source.url, NAMESPACE, "exporter", key_ring=RING) as cold:
        exported = await export(cold, tmp_path / "cold.jsonl")
    assert (exported.keys, exported.versions, exported.contexts) == (hot.keys, hot.versions, hot.contexts)
    assert without_header(tmp_path / "cold.jsonl") == without_header(tmp_path / "hot.jsonl")
    await import_(target.hf, tmp_path / "cold.jsonl")
    assert await everything(target.hf, keys) == before


def without_header(path: Path) -> list[bytes]:
    """The lines between the first, which tells the time, and the last, whose digest covers the first."""
    return path.read_bytes().splitlines()[1:-1]


async def test_E80_a_conversation_that_grows_is_exported_in_linear_size(
    traces: Path, source: Store, tmp_path: Path
) -> None:
    keys = await put_sessions(source.hf, traces)
    await export(source.hf, tmp_path / "all.jsonl")
    newest = [len((await source.hf.keys.get(key)).raw) for key in keys]
    whole = sum([len((await version.load()).raw) for key in keys async for version in source.hf.keys.history(key)])
    size = (tmp_path / "all.jsonl").stat().st_size
    assert whole > 10 * sum(newest), "the sessions are too short to show anything"
    assert size < 4 * sum(newest), f"{size} bytes for bodies of {sum(newest)}, {whole} with all versions"


async def test_E80_a_part_of_the_keys_by_prefix(source: Store, target: Store, tmp_path: Path) -> None:
    for key in ("store.a", "store.b", "stored", "other.c"):
        await source.hf.keys.put(key, {"key": key})
    counts = await export(source.hf, tmp_path / "some.jsonl", prefix="store.")
    assert (counts.keys, counts.versions) == (2, 2)
    await import_(target.hf, tmp_path / "some.jsonl")
    assert [version.key async for version in target.hf.keys.list()] == ["store.a", "store.b"]


async def test_E80_equal_bodies_are_exported_once(source: Store, tmp_path: Path) -> None:
    for number in range(30):
        await source.hf.keys.put(f"k{number}", {"the": "same"})
    counts = await export(source.hf, tmp_path / "same.jsonl")
    assert (counts.keys, counts.contexts) == (30, 1)


async def test_nothing_is_an_export_too(source: Store, target: Store, tmp_path: Path) -> None:
    assert (await export(source.hf, tmp_path / "none.jsonl")).keys == 0
    counts, _ = await import_(target.hf, tmp_path / "none.jsonl")
    assert (counts.keys, counts.imported) == (0, 0)


async def test_long_chains_go_through_in_pages(
    source: Store, target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a chain is in the lake alone; pages, windows and batches of the test's size meet within it."""
    monkeypatch.setattr(exporting, "PAGE_VERSIONS", 7)
    monkeypatch.setattr(exporting, "_COLD_PAGE", 5)
    monkeypatch.setattr(export_import, "WINDOW_LINES", 11)
    keys = source.hf.keys
    for number in range(40):
        await keys.put("long", {"n": number})
        await keys.put(f"short{number}", {"n": number})
    await keys.put("medium", 1)
    await flush(source.hf.connection)
    # The head of "long" stays, and nine before it; the rest leaves the bucket as the janitor has it leave.
    await purge_revisions(source, "long", keep=10)
    for number in range(13):
        await keys.put("long", {"more": number})
        await keys.put("medium", number)
    before = await everything(source.hf, ["long", "medium", "short7"])
    assert len(before["long"]) == 53
    counts = await export(source.hf, tmp_path / "long.jsonl")
    assert (counts.keys, counts.versions) == (42, 53 + 14 + 40)
    await import_(target.hf, tmp_path / "long.jsonl")
    assert await everything(target.hf, before) == before


async def purge_revisions(store: Store, key: str, *, keep: int) -> None:
    """Takes all but the newest versions of a key out of the bucket; they are in the lake."""
    subject = f"$KV.ctx-keys.{NAMESPACE}.{key}"
    await store.hf.connection.api("STREAM.PURGE.KV_ctx-keys", {"filter": subject, "keep": keep})


async def test_a_key_that_has_left_the_bucket_is_exported_from_the_lake(
    source: Store, target: Store, tmp_path: Path
) -> None:
    """A head leaves the bucket when it is a tombstone that was archived long ago: its chain is in the lake alone."""
    await source.hf.keys.put("old", {"n": 1})
    await source.hf.keys.put("new", {"n": 1})
    await source.hf.keys.delete("old")
    before = await everything(source.hf, ["old", "new"])
    await flush(source.hf.connection)
    await source.hf.connection.api("STREAM.PURGE.KV_ctx-keys", {"filter": f"$KV.ctx-keys.{NAMESPACE}.old"})
    archived = await asyncio.to_thread(keys_in_lake, source.data / "lake", NAMESPACE, "")
    assert sorted(archived) == ["new", "old"]
    assert await asyncio.to_thread(keys_in_lake, source.data / "lake", NAMESPACE, "ne") == ["new"]
    counts = await export(source.hf, tmp_path / "all.jsonl", archived_keys=archived)
    assert (counts.keys, counts.versions) == (2, 3)
    await import_(target.hf, tmp_path / "all.jsonl")
    assert await everything(target.hf, ["old", "new"]) == before


# Importing again, and into a store that has the keys


async def test_E81_a_second_import_changes_nothing(source: Store, target: Store, tmp_path: Path) -> None:
    keys = await put_oddities(source.hf)
    await export(source.hf, tmp_path / "all.jsonl")
    await import_(target.hf, tmp_path / "all.jsonl")
    before = await everything(target.hf, keys)
    for overwrite in (False, True):
        counts, outcomes = await import_(target.hf, tmp_path / "all.jsonl", overwrite=overwrite)
        assert (counts.imported, counts.skipped, counts.written) == (0, len(keys), 0)
        assert {outcome.reason for outcome in outcomes} == {"all its versions are there"}
    assert await everything(target.hf, keys) == before
    # Into the store that it was made from it changes nothing either.
    counts, _ = await import_(source.hf, tmp_path / "all.jsonl", overwrite=True)
    assert counts.written == 0


async def test_E81_an_import_that_broke_off_is_completed(
    source: Store, target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        await source.hf.keys.put("long", {"n": number})
        await source.hf.keys.put("other", {"n": number})
    before = await everything(source.hf, ["long", "other"])
    await export(source.hf, tmp_path / "all.jsonl")
    monkeypatch.setattr("holdfast.schemas.limits.COMMIT_KEYS", 8)
    written = target.hf.keys.import_versions
    calls = 0

    async def failing(rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise NotADirectoryError("the process dies here")
        return await written(rows)

    monkeypatch.setattr(target.hf.keys, "import_versions", failing)
    with pytest.raises(NotADirectoryError):
        await import_(target.hf, tmp_path / "all.jsonl")
    monkeypatch.setattr(target.hf.keys, "import_versions", written)
    counts, _ = await import_(target.hf, tmp_path / "all.jsonl")
    assert 0 < counts.written < 60
    assert await everything(target.hf, ["long", "other"]) == before


async def test_E81_a_key_that_is_there_is_skipped_or_overwritten(source: Store, target: Store, tmp_path: Path) -> None:
    for number in range(3):
        await source.hf.keys.put("both", {"from": "source", "n": number}, tags=["t"], session="s", changed_by="me")
    await source.hf.keys.put("gone", 1)
    await source.hf.keys.delete("gone")
    await source.hf.keys.put("fresh", 1)
    await target.hf.keys.put("both", {"from": "target"})
    await target.hf.keys.put("gone", {"from": "target"})
    await export(source.hf, tmp_path / "all.jsonl")
    before = await everything(target.hf, ["both", "gone"])

    counts, outcomes = await import_(target.hf, tmp_path / "all.jsonl")
    assert (counts.imported, counts.skipped, counts.failed, counts.written) == (1, 2, 0, 1)
    assert {outcome.key for outcome in outcomes} == {"both", "gone"}
    assert all("--overwrite" in outcome.reason for outcome in outcomes)
    assert await everything(target.hf, ["both", "gone"]) == before

    counts, outcomes = await import_(target.hf, tmp_path / "all.jsonl", overwrite=True)
    assert (counts.imported, counts.skipped, counts.written) == (2, 1, 2)
    assert [outcome.key for outcome in outcomes] == ["fresh"]
    value = await target.hf.keys.get("both")
    assert (value.body, value.version, value.tags) == ({"from": "source", "n": 2}, 2, ("t",))
    assert (value.session, value.changed_by, value.change_type) == ("s", "me", "import")
    assert (await everything(target.hf, ["both"]))["both"][1:] == before["both"], "what was there stays in the history"
    with pytest.raises(NotFoundError):
        await target.hf.keys.get("gone")

    counts, _ = await import_(target.hf, tmp_path / "all.jsonl", overwrite=True)
    assert (counts.imported, counts.skipped, counts.written) == (0, 3, 0)


async def test_E81_a_store_that_went_on_is_skipped_or_set_back(source: Store, target: Store, tmp_path: Path) -> None:
    await source.hf.keys.put("k", {"n": 1})
    await source.hf.keys.put("k", {"n": 2})
    await export(source.hf, tmp_path / "all.jsonl")
    await import_(target.hf, tmp_path / "all.jsonl")
    await target.hf.keys.put("k", {"n": 3})
    counts, _ = await import_(target.hf, tmp_path / "all.jsonl")
    assert (counts.skipped, counts.written) == (1, 0)
    counts, _ = await import_(target.hf, tmp_path / "all.jsonl", overwrite=True)
    assert (counts.imported, counts.written) == (1, 1)
    value = await target.hf.keys.get("k")
    assert (value.body, value.version) == ({"n": 2}, 4)


async def test_a_writer_that_is_faster_makes_the_key_fail_and_no_other(
    source: Store, target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await source.hf.keys.put("raced", 1)
    await source.hf.keys.put("calm", 1)
    await export(source.hf, tmp_path / "all.jsonl")
    head = target.hf.keys.head

    async def late(key: str) -> Any:
        found = await head(key)
        if key == "raced":
            await target.hf.keys.put(key, "another")
        return found

    monkeypatch.setattr(target.hf.keys, "head", late)
    counts, outcomes = await import_(target.hf, tmp_path / "all.jsonl")
    assert (counts.imported, counts.failed, counts.keys) == (1, 1, 2)
    (outcome,) = outcomes
    assert (outcome.key, outcome.outcome) == ("raced", "failed")
    assert outcome.line > 1
    assert (await target.hf.keys.get("raced")).body == "another"


async def test_versions_whose_body_the_file_lacks_are_named(source: Store, target: Store, tmp_path: Path) -> None:
    """Such a file is not written by an export; a version must not point at what is nowhere."""
    await source.hf.keys.put("whole", {"n": 1})
    await source.hf.keys.put("half", {"n": 1})
    await source.hf.keys.put("half", {"n": 2})
    lost = (await source.hf.keys.get("half")).ref
    await export(source.hf, tmp_path / "all.jsonl")
    leave_out(tmp_path / "all.jsonl", lambda record: isinstance(record, ContextRow) and record.ref == lost)
    counts, outcomes = await import_(target.hf, tmp_path / "all.jsonl")
    assert (counts.imported, counts.failed, counts.written) == (1, 1, 1)
    (outcome,) = outcomes
    assert outcome.key == "half"
    assert str(lost) in outcome.reason
    # Where the body is stored already, the version is good.
    await target.hf.keys.put("elsewhere", {"n": 2})
    counts, _ = await import_(target.hf, tmp_path / "all.jsonl")
    assert counts.imported == 1
    assert (await target.hf.keys.get("half")).body == {"n": 2}


def leave_out(path: Path, is_left_out: Callable[[Any], bool]) -> None:
    """Writes an export anew without some of its lines."""
    with path.open("rb") as file:
        records = [line.record for line in read_export(file, "test")][1:-1]
    with path.open("wb") as file:
        writer = ExportWriter(file, NAMESPACE, created_at_ms=0)
        for record in records:
            if is_left_out(record):
                continue
            if isinstance(record, ContextRow):
                writer.write_context(record)
            elif isinstance(record, KeyVersionRow):
                writer.write_version(record)
        writer.finish()


# Damage


async def damage(store: Store, ref: Ref) -> None:
    """Puts other bytes in the place of a context's stored form."""
    subject = hot_subject(NAMESPACE, ref.rpartition("_")[2])
    await store.hf.connection.api("STREAM.PURGE.KV_ctx-hot", {"filter": subject})
    await store.hf.connection.client.jetstream().publish(subject, b'{"n":"damaged"}', headers={"Hf-Kind": "context"})


async def test_a_body_that_is_damaged_or_lost_is_told_and_its_history_exported(
    source: Store, target: Store, tmp_path: Path
) -> None:
    keys = source.hf.keys
    whole = [await keys.put("k", {"n": number}) for number in range(4)]
    refs = [value.ref for value in whole]
    assert refs[1] is not None
    assert refs[2] is not None
    await damage(source, refs[1])
    await source.hf.connection.api(
        "STREAM.PURGE.KV_ctx-hot", {"filter": hot_subject(NAMESPACE, refs[2].rpartition("_")[2])}
    )
    told: list[tuple[str, str]] = []
    counts = await export(
        source.hf, tmp_path / "all.jsonl", on_missing=lambda ref, error: told.append((ref, error.code))
    )
    assert (counts.versions, counts.contexts, counts.missing) == (4, 2, 2)
    assert told == [(refs[1], "digest_mismatch"), (refs[2], "not_found")]
    imported, _ = await import_(target.hf, tmp_path / "all.jsonl")
    assert (imported.imported, imported.written) == (1, 4)
    assert (await target.hf.keys.get("k")).body == {"n": 3}
    assert (await target.hf.keys.get("k", 1)).body == {"n": 0}
    with pytest.raises(NotFoundError):
        await target.hf.keys.get("k", 2)


async def test_a_damaged_hot_copy_is_passed_over_for_the_archived_one(source: Store, tmp_path: Path) -> None:
    large = [random.Random(2).randbytes(300).hex() for _ in range(3000)]
    plain = await source.hf.keys.put("plain", {"n": 1})
    manifest = await source.hf.keys.put("large", large)
    await flush(source.hf.connection)
    for value in (plain, manifest):
        assert value.ref is not None
        await damage(source, value.ref)
    async with connect(source.url, NAMESPACE, "exporter") as hf:
        counts = await export(hf, tmp_path / "all.jsonl")
    assert (counts.keys, counts.missing) == (2, 0)


async def test_E81_a_file_that_is_cut_short_changes_nothing(source: Store, target: Store, tmp_path: Path) -> None:
    await put_oddities(source.hf)
    await export(source.hf, tmp_path / "all.jsonl")
    raw = (tmp_path / "all.jsonl").read_bytes()
    lines = raw.splitlines(keepends=True)
    for cut in (raw[:-1], b"".join(lines[:-1]), b"".join(lines[:3]), raw[: len(raw) // 2], lines[0]):
        (tmp_path / "cut.jsonl").write_bytes(cut)
        if cut == raw[:-1]:
            # Only the last line's end is missing: everything is there.
            continue
        with pytest.raises(IntegrityError, match="cut short") as raised:
            await import_(target.hf, tmp_path / "cut.jsonl")
        assert raised.value.field == f"line {cut.count(bytes([10])) + (not cut.endswith(bytes([10])))}"
    assert await all_keys(target.hf) == []


async def test_E81_one_flipped_bit_anywhere_changes_nothing(source: Store, target: Store, tmp_path: Path) -> None:
    await source.hf.keys.put("a", {"n": 1}, tags=["t"])
    await source.hf.keys.put("a", [1.5, None, "text"], session="s")
    await source.hf.keys.put("b", b"\x00\xff")
    await export(source.hf, tmp_path / "all.jsonl")
    raw = (tmp_path / "all.jsonl").read_bytes()
    for place in range(len(raw) - 1):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << (place % 7)
        (tmp_path / "flipped.jsonl").write_bytes(flipped)
        with pytest.raises((IntegrityError, InvalidFieldError)) as raised:
            await import_(target.hf, tmp_path / "flipped.jsonl")
        if place > raw.index(b"\n"):
            assert (raised.value.field or "").startswith("line "), place
    assert await all_keys(target.hf) == []


async def test_a_manifest_that_lies_is_refused_with_its_line(source: Store, target: Store, tmp_path: Path) -> None:
    """The digest of a body in parts shows only when it is put together: a forged file that is otherwise whole."""
    large = [random.Random(3).randbytes(300).hex() for _ in range(3000)]
    other = [random.Random(4).randbytes(300).hex() for _ in range(3000)]
    await source.hf.keys.put("a", large)
    await source.hf.keys.put("b", other)
    await export(source.hf, tmp_path / "all.jsonl")
    with (tmp_path / "all.jsonl").open("rb") as file:
        records = [line.record for line in read_export(file, "test")][1:-1]
    first, second = [row for row in records if isinstance(row, ContextRow) and row.form == "manifest"]
    forged = msgspec.structs.replace(second, body=first.body, size=first.size)
    with (tmp_path / "forged.jsonl").open("wb") as file:
        writer = ExportWriter(file, NAMESPACE, created_at_ms=0)
        for record in records:
            if isinstance(record, ContextRow):
                writer.write_context(forged if record is second else record)
            elif isinstance(record, KeyVersionRow):
                writer.write_version(record)
        writer.finish()
    with pytest.raises(IntegrityError, match=r"line \d+ describes .* wrongly"):
        await import_(target.hf, tmp_path / "forged.jsonl")
    assert await target.hf.keys.head("b") is None


async def test_files_that_are_no_export_are_refused(target: Store, tmp_path: Path) -> None:
    for name, raw in {
        "empty": b"",
        "steps": b'{"session_id": "s", "seq": 0, "role": "user", "content": "x"}\n',
        "text": b"hello\n",
        "binary": os.urandom(1000),
        "later": b'{"type":"holdfast-export","v":2,"namespace":"default"}\n',
    }.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InvalidFieldError):
            await import_(target.hf, tmp_path / name)
    with pytest.raises(NotFoundError):
        await import_(target.hf, tmp_path / "nowhere")
    with pytest.raises(InvalidFieldError):
        await import_(target.hf, tmp_path)


async def test_an_export_of_another_namespace_is_refused(source: Store, target: Store, tmp_path: Path) -> None:
    """References are under the namespace: in another they would name nothing."""
    await source.hf.keys.put("k", 1)
    await export(source.hf, tmp_path / "all.jsonl")
    async with connect(target.url, "another", "tester") as hf:
        with pytest.raises(InvalidFieldError, match="--namespace 'default'"):
            await import_(hf, tmp_path / "all.jsonl")


async def test_sealed_bodies_are_exported_sealed(source: Store, target: Store, tmp_path: Path) -> None:
    canary = "nobody sees this"
    await source.hf.keys.put("secret", {"canary": canary}, encrypt=True)
    async with connect(source.url, NAMESPACE, "exporter", key_ring=KeyRing.of({"k2": bytes(32)}, "k2")) as hf:
        assert (await export(hf, tmp_path / "all.jsonl")).missing == 0, "an export needs no key"
    raw = (tmp_path / "all.jsonl").read_bytes()
    assert canary.encode() not in raw
    assert SEALED.encode() in raw
    await import_(target.hf, tmp_path / "all.jsonl")
    assert (await target.hf.keys.get("secret")).body == {"canary": canary}


# The commands


def command_line(store: Store) -> CommandLine:
    """Commands on a running store."""
    return CommandLine(store.data, HOLDFAST_NATS_URL=store.url)


async def test_E80_E81_the_commands(source: Store, target: Store, tmp_path: Path) -> None:
    for number in range(3):
        await source.hf.keys.put("store.plan", {"n": number})
    await source.hf.keys.put("store.gone", 1)
    await source.hf.keys.delete("store.gone")
    file = str(tmp_path / "all.jsonl.zst")
    exported = (await asyncio.to_thread(command_line(source), "export", file, "--json")).json
    assert (exported["keys"], exported["versions"], exported["missing"]) == (2, 5, 0)
    assert not list(tmp_path.glob(".*partial*"))

    holdfast = command_line(target)
    imported = (await asyncio.to_thread(holdfast, "import", file, "--json")).json
    assert imported | {"seconds": 0} == {
        "keys": 2,
        "versions": 5,
        "contexts": exported["contexts"],
        "imported": 2,
        "skipped": 0,
        "failed": 0,
        "written": 5,
        "seconds": 0,
    }
    keys = ["store.plan", "store.gone"]
    assert await everything(target.hf, keys) == await everything(source.hf, keys)
    skipped = await asyncio.to_thread(holdfast, "import", file, "--overwrite")
    assert "imported  0 keys" in skipped.out
    assert "skipped: store.gone: all its versions are there" in skipped.err


def test_E80_E81_from_one_data_directory_to_a_new_one_by_a_pipe(tmp_path: Path) -> None:
    first, second = CommandLine(tmp_path / "first"), CommandLine(tmp_path / "second")
    first("set", "store.plan", '{"n": 1}')
    piped = first("export", "-", "--json")
    assert json.loads(piped.err)["keys"] == 1, "standard output is the export"
    assert [line["type"] for line in piped.lines] == ["holdfast-export", "context", "version", "end"]
    assert second("import", "-", "--json", stdin=gzip.compress(piped.raw)).json["imported"] == 1
    assert second("get", "store.plan", "--json").json["body"] == {"n": 1}


async def test_the_commands_tell_what_is_missing(source: Store, tmp_path: Path) -> None:
    lost = (await source.hf.keys.put("k", {"n": 1})).ref
    assert lost is not None
    await damage(source, lost)
    file = str(tmp_path / "all.jsonl")
    told = await asyncio.to_thread(command_line(source), "export", file, "--json", status=5)
    assert told.json["missing"] == 1
    assert (told.error["code"], told.error["ref"]) == ("missing", lost)


async def test_the_commands_refuse_what_they_cannot_do(source: Store, tmp_path: Path) -> None:
    await source.hf.keys.put("k", 1)
    await export(source.hf, tmp_path / "all.jsonl")
    before = (tmp_path / "all.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(before[:-30])
    (tmp_path / "trace.jsonl").write_text('{"session_id": "s", "seq": 0, "role": "user", "content": "x"}\n')
    holdfast = command_line(source)
    names = {name: str(tmp_path / f"{name}.jsonl") for name in ("all", "cut", "trace")}

    def refuse() -> None:
        cut = holdfast("import", names["cut"], "--json", status=5).error
        assert (cut["code"], cut["field"]) == ("integrity", "line 4")
        mixed = holdfast("import", names["all"], names["trace"], "--json", status=2).error
        assert "is not" in mixed["message"]
        trace = holdfast("import", names["trace"], "--overwrite", "--json", status=2).error
        assert trace["field"] == "overwrite"
        foreign = holdfast("import", names["all"], "--namespace", "other", "--json", status=2).error
        assert foreign["field"] == "namespace"
        for place in (tmp_path / "no" / "such" / "all.jsonl", tmp_path):
            nowhere = holdfast("export", str(place), "--json", status=2).error
            assert nowhere["field"] == "file"
        holdfast("export", "/dev/null")
        assert not Path("/dev/null").is_file()

    await asyncio.to_thread(refuse)
    assert (tmp_path / "all.jsonl").read_bytes() == before
