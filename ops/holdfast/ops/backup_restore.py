"""Restores a backup into an empty system: everything is made beside its place, verified, and moved there at the end.

In the data directory, one step after the other, with what a crash leaves behind:

1. ``restoring/`` is made: ``holdfast up`` refuses a directory that holds it and no ``holdfast.json``, a restore begins
   anew;
2. the lake is copied into it, every file hashed; the streams are made from their images, by a server of our own on it
   (without a sync for each piece, a hundred times faster; everything is synced at the end) or on the server that is
   named, where they carry a mark and no version until the end;
3. what the streams hold beyond the lake is archived, so that it keeps the identity that it was acknowledged with;
4. each stream begins a new life behind what it holds, so that no position of what was stored after the backup, and is
   gone, is ever given to something else under the same name;
5. everything is verified: the bodies against their references, the lake against the streams;
6. the parts are moved to their places, ``holdfast.json`` is written last.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import tarfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.lake.duck import write_views_file
from holdfast.lake.files import fsync_directory, fsync_file, make_directory
from holdfast.lake.index import LakeIndex
from holdfast.lake.lake import Lake
from holdfast.ops.data_directory import LAYOUT_FILE, LAYOUT_VERSION, LOCK_FILE, RESTORING, unusable, write_atomically
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.ops.system import EMBEDDED_ROLE, INDEX_DIRECTORY, LAKE_DIRECTORY, embedded_target, watched
from holdfast.ops.verify import verify
from holdfast.schemas.errors import DataDirectoryError, HoldfastError, IntegrityError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import Table
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.hot import HotTier
from holdfast.streams.stream_images import (
    clear_for_restore,
    finish_restore,
    image_names,
    restore_consumers,
    restore_image,
)
from holdfast.streams.topology import StreamInfo, begin_epoch, stream_info
from holdfast.streams.wire import DEAD_STREAM
from holdfast.workers.archive_table import TableArchiver
from holdfast.workers.backup.manifest import FileObject, Manifest, StreamBackup, choose
from holdfast.workers.backup.pool import Pool

if TYPE_CHECKING:
    from holdfast.streams.connection_target import ConnectionTarget
    from holdfast.streams.local_server import LocalServer

logger = logging.getLogger(__name__)

STREAMS_DIRECTORY: Final = "jetstream"
ARCHIVE_ROWS: Final = 50_000
_PIECE: Final = 1024 * 1024
_COMMIT: Final = re.compile(r"_delta_log/\d{20}\.json\Z")
_KEPT: Final = frozenset({"holdfast.toml", "lost+found", LOCK_FILE})


class RestoreReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was restored.  ``archived`` rows were in the streams alone; ``violations`` are what ``verify`` found: the
    restore is complete, and the system as it was backed up was not whole."""

    id: str
    time_ms: int
    messages: int
    rows: int
    archived: int
    consumers: int
    bytes: int
    checked: dict[str, int]
    violations: list[Problem]
    seconds: float


async def restore_backup(
    directory: Path,
    data: Path,
    *,
    backup_id: str | None = None,
    before: datetime | None = None,
    target: ConnectionTarget | None = None,
    replicas: int = 1,
) -> RestoreReport:
    """Restores a backup: of an id, or the newest one, or the newest from before a time.

    Into the data directory, which must be empty; the streams into the server of ``target`` when there is one, which
    must hold none of them.  Raises NotFoundError when there is no such backup, DataDirectoryError or
    ConfigurationError when the system is not empty, IntegrityError when the backup is damaged; nothing that could be
    taken for a system is there then.
    """
    started = time.perf_counter()
    manifest = await asyncio.to_thread(choose, directory, backup_id=backup_id, before=before)
    pool = await asyncio.to_thread(Pool, directory)
    with _claimed(data) as staging:
        await asyncio.to_thread(_check_present, pool, manifest)
        await asyncio.to_thread(_stage_lake, pool, manifest, staging)
        failpoint("restore.after_lake")
        async with AsyncExitStack() as stack:
            if target is None:
                target = embedded_target(await stack.enter_async_context(_fast_server(staging)))
            connection = await stack.enter_async_context(open_connection(target, name="holdfast-restore"))
            await clear_for_restore(connection, manifest.id)
            consumers = 0
            for name in image_names():
                consumers += await _restore_stream(connection, pool, manifest.streams[name], manifest, replicas)
                failpoint("restore.after_stream")
            archived = await _begin_lives(connection, staging, replicas)
            report = await verify(staging / LAKE_DIRECTORY, connection)
            failpoint("restore.after_verify")
            for name in image_names():
                await finish_restore(connection, name)
        failpoint("restore.before_move")
        await asyncio.to_thread(_move_into_place, staging, data)
    return RestoreReport(
        id=manifest.id,
        time_ms=manifest.began_ms,
        messages=sum(stream.image.state.messages for stream in manifest.streams.values()),
        rows=sum(table.rows for table in manifest.tables.values()),
        archived=archived.rows,
        consumers=consumers,
        bytes=manifest.total_bytes,
        checked=report.checked,
        violations=[*archived.problems, *report.violations],
        seconds=round(time.perf_counter() - started, 3),
    )


