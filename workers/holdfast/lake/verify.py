"""Checks a lake at rest: every file, every checksum, every count, every digest, every watermark, every log file.

Reads everything once and changes nothing.  Run it while nothing vacuums; appends meanwhile do no harm.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import duckdb
import msgspec
import pyarrow as pa

from holdfast.lake import quarantine
from holdfast.lake.checksums import Damage, find_damage, sha256_of, whole_damage
from holdfast.lake.columns import stored_body, to_rows
from holdfast.lake.joints import assemble
from holdfast.lake.lake import Lake
from holdfast.lake.log import (
    FileEntry,
    Snapshot,
    checkpoint_path,
    commit_path,
    list_checkpoints,
    list_versions,
    read_commit,
)
from holdfast.lake.log_copies import checkpoint_is_sound
from holdfast.lake.log_repair import differing_commits
from holdfast.lake.manifests import check_manifests
from holdfast.lake.parquet_reading import open_parquet, read_batches, read_group
from holdfast.lake.salvage import name_rows
from holdfast.lake.views import quote, view_statements
from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, IntegrityError
from holdfast.schemas.names import CHUNK_KIND
from holdfast.schemas.problems import Problem
from holdfast.schemas.refs import Digest, compute_digest, format_ref, parse_ref
from holdfast.schemas.rows import TABLES, ContextRow, Table

MOST_OF_A_KIND: Final = 100
"""Most violations listed for one table and check; the rest is counted in the last one's text."""


class LakeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked, as counts, and what was found."""

    checked: dict[str, int]
    violations: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.violations


def verify_lake(path: str | Path, *, deep: bool = False) -> LakeReport:
    """Checks a whole lake; raises DataDirectoryError when there is none.

    ``deep`` also compares the SHA-256 of every file, where CRC-32 says that it is sound.
    """
    root = Path(path).absolute()
    checked: Counter[str] = Counter()
    try:
        lake = Lake.open(root)
    except IntegrityError as error:
        # A log that cannot be followed: nothing else can be said of the lake.
        problem = Problem(
            invariant="I5", object=str(root), what=error.message, next_step=error.hint or "restore it from a backup"
        )
        return LakeReport(checked=dict(checked), violations=[problem, *_check_log_files(root, checked)])
    violations: list[Problem] = [*_check_log_files(root, checked)]
    for table in TABLES:
        snapshot = lake.snapshot(table)
        checks = [_check_log(lake, snapshot, checked), _check_files(snapshot, checked, deep=deep)]
        for check in checks:
            violations.extend(_bounded(check))
    # Identities and joined bodies are asked of DuckDB: it reads the same files by other code.
    if not violations:
        violations.extend(_bounded(_check_identities(lake, checked)))
        violations.extend(_bounded(_check_joined(lake, checked)))
    return LakeReport(checked=dict(checked), violations=violations)


def _bounded(check: Iterable[Problem]) -> Iterator[Problem]:
    further = 0
    for number, violation in enumerate(check):
        if number < MOST_OF_A_KIND:
            yield violation
        else:
            further += 1
    if further:
        yield Problem(
            invariant="I1", object="lake", what=f"{further} more of the same kind", next_step="see those listed"
        )


def _check_log_files(root: Path, checked: Counter[str]) -> Iterator[Problem]:
    """I5: every log file is byte for byte what was written, as its successor, its copy or its checksum says."""
    for table in TABLES:
        directory = root / table
        for version, what in differing_commits(directory):
            yield Problem(
                invariant="I5",
                object=str(commit_path(directory, version)),
                what=what,
                next_step="start holdfast up: it mends the commit from its copy, if that is sound",
            )
        for version in list_checkpoints(directory):
            path = checkpoint_path(directory, version)
            try:
                is_sound = checkpoint_is_sound(directory, version, path)
            except FileNotFoundError:
                continue  # cleaned away since it was listed
            checked["checkpoints"] += 1
            if not is_sound:
                yield Problem(
                    invariant="I5",
                    object=str(path),
                    what="the checkpoint is not what was written",
                    next_step="start holdfast up: it sets it aside; an earlier one and the commits say the same",
                )


def _check_log(lake: Lake, snapshot: Snapshot, checked: Counter[str]) -> Iterator[Problem]:
    """I3: every append continues the one before, in its epoch; watermarks only advance."""
    torn = lake.table(snapshot.table).torn_commit()
    if torn is not None:
        yield Problem(
            invariant="I5",
            object=torn.path,
            what="the last commit is torn; it was never acknowledged",
            next_step="start holdfast up with the streams it was fed from: it sets the commit aside",
        )
    last_seqs: dict[str, int] = {}
    for version in list_versions(snapshot.directory):
        if version > snapshot.version:
            break
        commit = read_commit(snapshot.directory, version)
        if commit is None:
            continue
        checked["commits"] += 1
        if commit.info.get("action") != "append":
            continue
        epoch, first, last = commit.info["epoch"], commit.info["first_seq"], commit.info["last_seq"]
        before = last_seqs.get(epoch)
        if last < first or (before is not None and first != before + 1):
            yield Problem(
                invariant="I3",
                object=f"{snapshot.directory} version {version}",
                what=f"archives {epoch} {first} to {last} after {before}",
                next_step="stop the archiver; compare with a backup of the log",
            )
        last_seqs[epoch] = last


def _check_files(snapshot: Snapshot, checked: Counter[str], *, deep: bool) -> Iterator[Problem]:
    """I1, I4: every file is there, whole, and holds what the log says; no sequence twice, none past a watermark."""
    spans: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for entry in sorted(snapshot.files.values(), key=lambda entry: (entry.epoch, entry.min_seq)):
        checked["files"] += 1
        damage = _find_damage(snapshot, entry, checked, deep=deep)
        if damage is not None:
            rows = name_rows(snapshot.table, snapshot.directory, entry, damage)
            what = damage.describe() + (f" ({', '.join(rows)})" if rows else "")
            yield Problem(
                invariant="I4", object=str(snapshot.directory / entry.path), what=what, next_step=quarantine.HINT
            )
            continue
        try:
            yield from _check_file(snapshot, entry, checked)
        except (OSError, pa.ArrowException, IntegrityError) as error:
            yield _file_violation(snapshot, entry, f"cannot be read: {error}")
            continue
        spans[entry.epoch].append((entry.min_seq, entry.max_seq, entry.path))
    for epoch, ranges in spans.items():
        yield from _check_overlaps(snapshot, epoch, ranges)


def _find_damage(snapshot: Snapshot, entry: FileEntry, checked: Counter[str], *, deep: bool) -> Damage | None:
    damage = find_damage(snapshot.directory, entry, again=True)
    if entry.checksums is not None:
        checked["checksums"] += 1
        if deep and damage is None and sha256_of(snapshot.directory / entry.path) != entry.checksums.sha256:
            return whole_damage(entry, "its SHA-256 is not what was written")
    return damage


def _file_violation(snapshot: Snapshot, entry: FileEntry, what: str, invariant: str = "I1") -> Problem:
    return Problem(
        invariant=invariant,
        object=str(snapshot.directory / entry.path),
        what=what,
        next_step="restore this file from a backup; what the streams still hold can be archived again",
    )


def _check_file(snapshot: Snapshot, entry: FileEntry, checked: Counter[str]) -> Iterator[Problem]:
    path = snapshot.directory / entry.path
    size = path.stat().st_size
    if size != entry.size_bytes:
        yield _file_violation(snapshot, entry, f"has {size} bytes, the log says {entry.size_bytes}")
    watermark = snapshot.transactions.get(f"{snapshot.table}/{entry.epoch}")
    rows = contexts = 0
    previous = entry.min_seq - 1
    with open_parquet(path) as parquet:
        for group in range(parquet.num_row_groups):
            content = read_group(parquet, group)
            rows += content.num_rows
            for row in to_rows(snapshot.table, content):
                if row.epoch != entry.epoch or not previous < row.seq <= entry.max_seq:
                    yield _file_violation(snapshot, entry, f"row {row.epoch}/{row.seq} follows {previous}")
                if watermark is None or row.seq > watermark.version:
                    yield _file_violation(snapshot, entry, f"row {row.seq} is past the watermark", "I3")
                previous = row.seq
                if isinstance(row, ContextRow):
                    contexts += row.form in ("plain", "manifest")
                    yield from _check_digest(snapshot, entry, row, checked)
    checked[snapshot.table] += rows
    brought = contexts if snapshot.table == "contexts" else rows
    if (rows, brought) != (entry.rows, entry.contexts):
        yield _file_violation(
            snapshot, entry, f"has {rows} rows and {brought} contexts, the log says {entry.rows} and {entry.contexts}"
        )


def _check_digest(snapshot: Snapshot, entry: FileEntry, row: ContextRow, checked: Counter[str]) -> Iterator[Problem]:
    if row.form in ("touch", "manifest", "joint"):
        return  # of those that name others, the whole is checked when it is put together
    checked["digests"] += 1
    actual = compute_digest(
        row.namespace, row.kind, row.body, content_type=row.content_type, expires_at_ms=row.expires_at_ms
    )
    if actual != row.digest:
        yield _file_violation(snapshot, entry, f"row {row.seq}, {row.ref}, hashes to {actual}", "I4")


def _check_overlaps(snapshot: Snapshot, epoch: str, ranges: list[tuple[int, int, str]]) -> Iterator[Problem]:
    """Files whose ranges overlap (two days around midnight) are compared row by row."""
    ranges.sort()
    reach, reach_path = -1, ""
    for first, last, path in ranges:
        if first <= reach:
            common = _sequences(snapshot, path) & _sequences(snapshot, reach_path)
            if common:
                yield Problem(
                    invariant="I1",
                    object=str(snapshot.directory / path),
                    what=f"{len(common)} rows of {epoch}, first {min(common)}, are in {reach_path} as well",
                    next_step="compare with a backup of the log; report this: no known crash leads to it",
                )
        if last > reach:
            reach, reach_path = last, path


def _sequences(snapshot: Snapshot, path: str) -> set[int]:
    with open_parquet(snapshot.directory / path, checks_pages=False) as parquet:
        batches = read_batches(parquet, ["stream_seq"])
        return {seq for batch in batches for seq in cast("list[int]", batch.column("stream_seq").to_pylist())}


_IDENTITIES: Final[dict[Table, tuple[str, str]]] = {
    "contexts": ("ref, namespace", "contexts_stored WHERE form <> 'touch'"),
    "events": ("event_id, namespace", "events"),
    "key_versions": ("version, key, namespace", "key_versions"),
}


def _views(lake: Lake) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    for statement in view_statements((lake.snapshot(table) for table in TABLES), temporary=True):
        connection.execute(statement)
    return connection


def _check_identities(lake: Lake, checked: Counter[str]) -> Iterator[Problem]:
    """I1, I2: no context, event or key version is in the lake twice."""
    with _views(lake) as connection:
        for table, (columns, source) in _IDENTITIES.items():
            found = connection.execute(
                f"SELECT count(*), {columns} FROM {source} GROUP BY {columns} HAVING count(*) > 1 LIMIT ?",  # noqa: S608  own names
                [MOST_OF_A_KIND],
            ).fetchall()
            checked["identities"] += lake.table(table).statistics().rows
            for count, *identity in found:
                yield Problem(
                    invariant="I1",
                    object=f"{table} {' '.join(str(part) for part in identity)}",
                    what=f"is stored {count} times",
                    next_step="report this: the archiver deduplicates by its index",
                )


_STORED: Final = """
SELECT namespace, kind, content_type, epoch_ms(expires_at), ref, form, encode(body), body_binary, size, epoch,
    stream_seq
