"""Checks the invariants of a data directory or of a running system, and changes nothing.

The lake at rest is checked by :func:`holdfast.lake.verify_lake`; here the streams are held against it, as
:mod:`holdfast.ops.verify_streams` describes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.lake.verify import verify_lake
from holdfast.ops.verify_archive import Archive, Findings
from holdfast.ops.verify_streams import StreamCheck
from holdfast.schemas.problems import Problem

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked, as counts, and what was found."""

    ok: bool
    checked: dict[str, int]
    violations: list[Problem]


async def verify(
    lake: Path | None, connection: Connection | None, *, nothing_archived: bool = False, deep: bool = False
) -> VerifyReport:
    """Checks a lake, the streams of a server, or the two against each other; None leaves that side out.

    ``nothing_archived``: there is no lake because nothing has been archived, not because it is elsewhere.  ``deep``
    also compares the SHA-256 of every file of the lake.

    Raises DataDirectoryError when ``lake`` holds none, UnavailableError when the server stops answering.
    """
    checked: Counter[str] = Counter()
    violations: list[Problem] = []
    if lake is not None:
        report = await asyncio.to_thread(verify_lake, lake, deep=deep)
        checked.update({f"lake_{name}": count for name, count in report.checked.items()})
        violations.extend(report.violations)
    if connection is not None:
        findings = Findings()
        # A lake that cannot be opened was told already, and there is nothing to hold the streams against.
        is_open = all(problem.object != str(lake) for problem in violations)
        has_archive = (lake is not None and is_open) or nothing_archived
        archive = await asyncio.to_thread(Archive, lake) if has_archive else None
        try:
            await StreamCheck(connection, archive, checked, findings).run()
        finally:
            if archive is not None:
                await asyncio.to_thread(archive.close)
        violations.extend(findings.all())
    return VerifyReport(ok=not violations, checked=dict(checked), violations=violations)
