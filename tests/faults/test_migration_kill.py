"""A migration that is killed at any point and run again: complete, nothing doubled, nothing lost."""

from __future__ import annotations

from pathlib import Path

from holdfast.ops.embedded.migration import WINDOW_EVENTS
from tests.command_line import CommandLine
from tests.embedded_samples import events, lines

KILLED = -9


def test_B63_a_migration_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Killed with its server between two windows, before a note, and in the clean-up; the third run completes it."""
    count = 2 * WINDOW_EVENTS + 100
    found = events(count)
    path = tmp_path / "events.ndjson"
    path.write_bytes(lines(found))
    points = ("migration.window_stored=kill:2", "migration.forms_stored=kill:3", "migration.backed_up=kill")
    for point in points:
        holdfast = CommandLine(tmp_path / "data", HOLDFAST_FAILPOINTS=point)
        arguments = ("--clean-up",) if "backed_up" in point else ()
        holdfast("migrate", str(path), *arguments, status=KILLED)
        assert path.read_bytes() == lines(found)

    holdfast = CommandLine(tmp_path / "data")
    report = holdfast("migrate", str(path), "--clean-up", "--json").json
    assert (report["resumed"], report["sent"]) == (count, 0)
    assert report["verification"]["equal"] == count
    assert Path(report["backup"]).read_bytes() == lines(found)
    counted = "SELECT count(*) AS n, count(DISTINCT event_id) AS ids FROM events"
    assert holdfast("sql", "--live", counted, "--json").json == {"n": count, "ids": count}
    out = tmp_path / "out.ndjson"
    holdfast("migrate", str(path), "--rebuild", str(out))
    assert out.read_bytes() == lines(found)
    assert holdfast("verify", "--json").json["ok"] is True


def test_B63_what_was_noted_is_not_sent_again(tmp_path: Path) -> None:
    count = 9 * WINDOW_EVENTS
    path = tmp_path / "events.ndjson"
    path.write_bytes(lines(events(count)))
    migrate = ("migrate", str(path), "--recent", "3650d")
    CommandLine(tmp_path / "data", HOLDFAST_FAILPOINTS="migration.noted=kill")(*migrate, status=KILLED)
    report = CommandLine(tmp_path / "data")(*migrate, "--json").json
    assert (report["resumed"], report["sent"], report["new"]) == (8 * WINDOW_EVENTS, WINDOW_EVENTS, WINDOW_EVENTS)
