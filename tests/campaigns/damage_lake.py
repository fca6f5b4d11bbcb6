"""One prepared lake, its index, and what must be read of it: the ground that flips are tried on, without a server.

Holds no tests itself.
"""

from __future__ import annotations

import random
import shutil
import uuid
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from holdfast.lake import Lake, LakeIndex, Lookup, connect, verify_lake
from holdfast.lake.commit import write_checkpoint
from holdfast.schemas.errors import DamagedError, HoldfastError
from holdfast.schemas.refs import Digest
from holdfast.schemas.rows import TABLES, ContextRow, EventRow, KeyVersionRow, Row, Table
from tests.test_lake_samples import EPOCH, chunked, context, event, key_version, touch

FileKind = Literal["parquet", "delta", "checkpoint", "lmdb", "meta"]
FILE_KINDS: Final[tuple[FileKind, ...]] = ("parquet", "delta", "checkpoint", "lmdb", "meta")

Outcome = Literal["detected", "harmless", "wrong"]

RUNS: Final = 5
ROWS: Final = 24
"""Rows of a table in one commit."""

_COLUMNS: Final[dict[Table, str]] = {
    "contexts": "ref, namespace, kind, content_type, body_bytes, size, epoch_ms(created_at), epoch, stream_seq",
    "events": 'CAST(event_id AS VARCHAR), namespace, name, epoch_ms("timestamp"), epoch_ms(stored_at), agent_id, '
    "session_id, correlation_id, CAST(parent_event_id AS VARCHAR), CAST(root_event_id AS VARCHAR), event_depth, "
    "context_ref, data, extra, source_id, epoch, stream_seq",
    "key_versions": "namespace, key, version, op, ref, CAST(event_id AS VARCHAR), tags, session_id, "
    'epoch_ms("timestamp"), epoch_ms(stored_at), confidence, epoch, stream_seq',
}
_BY_IDENTITY: Final[dict[Table, str]] = {
    "contexts": "ref",
    "events": "CAST(event_id AS VARCHAR)",
    "key_versions": "version",
}


class Flip(msgspec.Struct, frozen=True):
    """One change to one file: a bit of a byte, or everything from a place on."""

    kind: str
    path: str
    place: int
    bit: int | None

    def __str__(self) -> str:
        what = "cut off" if self.bit is None else f"bit {self.bit}"
        return f"{self.kind} {self.path} at {self.place}: {what}"


class Verdict(msgspec.Struct):
    """What came of a flip: what was told of it, what was served wrongly, how many rows could not be read."""

    outcome: Outcome = "harmless"
    told: list[str] = []
    wrong: list[str] = []
    unreadable: int = 0

    def tell(self, where: str, what: str) -> None:
        """Notes that somebody was told of damage."""
        if len(self.told) < 20:
            self.told.append(f"{where}: {what}")
        if self.outcome == "harmless":
            self.outcome = "detected"

    def fail(self, what: str) -> None:
        """Notes that something wrong was served."""
        self.outcome = "wrong"
        if len(self.wrong) < 20:
            self.wrong.append(what)


def prepare(root: Path, seed: int) -> Expected:
    """Makes a lake with several files of each table, a checkpoint and commits behind it, and its index."""
    generator = random.Random(seed)
    lake = Lake.open(root / "lake", create=True)
    for run in range(RUNS):
        first = run * ROWS + 1
        plain = [context(seq, _body(generator, seq)) for seq in range(first, first + ROWS - 10)]
        rows: list[Row] = [*plain, touch(plain[0], first + ROWS - 10)]
        rows += chunked(first + ROWS - 9, generator.randbytes(2_000), 400)
        last = first + ROWS - 1
        assert rows[-1].seq <= last
        lake.append("contexts", rows, epoch=EPOCH, first_seq=first, last_seq=last)
        lake.append(
            "events", [_event(seq) for seq in range(first, last + 1)], epoch=EPOCH, first_seq=first, last_seq=last
        )
        versions = [key_version(seq, event_id=str(uuid.UUID(int=seq + (1 << 64)))) for seq in range(first, last + 1)]
        lake.append("key_versions", versions, epoch=EPOCH, first_seq=first, last_seq=last)
        if run in (1, 3):
            for table in TABLES:
                write_checkpoint(lake.snapshot(table))
    with LakeIndex.open(root / "index") as index:
        index.refresh(lake)
    return Expected.read(root)


def _body(generator: random.Random, seq: int) -> bytes:
    return msgspec.json.encode({"step": seq, "text": generator.randbytes(40).hex()})


def _event(seq: int) -> EventRow:
    return event(seq, data=b'{"n":%d,"note":"what was done in this step"}' % seq, root_event_id=str(uuid.UUID(int=1)))


