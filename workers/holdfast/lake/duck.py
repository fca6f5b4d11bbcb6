"""DuckDB over the lake: :func:`connect` for notebooks and services, a file of views for plain DuckDB."""

from __future__ import annotations

import importlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

import duckdb
import pyarrow as pa

from holdfast.lake.checksums import find_damage
from holdfast.lake.columns import to_batch
from holdfast.lake.file_columns import FileColumns
from holdfast.lake.footers import Footers
from holdfast.lake.lake import Lake
from holdfast.lake.passed_over import doubtful_files
from holdfast.lake.quarantine import HINT, Quarantine
from holdfast.lake.snapshot import Identity, Picture, PictureTaker, Tail, identities_of
from holdfast.lake.views import file_scan, view_statements
from holdfast.schemas.errors import ConfigurationError, DamagedError, UnavailableError
from holdfast.schemas.rows import TABLES, Row, Table

if TYPE_CHECKING:
    from holdfast.lake.checksums import Damage
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.log import Snapshot

VIEWS_FILE: Final = "holdfast.duckdb"
VIEWS_FILE_INTERVAL_S: Final = 1.0
VIEWS_FILE_TRIES: Final = 5
"""How often the file is begun anew because files that it was to name were merged and removed meanwhile."""

_MARK: Final = "holdfast: damaged file|"

_TAIL_ADAPTER: Final = "holdfast.streams.tail"
_TAIL_RELATION: Final[dict[Table, str]] = {table: f"tail_of_{table}" for table in TABLES}

# What runs SQL, and so sees a picture of its own.
_STATEMENTS: Final = frozenset({"executemany", "from_query", "query", "sql", "table", "view"})


class DamageWatch:
    """Compares files with their checksums before DuckDB reads them: it looks at none, and serves what it finds.

    A file is compared once in a process, when it first is in a picture; what the lake's records call damaged is
    believed at once, and so is what it does of a healed file whose rows may be in another as well.  ``compare`` False
    goes by the records alone.
    """

    def __init__(self, *, compare: bool = True) -> None:
        self._compare = compare
        self._quarantines: dict[Path, Quarantine] = {}
        self._own: dict[Path, dict[str, tuple[str, object]]] = {}
        self._compared: dict[Path, Snapshot] = {}

    def damaged(self, snapshot: Snapshot) -> dict[str, str]:
        """Returns the files of a version that must not be read, with what is wrong with them."""
        directory = snapshot.directory
        own = self._own.get(directory, {})
        is_healed = any(_identity(directory / path) != identity for path, (_, identity) in own.items())
        if self._compare and (is_healed or self._compared.get(directory) is not snapshot):
            own = self._own[directory] = {
                path: (_told(snapshot, damage), _identity(directory / path))
                for path, entry in snapshot.files.items()
                if (damage := find_damage(directory, entry)) is not None
            }
            self._compared[directory] = snapshot
        quarantine = self._quarantines.get(directory)
        if quarantine is None:
            quarantine = self._quarantines[directory] = Quarantine(directory)
        recorded = {path: _told(snapshot, record.damage()) for path, record in quarantine.of(snapshot).items()}
        doubtful = {path: _told(snapshot, damage) for path, damage in doubtful_files(snapshot).items()}
        return doubtful | recorded | {path: told for path, (told, _) in own.items()}


