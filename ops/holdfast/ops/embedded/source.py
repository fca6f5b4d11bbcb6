"""Where embedded events come from: NDJSON, plain or compressed, or a table of SQLite.  Read as often as needed."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, Protocol, cast

import msgspec

from holdfast.ops.embedded import holes
from holdfast.ops.embedded.reading import CONTEXT
from holdfast.ops.traces.detect import first_keys
from holdfast.ops.traces.sources import Source
from holdfast.schemas import limits
from holdfast.schemas.errors import InputError, InvalidFieldError, NotFoundError, TooLargeError

_SQLITE: Final = b"SQLite format 3\0"
_BLANK: Final = b" \t\r\n"
_HEAD_BYTES: Final = 64 * 1024
_LINES_TRIED: Final = 20
_EVENT_NAMES: Final = frozenset({"event", "event_name", "name"})

_NAME_COLUMNS: Final = ("event_name", "event", "name")
_DATA_COLUMNS: Final = ("data", "event_data", "payload")
_CONTEXT_COLUMNS: Final = ("_ksi_context", "ksi_context", "context", "context_data", "context_json", "event_context")
_ID_COLUMNS: Final = ("event_id", "_event_id", "id")
_WHOLE_COLUMNS: Final = ("event_json", "json", "raw", "event", "payload", "data", "body")


class Item(msgspec.Struct, frozen=True):
    """An event of a source: its line (of a table, its rowid), and its exact text."""

    line: int
    text: bytes


class EmbeddedSource(Protocol):
    """A source of embedded events, in a fixed order."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def path(self) -> Path:
        """The file."""
        ...

    def items(self) -> Iterator[Item]:
        """Yields the events in order; blocks on the disk.  Raises InputError when the source cannot be read on."""
        ...


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """Which columns of a table hold an event: ``whole``, its JSON; or its parts."""

    table: str
    whole: str | None = None
    event_id: str | None = None
    name: str | None = None
    data: str | None = None
    context: str | None = None


class LinesSource:
    """Events of an NDJSON file.  Blank lines are none; everything else is, whatever it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = Source.of_path(path)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def items(self) -> Iterator[Item]:
        """Yields each line with its number, without the newline that ends it."""
        number = 1
        held: list[bytes] = []
        held_bytes = 0
        try:
            for chunk in self._source.chunks():
                *lines, rest = chunk.split(b"\n")
                for line in lines:
                    text = b"".join((*held, line)) if held else line
                    held.clear()
                    held_bytes = 0
                    if text.strip(_BLANK):
                        yield Item(number, text)
                    number += 1
                held.append(rest)
                held_bytes += len(rest)
                if held_bytes > limits.BODY_BYTES:
                    raise TooLargeError(
                        f"{self.name}:{number}: the line is over {limits.BODY_BYTES} bytes",
                        field="line",
                        limit=limits.BODY_BYTES,
                    )
        except (OSError, zlib.error) as error:
            raise InvalidFieldError(f"{self.name}:{number}: cannot be read further: {error}", field="path") from error
        text = b"".join(held)
        if text.strip(_BLANK):
            yield Item(number, text)


class TableSource:
    """Events of a table of SQLite, in the order of their rowids.

    Where an event is in several columns, its text is put together of them: ``{"event_id": …, "event": …, "data": …,
    "_ksi_context": …}``, the JSON of the cells as it is, members of empty cells left out.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path = path
        self.columns = columns

    @property
    def name(self) -> str:
        """The path and the table."""
        return f"{self.path}:{self.columns.table}"

    def items(self) -> Iterator[Item]:
        """Yields each row with its rowid; rows without a text are passed over."""
        with closing(open_database(self.path)) as database:
            yield from self.items_of(database)

    def items_of(self, database: sqlite3.Connection) -> Iterator[Item]:
        """As :meth:`items`, over a database in hand."""
        columns = self.columns
        chosen: tuple[str, ...]
        if columns.whole is not None:
            chosen = (columns.whole,)
        else:
            chosen = tuple(filter(None, (columns.event_id, columns.name, columns.data, columns.context)))
        listed = ", ".join(map(quoted, chosen))
        try:
            for rowid, *cells in database.execute(
                f"SELECT rowid, {listed} FROM {quoted(columns.table)} ORDER BY rowid"  # noqa: S608  quoted names
            ):
                text = self._text(dict(zip(chosen, cells, strict=True)))
                if text.strip(_BLANK):
                    yield Item(rowid, text)
        except sqlite3.Error as error:
            raise InvalidFieldError(f"{self.name} cannot be read: {error}", field="path") from error

    def _text(self, cells: dict[str, object]) -> bytes:
        columns = self.columns
        if columns.whole is not None:
            return _cell(cells[columns.whole]) or b""
        members: list[bytes] = []
        for member, column in (("event_id", columns.event_id), ("event", columns.name)):
            cell = cells.get(column or "")
            # A number is the table's own key, not an id of the event.
            if isinstance(cell, bytes):
                spelled = holes.spell_text(cell.decode("utf-8", "surrogateescape"), holes.TEXT)
                members.append(f'"{member}": '.encode() + spelled)
        for member, column in (("data", columns.data), (CONTEXT, columns.context)):
            cell = _cell(cells.get(column or ""))
            if cell is not None:
                members.append(f'"{member}": '.encode() + cell)
        return b"{" + b", ".join(members) + b"}" if members else b""