class Expected(msgspec.Struct):
    """Everything that can be read of the lake, by its identity, in each of the ways of reading it."""

    contexts: dict[Digest, tuple[Any, ...]]
    bodies: dict[Digest, bytes]
    events: dict[tuple[str, str], EventRow]
    versions: dict[tuple[str, str, int], KeyVersionRow]
    sql: dict[Table, list[tuple[Any, ...]]]
    appended: int = RUNS * ROWS

    @classmethod
    def read(cls, root: Path) -> Expected:
        """Reads a lake that is sound."""
        with connect(root / "lake") as duck:
            sql: dict[Table, list[tuple[Any, ...]]] = {table: _rows(duck, table) for table in TABLES}
            digests = [
                row[0] for row in duck.execute("SELECT ref[-32:] FROM contexts_stored WHERE form <> 'touch'").fetchall()
            ]
        lake = Lake.open(root / "lake")
        with LakeIndex.open(root / "index") as index, Lookup(lake, index) as lookup:
            contexts = {digest: _plain(row) for digest, row in lookup.get_contexts(digests).items()}
            bodies = {digest: _body_of(lookup, digest) for digest in contexts}
            events = lookup.get_events([(row[1], row[0]) for row in sql["events"]])
            versions = lookup.get_key_versions([(row[0], row[1], row[2]) for row in sql["key_versions"]])
        assert len(bodies) == len(set(digests))
        assert (len(events), len(versions)) == (len(sql["events"]), len(sql["key_versions"]))
        return cls(contexts, bodies, events, versions, sql)


def _plain(row: ContextRow) -> tuple[Any, ...]:
    return (
        row.namespace,
        row.kind,
        row.content_type,
        row.body,
        row.size,
        row.stored_at_ms,
        row.form,
        row.epoch,
        row.seq,
    )


def _body_of(lookup: Lookup, digest: Any) -> bytes:
    found = lookup.get_body(digest)
    if found is None:
        raise LookupError(f"{digest} is not found")
    return found[1]


def _rows(duck: Any, table: Table) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = duck.execute(
        f"SELECT {_COLUMNS[table]} FROM {table} ORDER BY epoch, stream_seq"
    ).fetchall()
    return rows


def files_of(root: Path, kind: FileKind) -> list[Path]:
    """Returns the files of a kind, relative to the root, in a fixed order."""
    log, copies = "lake/*/_delta_log", "lake/*/_log_copy"
    patterns = {
        "parquet": ["lake/*/day=*/*.parquet"],
        "delta": [f"{log}/*.json", f"{copies}/*.json"],
        "checkpoint": [f"{log}/*.checkpoint.parquet", f"{copies}/*.sha256", f"{log}/_last_checkpoint"],
        "lmdb": ["index/data.mdb"],
        "meta": ["index/seal", "lake/*/_quarantine/*.json"],
    }[kind]
    # Names of data files are random, the order in which they were written is not: one seed, one schedule.
    found = [path for pattern in patterns for path in root.glob(pattern)]
    in_order = sorted(
        found, key=lambda path: (str(path.parent), path.stat().st_mtime_ns if kind == "parquet" else 0, path)
    )
    return [path.relative_to(root) for path in in_order]


def draw(root: Path, kind: FileKind, generator: random.Random) -> Flip:
    """Draws a flip, now and then a cut, of a random file of a kind: large files as likely as their bytes."""
    files = [path for path in files_of(root, kind) if (root / path).stat().st_size]
    path = generator.choices(files, [_used(root / path) for path in files])[0]
    place = generator.randrange(_used(root / path))
    return Flip(kind, str(path), place, None if generator.random() < 0.05 else generator.randrange(8))


def _used(path: Path) -> int:
    # The map of an index is a gigabyte of nothing behind what is used of it.
    return min(path.stat().st_size, 1 << 20)


