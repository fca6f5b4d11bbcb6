"""Shared by the tests of migration: events with embedded contexts, and their trees.  Holds no tests itself."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

START_S = 1_754_300_000.0


def events(count: int, *, tree: int = 7, prefix: str = "evt_") -> list[dict[str, Any]]:
    """Events in trees of ``tree``, in order; the parent of one is half way back in its tree; a day between trees."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        start = number - number % tree
        place = number - start
        parent = None if place == 0 else start + place // 2 if place > 1 else start
        name = f"{prefix}{number:08x}"
        context: dict[str, Any] = {"_event_id": name, "_correlation_id": f"corr_{start}"}
        depth = 0
        if parent is not None:
            context["_parent_event_id"] = f"{prefix}{parent:08x}"
            depth = found[parent]["_ksi_context"]["_event_depth"] + 1
        context |= {
            "_root_event_id": f"{prefix}{start:08x}",
            "_event_depth": depth,
            "_agent_id": f"agent_{number % 3}",
            "_session_id": f"session_{start // (4 * tree)}",
            "_timestamp": START_S + number * 1_800.123456,
        }
        found.append({"event": "agent:status", "data": {"n": number}, "_ksi_context": context})
    return found


def lines(found: list[dict[str, Any]]) -> bytes:
    """The events as NDJSON."""
    return b"".join(json.dumps(event).encode() + b"\n" for event in found)


def write_table(path: Path, found: list[dict[str, Any]]) -> None:
    """The events as a table with a column for each part."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, event_name TEXT, data TEXT, context TEXT)")
        database.execute("CREATE TABLE other (x TEXT)")
        database.executemany(
            "INSERT INTO events (event_name, data, context) VALUES (?, ?, ?)",
            [(event["event"], json.dumps(event["data"]), json.dumps(event["_ksi_context"])) for event in found],
        )


def read_table(path: Path) -> list[tuple[Any, ...]]:
    """All rows of that table."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT id, event_name, data, context FROM events ORDER BY id").fetchall()
