"""What a backup consists of, as it is written beside the objects; and which backups there are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.lake.files import fsync_directory, write_durably
from holdfast.schemas.errors import DataDirectoryError, IntegrityError, NotFoundError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import iso_from_ms
from holdfast.schemas.rows import Table
from holdfast.streams.stream_images import StreamImage
from holdfast.workers.backup.pool import MANIFESTS, Pool

FORMAT_VERSION: Final = 1


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the lake: its path in its table's directory, and the object that holds its content."""

    path: str
    sha256: str
    size: int


class TableBackup(msgspec.Struct, frozen=True, kw_only=True):
    """A table at one version.  ``log`` is an object, a tar archive of the commits from the checkpoint on; ``epoch`` and
    ``seq`` its watermark, None and 0 before the first append."""

    version: int
    epoch: str | None
    seq: int
    rows: int
    files: list[FileObject]
    log: FileObject


class StreamBackup(msgspec.Struct, frozen=True, kw_only=True):
    """A stream: what its image is of, and the object that holds its bytes."""

    image: StreamImage
    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One backup.  Everything acknowledged before ``began_ms`` is in it.

    ``new_objects`` and ``new_bytes`` are what no earlier backup held; ``damaged`` are files of the lake that were not
    what had been committed.
    """

    v: int = FORMAT_VERSION
    id: str
    began_ms: int
    ended_ms: int
    holdfast: str
    streams: dict[str, StreamBackup]
    tables: dict[Table, TableBackup]
    new_objects: int
    new_bytes: int
    damaged: list[str] = []

    def objects(self) -> dict[str, int]:
        """Returns the objects that the backup consists of, with their sizes."""
        found = {stream.sha256: stream.size for stream in self.streams.values()}
        for table in self.tables.values():
            found |= {file.sha256: file.size for file in (*table.files, table.log)}
        return found

    @property
    def total_bytes(self) -> int:
        """The bytes of all objects of the backup, those of earlier ones among them."""
        return sum(self.objects().values())


class BackupListing(msgspec.Struct, frozen=True, kw_only=True):
    """A backup as ``holdfast backups`` lists it.  ``state`` is complete, verified or damaged; ``problem`` says what
    was found damaged."""

    id: str
    time: str
    seconds: float
    bytes: int
    new_bytes: int
    new_objects: int
    messages: int
    rows: int
    state: str
    problem: str | None = None


_DECODER: Final = msgspec.json.Decoder(Manifest)


def manifest_path(directory: Path, backup_id: str) -> Path:
    """Returns where a backup's manifest is."""
    return directory / MANIFESTS / f"{backup_id}.json"


def write_manifest(pool: Pool, manifest: Manifest) -> None:
    """Makes a backup complete: every object is durable by then, the manifest comes last, whole or not at all."""
    pool.flush()
    failpoint("backup.before_manifest")
    raw = msgspec.json.encode(manifest)
    # The second line tells a manifest that was damaged since.
    write_durably(manifest_path(pool.directory, manifest.id), raw + b"\n" + _sum(raw) + b"\n")
    failpoint("backup.after_manifest")


def read_manifest(directory: Path, backup_id: str) -> Manifest:
    """Returns a backup; raises NotFoundError when there is none of that id, IntegrityError when it is damaged."""
    path = manifest_path(directory, backup_id)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, ValueError) as error:
        raise NotFoundError(
            f"there is no backup {backup_id[:60]!r} in {directory}",
            field="backup",
            hint=f"list them with 'holdfast backups {directory}'",
        ) from error
    raw, _, rest = content.partition(b"\n")
    if rest != _sum(raw) + b"\n":
        raise IntegrityError(
            f"the manifest {path} is damaged", hint="restore another backup; keep its objects until it is mended"
        )
    version = msgspec.json.decode(raw, type=dict[str, Any]).get("v")
    if version != FORMAT_VERSION:
        raise DataDirectoryError(
            f"backup {backup_id} has format {version}, this holdfast reads {FORMAT_VERSION}",
            field="backup",
            hint="use the holdfast release that wrote it",
        )
    return _DECODER.decode(raw)


def backup_ids(directory: Path) -> list[str]:
    """Returns the ids of all backups, oldest first; one that was cut off has none."""
    return sorted(path.stem for path in (directory / MANIFESTS).glob("*.json"))