FROM contexts_stored
"""
# Neighbours share their chunks: those of one conversation all begin with the same.
_MANIFESTS: Final = f"{_STORED} WHERE form = 'manifest' ORDER BY body ->> '$.chunks[0]', epoch, stream_seq"
_JOINTS: Final = f"{_STORED} WHERE form = 'joint' ORDER BY epoch, stream_seq"
_PARTS: Final = f"{_STORED} WHERE form IN ('chunk', 'joint') AND ref IN (SELECT unnest(?))"
_SIZES: Final = "SELECT ref, size FROM contexts_stored WHERE form IN ('chunk', 'joint') AND ref IN (SELECT unnest(?))"
_ROWS: Final = 1_000

_JOINTS_BYTES: Final = 32 * limits.MIB
"""Most bytes of joints that are put together at once: each asking reads through the references of the whole lake."""

_PARTS_AT_ONCE: Final = 20_000


def _check_joined(lake: Lake, checked: Counter[str]) -> Iterator[Problem]:
    """I4: every chunked body, and every chunk put together of others, hashes to its reference."""
    with (
        tempfile.TemporaryDirectory(prefix="holdfast-verify-") as spill,
        _views(lake) as connection,
        _views(lake) as chunks,
    ):
        connection.execute(f"SET temp_directory = {quote(spill)}")
        for joints in _by_size(_stored_rows(connection, _JOINTS)):
            checked["joints"] += len(joints)
            _, failed = assemble(joints, lambda digests: _parts(chunks, digests), at_once=_PARTS_AT_ONCE)
            for row in joints:
                if row.digest in failed:
                    yield _joined_violation(row, "a chunk", failed[row.digest])
        for row, error in check_manifests(
            _stored_rows(connection, _MANIFESTS), lambda d: _chunk_sizes(chunks, d), lambda d: _chunk_bodies(chunks, d)
        ):
            checked["manifests"] += 1
            if error is not None:
                yield _joined_violation(row, "a chunked body", error)


def _joined_violation(row: ContextRow, what: str, error: HoldfastError) -> Problem:
    return Problem(
        invariant="I4",
        object=row.ref,
        what=f"{what} cannot be put together: {error.message}",
        next_step="restore the files of its chunks from a backup",
    )


def _by_size(rows: Iterable[ContextRow]) -> Iterator[list[ContextRow]]:
    some: list[ContextRow] = []
    size = 0
    for row in rows:
        some.append(row)
        size += row.size
        if size >= _JOINTS_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _stored_rows(connection: duckdb.DuckDBPyConnection, query: str, values: Sequence[Any] = ()) -> Iterator[ContextRow]:
    found = connection.execute(query, list(values))
    while rows := found.fetchmany(_ROWS):
        for namespace, kind, content_type, expires_at_ms, ref, form, text, binary, size, epoch, seq in rows:
            yield ContextRow(
                namespace=namespace,
                kind=kind,
                digest=parse_ref(ref).digest,
                content_type=content_type,
                body=stored_body(form, text, binary),
                size=size,
                stored_at_ms=0,
                epoch=epoch,
                seq=seq,
                form=form,
                expires_at_ms=expires_at_ms,
            )


def _parts(connection: duckdb.DuckDBPyConnection, digests: Sequence[Digest]) -> dict[Digest, ContextRow]:
    return {row.digest: row for row in _stored_rows(connection, _PARTS, [_refs(digests)])}


def _chunk_sizes(connection: duckdb.DuckDBPyConnection, digests: Sequence[Digest]) -> dict[Digest, int]:
    found = connection.execute(_SIZES, [_refs(digests)]).fetchall()
    return {parse_ref(ref).digest: size for ref, size in found}


def _chunk_bodies(connection: duckdb.DuckDBPyConnection, digests: Sequence[Digest]) -> dict[Digest, bytes]:
    """The bytes of chunks; of joints those that can be put together."""
    rows = _parts(connection, digests)
    joints = [row for row in rows.values() if row.form == "joint"]
    made, _ = assemble(joints, lambda parts: _parts(connection, parts), at_once=_PARTS_AT_ONCE)
    return {digest: row.body for digest, row in (rows | made).items() if row.form == "chunk"}


def _refs(digests: Sequence[Digest]) -> list[str]:
    return [format_ref(CHUNK_KIND, digest) for digest in digests]
