"""How commands print versions of named contexts: as JSON with the members of the resolver's answers, or for people."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from holdfast.ops.cli import output
from holdfast.ops.cli.context_commands import context_json, write_body

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyValue, KeyVersion
    from holdfast.ops.cli.differences import Line

_STYLES: Final = {"~": "bold", "+": "green", "-": "red", "@": "cyan", " ": ""}
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"))


def version_json(version: KeyVersion) -> dict[str, Any]:
    """Returns a version as ``--json`` prints it: the fields that are set, times in ISO 8601, and its position."""
    from holdfast.workers.key_requests import version_members

    members = version_members(version.row)
    return members if version.position is None else {**members, "position": version.position}


def value_json(value: KeyValue) -> dict[str, Any]:
    """Returns a version with its body: JSON or text in ``body``, bytes that are no text in ``body_base64``."""
    context = context_json(value.context)
    shown = {**version_json(value), "kind": value.context.kind, "content_type": value.context.content_type}
    return shown | {name: context[name] for name in ("body", "body_base64") if name in context}


def write_value(value: KeyValue) -> None:
    """Writes a version and its body for a person."""
    facts = [f"{value.key} v{value.version}", value.context.content_type, _when(value.stored_at or value.timestamp)]
    if value.tags:
        facts.append("tags " + ", ".join(value.tags))
    if value.expires_at is not None:
        facts.append(f"expires {_when(value.expires_at)}")
    output.write_line("  ".join(facts))
    write_body(value.context)


def tell_version(version: KeyVersion, *, as_json: bool) -> None:
    """Tells which version a command has written."""
    if as_json:
        output.write_json(version_json(version))
    else:
        output.write_line(f"{version.key} v{version.version}" + (f"  {version.ref}" if version.ref else "  deleted"))


def write_change(version: KeyVersion) -> None:
    """Writes a change in one line, as it comes."""
    facts = [_when(version.stored_at or version.timestamp), f"{version.key} v{version.version}", version.op]
    author = version.changed_by
    if author:
        facts.append(f"by {author}")
    if version.change_type:
        facts.append(version.change_type)
    if version.position:
        facts.append(version.position)
    output.write_line("  ".join(facts))


def write_keys(versions: Iterable[KeyVersion], now: datetime) -> None:
    """Writes the table of ``ls``."""
    rows = [
        (
            version.key,
            version.version,
            version.op,
            age(version.stored_at or version.timestamp, now),
            None if version.expires_at is None else age(now, version.expires_at),
            ", ".join(version.tags),
            version.session,
            version.changed_by,
            version.ref,
        )
        for version in versions
    ]
    columns = ("key", "version", "op", "age", "expires in", "tags", "session", "by", "ref")
    output.write_table(columns, rows, right=("version", "age", "expires in"))


def write_history(versions: Iterable[KeyVersion]) -> None:
    """Writes the table of ``history``."""
    rows = [
        (
            version.version,
            version.op,
            _when(version.stored_at or version.timestamp),
            version.changed_by,
            version.change_type,
            ", ".join(version.tags),
            version.ref,
        )
        for version in versions
    ]
    output.write_table(("version", "op", "stored", "by", "change", "tags", "ref"), rows, right=("version",))


def write_differences(lines: Iterable[Line]) -> None:
    """Writes the lines of a difference, in colour where that can be seen."""
    from rich.text import Text

    console = output.stdout_console()
    for line in lines:
        shown = line.text if line.sign in "~@" else f"  {line.sign} {line.text}"
        console.print(Text(shown, style=_STYLES[line.sign]), soft_wrap=True)


def age(moment: datetime, now: datetime) -> str:
    """Returns how long ago a moment is, in its largest unit: ``0s``, ``59s``, ``3m``, ``26h``, ``3d``."""
    seconds = max(timedelta(), now - moment) // timedelta(seconds=1)
    for size, unit in _UNITS:
        # Up to two of a unit, the next smaller one says more.
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _when(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