def _identity(path: Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _told(snapshot: Snapshot, damage: Damage) -> str:
    spans = ",".join(f"{span.first_seq}-{span.last_seq}" for span in damage.ranges)
    file = snapshot.directory / damage.path
    return f"{_MARK}{damage.rows}|{spans}|{file}|{file} is damaged: {damage.describe()}; {HINT}"


def _translated(error: duckdb.Error) -> Exception:
    """Returns DamagedError for a statement that came to a damaged file, else the error as it is."""
    _, mark, told = str(error).partition(_MARK)
    parts = told.split("|", 3)
    if not mark or len(parts) != 4:
        return error
    rows, spans, file, message = parts
    seqs = [int(seq) for span in spans.split(",") for seq in span.split("-", 1)]
    return DamagedError(
        message.removesuffix(f"; {HINT}"), file=file, rows=int(rows), first_seq=min(seqs), last_seq=max(seqs), hint=HINT
    )


class Connection:
    """A DuckDB connection whose every statement sees the lake, and the live tail, as of its start.

    Everything that a ``duckdb.DuckDBPyConnection`` has works here; ``execute`` returns this object.  Views:
    ``contexts``, ``events``, ``key_versions``, ``current_keys``, ``contexts_stored``; table macros:
    ``contexts_of(refs)``, ``keys_as_of(moment)``, ``get_context_stats()``.  They cannot be written to; tables of one's
    own live in memory.  A lazy relation (``sql``, ``table``) is evaluated against the newest picture that this
    connection has taken by then.  Not for several threads at once: give each its own :meth:`cursor`.

    A file that is not what was written is never read: a statement that may concern its rows raises DamagedError, one
    over other tables or narrowed to other days (``day``) is served.
    """

    def __init__(
        self,
        duck: duckdb.DuckDBPyConnection,
        taker: PictureTaker,
        *,
        owns_taker: bool,
        watch: DamageWatch | None = None,
        footers: Footers | None = None,
        columns: FileColumns | None = None,
    ) -> None:
        self._duck = duck
        self._columns = columns or FileColumns()
        self._taker = taker
        self._owns_taker = owns_taker
        self._watch = watch or DamageWatch()
        self._footers = footers
        self._damaged: dict[Table, dict[str, str]] = {}
        self._picture: Picture | None = None
        self._pinned = False
        self.refresh()

    def execute(self, query: Any, parameters: Any = None) -> Self:
        """Runs a statement on a fresh picture; results are fetched from this object."""
        self.refresh()
        try:
            if parameters is None:
                self._duck.execute(query)
            else:
                self._duck.execute(query, parameters)
        except duckdb.Error as error:
            raise _translated(error) from error
        return self

    def refresh(self) -> Picture:
        """Takes a picture of this moment for the statements to come, unless one is pinned; returns it."""
        if not self._pinned or self._picture is None:
            picture = self._taker.take()
            damaged: dict[Table, dict[str, str]] = {
                table: self._watch.damaged(snapshot) for table, snapshot in picture.snapshots.items()
            }
            if self._picture is None or picture.number != self._picture.number or damaged != self._damaged:
                self._show(picture, damaged)
        assert self._picture is not None
        return self._picture

    def _show(self, picture: Picture, damaged: dict[Table, dict[str, str]]) -> None:
        old = self._picture
        self._settle()
        for table, rows in picture.tails.items():
            if old is None or old.tails.get(table) is not rows:
                self._duck.register(_TAIL_RELATION[table], rows)
        changed = [
            snapshot
            for table, snapshot in picture.snapshots.items()
            if old is None or old.snapshots[table] is not snapshot or damaged[table] != self._damaged.get(table)
        ]
        tails: dict[Table, str] = {table: _TAIL_RELATION[table] for table in picture.tails}
        alike = {each.table for each in changed if self._columns.are_alike(self._duck, each, damaged[each.table])}
        for statement in view_statements(changed, temporary=True, tails=tails, damaged=damaged, alike=alike):
            self._duck.execute(statement)
        self._picture, self._damaged = picture, damaged
        if self._footers is not None:
            self._footers.show(picture.snapshots.values())

    def _settle(self) -> None:
        """Gives up an unfinished result, as another ``execute`` would: while there is one, DuckDB refuses the rest."""
        self._duck.execute("SELECT 1").fetchall()

    @contextmanager
    def pinned(self) -> Generator[Self]:
        """Within the block, every statement sees the picture taken at its start."""
        self.refresh()
        self._pinned = True
        try:
            yield self
        finally:
            self._pinned = False

    def cursor(self) -> Connection:
        """Returns a connection of its own to the same lake and tail, for another thread."""
        self._footers = None  # memory may not be made short for what another thread runs
        return Connection(self._duck.cursor(), self._taker, owns_taker=False, watch=self._watch, columns=self._columns)

    def close(self) -> None:
        """Closes the connection and, on the one that ``connect`` returned, the tail."""
        self._duck.close()
        if self._owns_taker:
            self._taker.close()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._duck, name)
        if not callable(value):
            return value
        is_statement = name in _STATEMENTS
        if name == "duplicate":
            self._footers = None  # as for a cursor

        def run(*arguments: Any, **options: Any) -> Any:
            if is_statement:
                self.refresh()
                self._settle()
            try:
                return value(*arguments, **options)
            except duckdb.Error as error:
                raise _translated(error) from error

        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    path: str | Path,
    nats_url: str | None = None,
    *,
    tail: Tail | None = None,
    live: Sequence[Table] = TABLES,
    index: LakeIndex | None = None,
    compare: bool = True,
    config: dict[str, str | bool | int | float | list[str]] | None = None,
) -> Connection:
    """Opens the lake in a directory for SQL.

    With ``nats_url``, or a ``tail`` of one's own, the views also show what is not archived yet, each row exactly once,
    read after it was acknowledged.  ``live`` names the tables for which they do: the tail of a table stays in memory,
    bodies and all, so leave out what is not asked for.  ``index`` makes the check for repetitions cheaper where a
    process has one open; it is not needed.  ``compare`` False leaves out the comparison of files with their checksums
    before the first statement over them (a third of a second for each GB): then DuckDB serves what is on the disk.
    ``config`` is DuckDB's.  Raises DataDirectoryError when there is no lake.
    """
    lake = Lake.open(path)
    if tail is None and nats_url is not None:
        tail = _open_tail(nats_url)
    duck = duckdb.connect(":memory:", config=config or {})
    try:
        # Our files never change under their names, so footers may be kept: halves the time over 1,000 files.
        duck.execute("SET parquet_metadata_cache = true")
        if "allocator_background_threads" not in (config or {}):
            # What a statement needed goes back to the system soon after it: 177 MiB stayed, 32 do.
            duck.execute("SET allocator_background_threads = true")
        watch = DamageWatch(compare=compare)
        find_known = _KnownByIndex(lake, index) if index is not None else _KnownByScan(duck.cursor(), watch)
        limit = (config or {}).get("memory_limit", (config or {}).get("max_memory"))
        footers = Footers(duck, memory_limit=None if limit is None else str(limit))
        taker = PictureTaker(lake, tail, find_known, tables=live)
        return Connection(duck, taker, owns_taker=True, watch=watch, footers=footers)
    except BaseException:
        duck.close()
        if tail is not None:
            tail.close()
        raise


