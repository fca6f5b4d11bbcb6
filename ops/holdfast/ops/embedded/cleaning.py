"""The last step: the embedded form is replaced by references, once every event was found equal in the store.

A backup is kept beside the source under the name :func:`backup_of`, unless it is not wanted; an existing one is never
overwritten, since it may hold what a run that was cut short has replaced already.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from holdfast.ops.embedded import holes
from holdfast.ops.embedded.form import Parts, referring
from holdfast.ops.embedded.migration import parts_of
from holdfast.ops.embedded.source import EmbeddedSource, Item, TableSource, open_database, quoted
from holdfast.ops.embedded.survey import IdSet
from holdfast.ops.export_files import compressed
from holdfast.schemas.errors import ConfigurationError, InvalidFieldError
from holdfast.schemas.failpoints import failpoint


def references_of(path: Path) -> Path:
    """Returns the name of the file that holds the new form of an NDJSON file."""
    return path.with_name(f"{path.name.partition('.')[0]}.references{''.join(path.suffixes)}")


def backup_of(path: Path) -> Path:
    """Returns the name of the backup of a source."""
    return path.with_name(f"{path.name}.embedded")


def write_references(namespace: str, source: EmbeddedSource, ids: IdSet) -> Path:
    """Writes the new form of an NDJSON file beside it and returns its path; the file stays as it is.

    ``{"event": …, "data": …, "_ksi_context": "ctx_embedded_…", "_event_id": …}``.  What embeds no context stays.
    """
    target = references_of(source.path)
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as file:
        with closing(compressed(file, target.name)) as out:
            for text in _referring(namespace, source, ids):
                out.write(text + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    return target


def clean_up(namespace: str, source: EmbeddedSource, ids: IdSet, *, keep_backup: bool = True) -> Path | None:
    """Replaces the embedded contexts of a source and returns the backup, None when none was wanted.

    An NDJSON file is replaced as a whole by its new form.  In a table the context becomes ``{"_event_id": …,
    "_ksi_context_ref": …}``, all of them in one transaction.  The caller has verified the source.
    """
    backup = backup_of(source.path) if keep_backup else None
    if isinstance(source, TableSource):
        _clean_table(namespace, source, ids, backup)
        return backup
    references = write_references(namespace, source, ids)
    if backup is not None and not backup.exists():
        temporary = backup.with_name(f".{backup.name}.tmp")
        shutil.copy2(source.path, temporary)
        _sync(temporary)
        temporary.replace(backup)
    failpoint("migration.backed_up")
    references.replace(source.path)
    _sync(source.path.parent)
    return backup


def _referring(namespace: str, source: EmbeddedSource, ids: IdSet) -> Iterator[bytes]:
    stored = parts_of(namespace, source, ids)
    waiting = next(stored, None)
    for item in source.items():
        if waiting is None or item.line != waiting[0].line:
            yield item.text  # a reference already
            continue
        yield referring(item.text, _own_id(waiting[1]), waiting[1].ref)
        waiting = next(stored, None)


def _clean_table(namespace: str, source: TableSource, ids: IdSet, backup: Path | None) -> None:
    columns = source.columns
    column = columns.whole or columns.context
    if column is None:
        raise InvalidFieldError(f"{source.name} has no column to clean up", field="columns")
    try:
        with closing(open_database(source.path, writable=True)) as database:
            if backup is not None and not backup.exists():
                _back_up(database, backup)
            failpoint("migration.backed_up")
            with database:
                database.execute("BEGIN IMMEDIATE")
                # Each row is changed when it has been read, in ascending order of what is not changed.
                for item, parts, _ in parts_of(namespace, _Within(source, database), ids):
                    if parts.is_unreadable:
                        continue
                    if columns.whole is not None:
                        cell = referring(item.text, _own_id(parts), parts.ref)
                    else:
                        spelled = holes.spell_text(_own_id(parts), holes.TEXT)
                        cell = b'{"_event_id": ' + spelled + b', "_ksi_context_ref": "' + parts.ref.encode() + b'"}'
                    database.execute(
                        f"UPDATE {quoted(columns.table)} SET {quoted(column)} = ? WHERE rowid = ?",  # noqa: S608
                        (cell.decode(), item.line),
                    )
                failpoint("migration.replaced")
    except sqlite3.Error as error:
        raise ConfigurationError(
            f"{source.name} cannot be cleaned up: {error}", hint="nothing was changed; close what uses it"
        ) from error


class _Within:
    """A table read within a transaction."""

    def __init__(self, source: TableSource, database: sqlite3.Connection) -> None:
        self.name = source.name
        self.path = source.path
        self._source = source
        self._database = database

    def items(self) -> Iterator[Item]:
        return self._source.items_of(self._database)


def _back_up(database: sqlite3.Connection, backup: Path) -> None:
    temporary = backup.with_name(f".{backup.name}.tmp")
    temporary.unlink(missing_ok=True)
    with closing(sqlite3.connect(temporary)) as copy:
        database.backup(copy)
    _sync(temporary)
    temporary.replace(backup)


def _own_id(parts: Parts) -> str:
    event = parts.event
    return event.source_id or event.id


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