@contextmanager
def _claimed(data: Path) -> Generator[Path]:
    """Yields an empty staging directory inside the data directory, which is empty otherwise; locked meanwhile.

    Taken away again when the block fails, so that only a killed process leaves anything.
    """
    try:
        make_directory(data)
        lock = os.open(data / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(data, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataDirectoryError(
                f"data directory {data} is in use", field="data", hint="choose an empty directory with --data"
            ) from error
        staging = data / RESTORING
        if staging.is_dir() and not (data / LAYOUT_FILE).exists():
            # Whatever is here was put here by a restore that did not come to its end.
            for path in data.iterdir():
                if path.name not in _KEPT:
                    _remove(path)
        found = sorted(path.name for path in data.iterdir() if path.name not in _KEPT)
        if found:
            raise DataDirectoryError(
                f"data directory {data} is not empty: it holds {found[0]!r}",
                field="data",
                hint="a backup is restored into an empty system: choose a new directory with --data",
            )
        staging.mkdir()
        fsync_directory(data)
        try:
            yield staging
        except BaseException:
            for name in (STREAMS_DIRECTORY, LAKE_DIRECTORY, INDEX_DIRECTORY, RESTORING):
                _remove(data / name)
            raise
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_present(pool: Pool, manifest: Manifest) -> None:
    missing = [sha256 for sha256, size in manifest.objects().items() if not pool.has(sha256, size)]
    if missing:
        raise _damaged(manifest, f"{len(missing)} of its {len(manifest.objects())} objects are missing or cut short")


def _damaged(manifest: Manifest, what: str) -> IntegrityError:
    return IntegrityError(
        f"backup {manifest.id} is damaged: {what}",
        hint="'holdfast backups DIR --verify' tells which are whole; restore one of these with --backup",
    )


def _stage_lake(pool: Pool, manifest: Manifest, staging: Path) -> None:
    for name, table in manifest.tables.items():
        directory = staging / LAKE_DIRECTORY / name
        touched: set[Path] = set()
        for file in table.files:
            target = directory / _relative(manifest, file.path)
            touched.add(target.parent)
            _copy_object(pool, manifest, file, target)
        content = io.BytesIO(b"".join(_pieces(pool, manifest, table.log)))
        with tarfile.open(fileobj=content) as archive:
            for entry in archive:
                if not _COMMIT.match(entry.name):
                    raise _damaged(manifest, f"its log of {name} holds {entry.name[:80]!r}")
                part = archive.extractfile(entry)
                assert part is not None, "a commit is a file"
                target = directory / entry.name
                make_directory(target.parent)
                touched.add(target.parent)
                target.write_bytes(part.read())
                fsync_file(target)
        for path in touched:
            fsync_directory(path)


def _relative(manifest: Manifest, path: str) -> Path:
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise _damaged(manifest, f"it names the file {path[:80]!r}")
    return Path(relative)


def _copy_object(pool: Pool, manifest: Manifest, file: FileObject, target: Path) -> None:
    make_directory(target.parent)
    with target.open("xb") as sink:
        for piece in _pieces(pool, manifest, file):
            sink.write(piece)
        sink.flush()
        os.fsync(sink.fileno())


def _pieces(pool: Pool, manifest: Manifest, file: FileObject | StreamBackup) -> Generator[bytes]:
    """Yields the content of an object; raises IntegrityError at its end when it does not hash to its name."""
    found = hashlib.sha256()
    with pool.path(file.sha256).open("rb") as source:
        while piece := source.read(_PIECE):
            found.update(piece)
            yield piece
    if found.hexdigest() != file.sha256:
        what = file.path if isinstance(file, FileObject) else f"the image of {file.image.name}"
        raise _damaged(manifest, f"{what} does not hash to {file.sha256}")


@asynccontextmanager
async def _fast_server(staging: Path) -> AsyncGenerator[LocalServer]:
    """A server on the staging directory that does not sync: what it wrote is synced before it is moved."""
    settings = ServerSettings(data=staging, durability="fast", announce=False)
    with _unheard("holdfast.ops.server"):
        async with EmbeddedServer(settings) as server, watched(server.wait_failed):
            yield server.info


@contextmanager
def _unheard(name: str) -> Generator[None]:
    """Keeps a logger's warnings to itself: that a server does not sync is meant here."""
    quiet = logging.getLogger(name)
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        yield
    finally:
        quiet.setLevel(before)


async def _restore_stream(
    connection: Connection, pool: Pool, stream: StreamBackup, manifest: Manifest, replicas: int
) -> int:
    async def chunks() -> AsyncIterator[bytes]:
        pieces = _pieces(pool, manifest, stream)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    await restore_image(connection, stream.image, chunks(), manifest.id, replicas=replicas)
    return await restore_consumers(connection, stream.image)


class _Archived(msgspec.Struct):
    """What was archived after the streams were restored, and why not all of it."""

    rows: int = 0
    problems: list[Problem] = []


async def _begin_lives(connection: Connection, staging: Path, replicas: int) -> _Archived:
    """Archives what the streams hold beyond the lake, under the positions that it was acknowledged at, then begins the
    next life of each behind it.

    Events come last: archiving one may store the context that came with it, which takes a position that the system
    that is gone may have given to something else.  By then contexts have begun their next life.
    """
    path, index_path = staging / LAKE_DIRECTORY, staging / INDEX_DIRECTORY / EMBEDDED_ROLE
    done = _Archived()
    async with AsyncExitStack() as stack:
        lake = await asyncio.to_thread(lambda: Lake.open(path, create=True))
        stack.push_async_callback(asyncio.to_thread, lake.close)
        index = await asyncio.to_thread(LakeIndex.open, index_path)
        stack.push_async_callback(asyncio.to_thread, index.close)
        hot = HotTier(connection, replicas=replicas)
        stack.push_async_callback(hot.close)
        executor = stack.enter_context(ThreadPoolExecutor(1))
        dead = await stream_info(connection, DEAD_STREAM)
        await begin_epoch(connection, DEAD_STREAM, dead.last_seq + 1)
        order: tuple[Table, ...] = ("contexts", "key_versions", "events", "contexts")
        for number, table in enumerate(order):
            archiver = TableArchiver(
                table,
                connection=connection,
                hot=hot,
                lake=lake,
                index=index,
                executor=executor,
            )
            try:
                await _archive_all(archiver)
            except HoldfastError as error:
                # The system was backed up with this problem: it is told, and the rest is restored.
                step = error.hint or "run holdfast verify"
                done.problems.append(
                    Problem(invariant="I8", object=archiver.stream, what=error.message, next_step=step)
                )
            finally:
                await archiver.close()
            done.problems += [alarm for alarm in archiver.alarms if alarm not in done.problems]
            done.rows += archiver.counters.rows
            if table not in order[:number]:
                before = await stream_info(connection, archiver.stream)
                start = await asyncio.to_thread(_next_start, lake, table, before)
                life = await begin_epoch(connection, archiver.stream, start)
                if start > 1:
                    await asyncio.to_thread(_archive_nothing, lake, table, life.epoch, start - 1)
    return done


async def _archive_all(archiver: TableArchiver) -> None:
    while await archiver.cycle(limit=ARCHIVE_ROWS):
        pass


def _next_start(lake: Lake, table: Table, info: StreamInfo) -> int:
    mark = lake.watermark(table)
    return mark.seq + 1 if mark is not None and mark.epoch == info.epoch else info.epoch_start


def _archive_nothing(lake: Lake, table: Table, epoch: str, last_seq: int) -> None:
    """Notes in the lake that the next life of a stream begins behind what is archived."""
    lake.append(table, [], epoch=epoch, first_seq=1, last_seq=last_seq)


def _move_into_place(staging: Path, data: Path) -> None:
    streams = staging / STREAMS_DIRECTORY
    for folder, _, files in os.walk(streams):
        for file in files:
            fsync_file(Path(folder) / file)
        fsync_directory(Path(folder))
    for name in (LAKE_DIRECTORY, INDEX_DIRECTORY, STREAMS_DIRECTORY):
        if (staging / name).exists():
            (staging / name).rename(data / name)
    fsync_directory(data)
    failpoint("restore.before_layout")
    # Its lists of files are absolute.
    write_views_file(Lake.open(data / LAKE_DIRECTORY))
    write_atomically(data / LAYOUT_FILE, msgspec.json.encode({"v": LAYOUT_VERSION}), durable=True)
    shutil.rmtree(staging)