def _open_tail(nats_url: str) -> Tail:
    # By name, at call time: the lake stands without NATS.
    try:
        adapter = importlib.import_module(_TAIL_ADAPTER)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the live tail needs {error.name}", hint="pip install 'holdfast[lake]', or leave out nats_url"
        ) from error
    open_tail = cast(Callable[[str], Tail], adapter.open_tail)
    return open_tail(nats_url)


_KEY_COLUMNS: Final[dict[Table, tuple[str, ...]]] = {
    "contexts": ("ref",),
    "events": ("namespace", "event_id"),
    "key_versions": ("namespace", "key", "version"),
}


class _KnownByScan:
    """Finds repetitions of archived rows by one semi-join over the lake's files, but for damaged ones."""

    def __init__(self, duck: duckdb.DuckDBPyConnection, watch: DamageWatch) -> None:
        self._duck = duck
        self._watch = watch

    def __call__(self, snapshot: Snapshot, rows: Sequence[Row]) -> set[Identity]:
        damaged = self._watch.damaged(snapshot)
        if len(snapshot.files) == len(damaged):
            return set()
        columns = ", ".join(_KEY_COLUMNS[snapshot.table])
        self._duck.register("candidates", pa.Table.from_batches([to_batch(snapshot.table, rows)]))
        try:
            found = self._duck.execute(
                f"SELECT DISTINCT {columns} FROM {file_scan(snapshot, damaged)} SEMI JOIN candidates USING ({columns})"  # noqa: S608  own names
                + (" WHERE form <> 'touch'" if snapshot.table == "contexts" else "")
            ).fetchall()
        finally:
            self._duck.unregister("candidates")
        if snapshot.table == "contexts":
            return {(ref[-32:],) for (ref,) in found}
        return {tuple(str(part) for part in key) for key in found}


class _KnownByIndex:
    """Finds repetitions of archived rows by the index."""

    def __init__(self, lake: Lake, index: LakeIndex) -> None:
        self._lake = lake
        self._index = index

    def __call__(self, snapshot: Snapshot, rows: Sequence[Row]) -> set[Identity]:
        version = self._index.refresh(self._lake).versions[snapshot.table]
        identities = identities_of(rows)
        keys = [_index_key(snapshot.table, identity) for identity in identities]
        # What damaged files hide is none here, as in a scan: they are not shown either.
        places = self._index.ask(snapshot.table, keys, version=version).positions
        # The index may be ahead of the snapshot and know this very row: that is no repetition.
        return {
            identity
            for row, identity, key in zip(rows, identities, keys, strict=True)
            if (place := places.get(key)) is not None and not (place.epoch == row.epoch and place.seq >= row.seq)
        }