def read_manifests(directory: Path) -> tuple[list[Manifest], list[str]]:
    """Returns the backups, oldest first, and what is wrong with those that cannot be read."""
    found: list[Manifest] = []
    damaged: list[str] = []
    for backup_id in backup_ids(directory):
        try:
            found.append(read_manifest(directory, backup_id))
        except IntegrityError as error:
            damaged.append(error.message)
        except NotFoundError:
            continue  # retention took it away meanwhile
    return sorted(found, key=lambda manifest: (manifest.began_ms, manifest.id)), damaged


def choose(directory: Path, *, backup_id: str | None = None, before: datetime | None = None) -> Manifest:
    """Returns the backup of an id, or the newest one that began before a time, or the newest one.

    Raises NotFoundError when there is none.
    """
    if backup_id is not None:
        return read_manifest(directory, backup_id)
    manifests, damaged = read_manifests(directory)
    latest_ms = None if before is None else before.timestamp() * 1000
    fitting = [manifest for manifest in manifests if latest_ms is None or manifest.began_ms < latest_ms]
    if fitting:
        return fitting[-1]
    also = f"; {len(damaged)} are damaged" if damaged else ""
    when = "" if before is None else f" from before {before.isoformat()}"
    raise NotFoundError(
        f"{directory} holds no complete backup{when}{also}",
        field="backup",
        hint=f"list them with 'holdfast backups {directory}'",
    )


def listing_of(manifest: Manifest, *, state: str = "complete", problem: str | None = None) -> BackupListing:
    """Returns a backup's line of the list."""
    return BackupListing(
        id=manifest.id,
        time=iso_from_ms(manifest.began_ms),
        seconds=(manifest.ended_ms - manifest.began_ms) / 1000,
        bytes=manifest.total_bytes,
        new_bytes=manifest.new_bytes,
        new_objects=manifest.new_objects,
        messages=sum(stream.image.state.messages for stream in manifest.streams.values()),
        rows=sum(table.rows for table in manifest.tables.values()),
        state=state,
        problem=problem,
    )


def unsound_objects(pool: Pool, manifest: Manifest, known: dict[str, bool] | None = None) -> list[str]:
    """Reads every object of a backup and returns those that are missing or do not hash to their name.

    ``known`` remembers what was read, so that a list of backups reads each object once.
    """
    checked = {} if known is None else known
    for sha256, size in manifest.objects().items():
        if sha256 not in checked:
            checked[sha256] = pool.is_sound(sha256, size)
    return [sha256 for sha256 in manifest.objects() if not checked[sha256]]


def plan_retention(manifests: Sequence[Manifest], *, now_ms: int, retention_s: float) -> list[Manifest]:
    """Returns the backups that are older than the retention; the newest is never among them.

    One of a time to come is not taken for it: it was made under a clock that went wrong.
    """
    believed = [manifest for manifest in manifests if manifest.began_ms <= now_ms]
    newest = max(believed, key=lambda manifest: (manifest.began_ms, manifest.id), default=None)
    oldest_ms = now_ms - retention_s * 1000
    return [manifest for manifest in manifests if manifest is not newest and manifest.began_ms < oldest_ms]


def remove_backups(pool: Pool, doomed: Iterable[Manifest], *, unfinished: Iterable[str] = ()) -> tuple[int, int]:
    """Takes backups away, then the objects that no other one holds; returns how many objects, and their bytes.

    ``unfinished`` are objects of a backup that is still being made.  While a manifest cannot be read, its objects are
    not known: then no object is removed.
    """
    for manifest in doomed:
        manifest_path(pool.directory, manifest.id).unlink(missing_ok=True)
    # No object may go while a power cut could bring back a manifest that names it.
    fsync_directory(pool.directory / MANIFESTS)
    failpoint("backup.before_collect")
    kept, damaged = read_manifests(pool.directory)
    if damaged:
        return 0, 0
    keep = {sha256 for manifest in kept for sha256 in manifest.objects()}
    return pool.collect(keep | set(unfinished))


def _sum(raw: bytes) -> bytes:
    return hashlib.sha256(raw).hexdigest().encode()