def open_source(path: Path, table: str | None = None, columns: str | None = None) -> EmbeddedSource:
    """Returns the source that is a file; raises NotFoundError, or InvalidFieldError naming what cannot be told.

    ``columns`` names those of a table: ``json=<column>``, or ``name=…,data=…,context=…`` and perhaps ``id=…``.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file {str(path)!r}", field="path")
    if is_database(path):
        return TableSource(path, find_columns(path, table, columns))
    if table is not None or columns is not None:
        raise InvalidFieldError(f"{str(path)!r} is no SQLite database", field="table", hint="leave --table out")
    return LinesSource(path)


def is_embedded(path: Path) -> bool:
    """Whether a file holds embedded events, as its first lines or its tables say; False for what cannot be read."""
    try:
        if is_database(path):
            find_columns(path, None, None)
            return True
        head = Source.of_path(path).head(_HEAD_BYTES)
    except (OSError, InputError):
        return False
    rest = head.lstrip(_BLANK)
    for _ in range(_LINES_TRIED):
        if not rest:
            return False
        keys = first_keys(rest)
        if CONTEXT in keys and keys & _EVENT_NAMES:
            return True
        rest = rest.partition(b"\n")[2].lstrip(_BLANK)
    return False


def is_database(path: Path) -> bool:
    """Whether a file is a database of SQLite."""
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


def open_database(path: Path, *, writable: bool = False) -> sqlite3.Connection:
    """Opens a database; text comes as bytes, as it is stored."""
    try:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rw' if writable else 'ro'}", uri=True)
    except sqlite3.Error as error:
        raise InvalidFieldError(f"{str(path)!r} cannot be opened: {error}", field="path") from error
    database.text_factory = bytes
    return database


def find_columns(path: Path, table: str | None, columns: str | None) -> Columns:
    """Returns the table that holds embedded events, and its columns: as named, else as their names and content say."""
    with closing(open_database(path)) as database:
        try:
            listed = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
            tables = [cast(bytes, name).decode() for (name,) in listed]
            if table is not None and table not in tables:
                raise NotFoundError(f"{str(path)!r} has no table {table!r}", field="table", hint=", ".join(tables))
            found = [
                columns_of
                for name in ([table] if table is not None else tables)
                if (columns_of := _columns_of(database, name, columns)) is not None
            ]
        except sqlite3.Error as error:
            raise InvalidFieldError(f"{str(path)!r} cannot be read: {error}", field="path") from error
    if len(found) == 1:
        return found[0]
    what = "no table with embedded events" if not found else f"{len(found)} tables with embedded events"
    raise InvalidFieldError(
        f"{str(path)!r} has {what}", field="table", hint="name it with --table, and its columns with --columns"
    )


def _columns_of(database: sqlite3.Connection, table: str, named: str | None) -> Columns | None:
    there = [cast(bytes, row[1]).decode() for row in database.execute(f"PRAGMA table_info({quoted(table)})")]
    if named is not None:
        return _named_columns(table, there, named)
    for column in _WHOLE_COLUMNS:
        if column in there and _holds(database, table, column, _EVENT_NAMES | {CONTEXT}, least=2):
            return Columns(table=table, whole=column)
    for column in _CONTEXT_COLUMNS:
        if column in there and _holds(database, table, column, {"_event_id", "_correlation_id", "_ksi_context_ref"}):
            pick = {
                field: next((name for name in names if name in there), None)
                for field, names in (("event_id", _ID_COLUMNS), ("name", _NAME_COLUMNS), ("data", _DATA_COLUMNS))
            }
            return Columns(table=table, context=column, **pick)
    return None


def _holds(
    database: sqlite3.Connection, table: str, column: str, members: frozenset[str] | set[str], *, least: int = 1
) -> bool:
    query = f"SELECT {quoted(column)} FROM {quoted(table)} WHERE {quoted(column)} IS NOT NULL LIMIT 20"  # noqa: S608
    for (cell,) in database.execute(query):
        keys = first_keys(_cell(cell) or b"")
        if len(keys & members) >= least and (least == 1 or CONTEXT in keys):
            return True
    return False


def _named_columns(table: str, there: list[str], named: str) -> Columns | None:
    fields = {"json": "whole", "id": "event_id", "name": "name", "data": "data", "context": "context"}
    chosen: dict[str, str] = {}
    for part in named.split(","):
        field, _, column = part.partition("=")
        if field not in fields or not column:
            raise InvalidFieldError(
                f"{part[:60]!r} names no column", field="columns", hint="json=…, or name=…,data=…,context=…,id=…"
            )
        chosen[fields[field]] = column
    if not set(chosen.values()) <= set(there):
        return None
    return Columns(table=table, **chosen)


def quoted(name: str) -> str:
    """Returns a name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def _cell(cell: object) -> bytes | None:
    if cell is None or isinstance(cell, bytes):
        return cell
    return str(cell).encode()