def _index_key(table: Table, identity: Identity) -> Any:
    if table == "contexts":
        return identity[0]
    return identity if table == "events" else (identity[0], identity[1], int(identity[2]))


class ViewsFile:
    """Keeps ``<lake>/holdfast.duckdb`` up to date, at most once a second, for one process that commits."""

    def __init__(self, lake: Lake, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lake = lake
        self._clock = clock
        self._written_at: float | None = None
        self._versions: dict[Table, int] = {}

    def update(self) -> bool:
        """Writes the file if a table has changed and the last writing is a second ago; returns whether it did."""
        versions: dict[Table, int] = {table: self._lake.version(table) for table in TABLES}
        now = self._clock()
        due = self._written_at is None or now - self._written_at >= VIEWS_FILE_INTERVAL_S
        if not due or versions == self._versions:
            return False
        write_views_file(self._lake)
        self._written_at, self._versions = now, versions
        return True


def write_views_file(lake: Lake) -> Path:
    """Writes a DuckDB database that holds the views and no rows, and renames it into place; returns its path.

    Plain DuckDB opens it (``duckdb lake/holdfast.duckdb``).  Its file lists are absolute and of this moment; files
    that were compacted away stay for a day, so that a reader who opened it before goes on.  Open it read-only: what is
    written into it is gone with the next commit.  Of files known to be damaged a statement is told; plain DuckDB
    itself compares no checksum.
    """
    for tries_left in reversed(range(VIEWS_FILE_TRIES)):
        snapshots = [lake.snapshot(table) for table in TABLES]
        try:
            return _write_views_file(lake.path, snapshots)
        except duckdb.Error as error:
            # Not an IOException alone: a sync that fails is fatal to DuckDB, which is to say to this database of its.
            lake.refresh()
            # DuckDB looks into every file.  Whoever merged some, and removed them, has committed that before.
            if tries_left and any(
                _has_lost_files(each) and each is not lake.snapshot(each.table) for each in snapshots
            ):
                continue
            raise _views_failed(lake.path / VIEWS_FILE, snapshots, error) from error
    raise AssertionError("the last try returns or raises")


def _has_lost_files(snapshot: Snapshot) -> bool:
    return _lost_file(snapshot) is not None


def _lost_file(snapshot: Snapshot) -> Path | None:
    return next((file for path in snapshot.files if not (file := snapshot.directory / path).exists()), None)


def _views_failed(target: Path, snapshots: Sequence[Snapshot], error: duckdb.Error) -> UnavailableError:
    lost = next(filter(None, map(_lost_file, snapshots)), None)
    if lost is not None:
        what = f"{lost} is not there"
        hint = "run 'holdfast verify'; if it was merged with others meanwhile, the file is made with the next commit"
    else:
        what = str(error)
        hint = f"free space in {tempfile.gettempdir()}, or name another directory for temporary files in TMPDIR"
    return UnavailableError(f"the views file {target} cannot be made: {what}", hint=hint)


def _write_views_file(lake: Path, snapshots: Sequence[Snapshot]) -> Path:
    target = lake / VIEWS_FILE
    temporary = lake / f".{VIEWS_FILE}.{uuid.uuid4().hex}"
    watch = DamageWatch(compare=False)
    damaged: dict[Table, dict[str, str]] = {snapshot.table: watch.damaged(snapshot) for snapshot in snapshots}
    # Made elsewhere: DuckDB takes a question mark in the path of a database for the beginning of options.
    with tempfile.TemporaryDirectory(prefix="holdfast-views-") as workshop:
        made = Path(workshop) / VIEWS_FILE
        with duckdb.connect(str(made)) as duck:
            for statement in view_statements(snapshots, temporary=False, damaged=damaged):
                duck.execute(statement)
        try:
            shutil.copyfile(made, temporary)
            # A log left by somebody who wrote into the old file would keep the new one from opening.
            target.with_name(f"{VIEWS_FILE}.wal").unlink(missing_ok=True)
            temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target