def apply(root: Path, flip: Flip) -> None:
    """Changes the file, and leaves its times as they were: what rots has no new ones."""
    import os

    path = root / flip.path
    stat = path.stat()
    if flip.bit is None:
        os.truncate(path, flip.place)
    else:
        with path.open("r+b") as file:
            file.seek(flip.place)
            byte = file.read(1)[0]
            file.seek(flip.place)
            file.write(bytes([byte ^ (1 << flip.bit)]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def judge(root: Path, expected: Expected, flip: Flip, seed: int) -> Verdict:
    """Reads everything in every way, returns what came of it; of log files goes on writing, and reads again."""
    verdict = Verdict()
    for writer in (False, True) if flip.kind in ("delta", "checkpoint") else (False,):
        if writer and not _append(root, expected, verdict):
            break
        try:
            lake = Lake.open(root / "lake")
        except HoldfastError as error:
            verdict.tell("open", error.message)
            break
        _read_by_identity(root, lake, expected, verdict)
        _read_by_sql(root, expected, verdict, random.Random(seed))
        for problem in lake.problems():
            verdict.tell("problems", f"{problem.object}: {problem.what}")
    report = verify_lake(root / "lake", deep=True)
    for violation in report.violations:
        verdict.tell("verify", f"{violation.object}: {violation.what}")
    if verdict.unreadable and report.ok:
        verdict.fail("rows cannot be read, and verify finds nothing")
    return verdict


def _append(root: Path, expected: Expected, verdict: Verdict) -> bool:
    """Commits one row more to each table, as an archiver that starts would; False when it is refused."""
    try:
        lake = Lake.open(root / "lake", create=True)
        for table in TABLES:
            mark = lake.watermark(table)
            if lake.torn_commits():
                verdict.tell("append", "a commit is torn")
                return False
            if mark is None or mark.seq != expected.appended:
                verdict.fail(f"{table} is archived up to {mark}, not {expected.appended}")
                return False
            lake.append(table, [], epoch=EPOCH, first_seq=mark.seq + 1, last_seq=mark.seq + 1)
            write_checkpoint(lake.snapshot(table))
    except HoldfastError as error:
        verdict.tell("append", error.message)
        return False
    return True


def _read_by_identity(root: Path, lake: Lake, expected: Expected, verdict: Verdict) -> None:
    with LakeIndex.open(root / "index") as index, Lookup(lake, index) as lookup:
        try:
            index.refresh(lake)
        except HoldfastError as error:
            verdict.tell("index", error.message)
        lost: dict[str, list[DamagedError]] = {table: [] for table in TABLES}
        if _all_at_once(lookup, expected):
            return
        for digest, plain in expected.contexts.items():
            _compare(
                "contexts",
                digest,
                lambda digest=digest: [_plain(lookup.get_contexts([digest])[digest]), _body_of(lookup, digest)],
                [plain, expected.bodies[digest]],
                verdict,
                lost,
                plain[-1],
            )
        for key, event_row in expected.events.items():
            _compare(
                "events", key, lambda key=key: lookup.get_events([key])[key], event_row, verdict, lost, event_row.seq
            )
        for name, version in expected.versions.items():
            _compare(
                "key_versions",
                name,
                lambda name=name: lookup.get_key_versions([name])[name],
                version,
                verdict,
                lost,
                version.seq,
            )
        verdict.unreadable += sum(len(errors) for errors in lost.values())
        try:
            last = index.last_key_version("default", "plan.today")
            if last is None or last[0] != expected.appended:
                verdict.fail(f"the newest version of a key is {last}")
        except HoldfastError as error:
            verdict.tell("last version", error.message)


def _all_at_once(lookup: Lookup, expected: Expected) -> bool:
    """Whether everything is there and right: then nothing needs to be asked for singly."""
    try:
        contexts = {digest: _plain(row) for digest, row in lookup.get_contexts(expected.contexts).items()}
        bodies = {digest: _body_of(lookup, digest) for digest, row in contexts.items() if row[6] == "manifest"}
        return (
            contexts == expected.contexts
            and all(expected.bodies[digest] == body for digest, body in bodies.items())
            and lookup.get_events(expected.events) == expected.events
            and lookup.get_key_versions(expected.versions) == expected.versions
        )
    except (HoldfastError, LookupError):
        return False


def _compare(
    table: str, key: object, read: Any, wanted: object, verdict: Verdict, lost: dict[str, list[DamagedError]], seq: int
) -> None:
    try:
        found = read()
    except KeyError:
        verdict.fail(f"{table} {key} is not there")
    except LookupError as error:
        verdict.fail(f"{table}: {error}")
    except DamagedError as error:
        verdict.tell(f"{table} {key}", error.message)
        lost[table].append(error)
        if not error.rows or not error.file:
            verdict.fail(f"{table} {key}: the error names no rows: {error.message}")
        elif not error.first_seq <= seq <= error.last_seq and table != "contexts":
            # Of a chunked body the rows that are lost may be those of its chunks.
            verdict.fail(f"{table} {key} at {seq} is refused for rows {error.first_seq} to {error.last_seq}")
    except HoldfastError as error:
        verdict.tell(f"{table} {key}", error.message)
    else:
        if found != wanted:
            verdict.fail(f"{table} {key} is {str(found)[:300]}, not {str(wanted)[:300]}")


def _read_by_sql(root: Path, expected: Expected, verdict: Verdict, generator: random.Random) -> None:
    try:
        duck = connect(root / "lake")
    except HoldfastError as error:
        verdict.tell("connect", error.message)
        return
    with duck:
        for table in TABLES:
            wanted = expected.sql[table]
            some = generator.choice(wanted)
            identity = some[2] if table == "key_versions" else some[0]
            for what, query, right in (
                ("all", f"SELECT {_COLUMNS[table]} FROM {table} ORDER BY epoch, stream_seq", wanted),
                ("count", f"SELECT count(*) FROM {table}", [(len(wanted),)]),
                (
                    "one",
                    f"SELECT {_COLUMNS[table]} FROM {table} WHERE {_BY_IDENTITY[table]} = '{identity}'",
                    [some],
                ),
            ):
                try:
                    rows = duck.execute(query).fetchall()
                except HoldfastError as error:
                    verdict.tell(f"sql {table}", error.message)
                    continue
                if rows != right:
                    verdict.fail(f"sql {table} {what}: {len(rows)} rows that differ from the {len(right)} stored")


def copy(root: Path, target: Path) -> Path:
    """Copies the prepared ground."""
    shutil.copytree(root, target)
    return target
