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

from holdfast.lake.copies import Copies
from holdfast.lake.lake import Lake
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
    lake: Path | None,
    connection: Connection | None,
    *,
    nothing_archived: bool = False,
    deep: bool = False,
    copy: Path | None = None,
) -> VerifyReport:
    """Checks a lake, the streams of a server, or the two against each other; None leaves that side out.

    ``nothing_archived``: there is no lake because nothing has been archived, not because it is elsewhere.  ``deep``
    also compares the SHA-256 of every file of the lake, and of its second copy where ``copy`` names one.

    Raises DataDirectoryError when ``lake`` holds none, UnavailableError when the server stops answering.
    """
    checked: Counter[str] = Counter()
    violations: list[Problem] = []
    is_open = False
    if lake is not None:
        report = await asyncio.to_thread(verify_lake, lake, deep=deep)
        checked.update({f"lake_{name}": count for name, count in report.checked.items()})
        violations.extend(report.violations)
        # A lake that cannot be opened was told already, and there is nothing to hold anything against.
        is_open = all(problem.object != str(lake) for problem in violations)
        if deep and copy is not None and is_open:
            count, differing = await asyncio.to_thread(_compare, lake, copy)
            checked["copied_files"] += count
            violations.extend(differing)
    if connection is not None:
        findings = Findings()
        has_archive = (lake is not None and is_open) or nothing_archived
        archive = await asyncio.to_thread(Archive, lake) if has_archive else None
        try:
            await StreamCheck(connection, archive, checked, findings).run()
        finally:
            if archive is not None:
                await asyncio.to_thread(archive.close)
        violations.extend(findings.all())
    return VerifyReport(ok=not violations, checked=dict(checked), violations=violations)


def _compare(lake: Path, copy: Path) -> tuple[int, list[Problem]]:
    opened = Lake.open(lake)
    try:
        return Copies(lake, copy).compare(opened)
    finally:
        opened.close()
