"""What processes hold over a run, memory and open files, and whether that is flat.

The rule.  What is watched is divided into four quarters of its time; the first is the warm-up, in which code is loaded
and caches fill.  A process is *flat* when the median of the last quarter exceeds that of the second by no more than
``GROWTH_MIB``, or a tenth, and ``GROWTH_FILES`` open files.  Data files of the lake do not count as such: look-ups keep
open what they read, up to 64 each, of as many as there are just then; more than ``MOST_DATA_FILES`` are too many.  A
data file that is removed and still open counts.  Medians, because a merge or a large body shows for a
moment in any sample; a leak shows in all of them.

Two series of each process are judged, if they are long enough (``JUDGED_S``): its longest life, and all its lives one
after another, of each the time between ``YOUNG_S`` and ``OLD_S`` of age.  A process that is killed every other minute
has no long life, but must not hold more each time that it comes back either; at the same age, because caches fill for
some minutes, and lives are not equally long.  In any case nothing may ever hold more than ``MOST_MIB``.

Nodes of a cluster are judged together, as one process with the lives of all: what one holds depends on how many streams
it leads just then, and one of three rises by 65 MiB while another falls by 50.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from holdfast.ops.torture.rig import Usage

GROWTH_MIB: Final = 24.0
GROWTH_SHARE: Final = 0.1
GROWTH_FILES: Final = 4.0
MOST_MIB: Final = 1_500.0
MOST_DATA_FILES: Final = 192

JUDGED_S: Final = 1_080.0
"""Nine tenths of 20 minutes.  Less says nothing: half of it would be warm-up."""

YOUNG_S: Final = 20.0
"""A process that was started a moment ago still reads what it had stored."""

OLD_S: Final = 120.0
"""Up to this age, lives are compared with each other."""

_LEAST_SAMPLES: Final = 20
"""Of a quarter, for its median to say something."""

_MIB: Final = 1024 * 1024


class Point(msgspec.Struct, frozen=True):
    """What a process held at a moment."""

    at_s: float
    own_bytes: int
    open_files: int
    data_files: int = 0


class Spread(msgspec.Struct, frozen=True):
    """One quantity over the time that was watched: its first value, the medians of the second and the last quarter,
    its last and its highest value; and by how much the medians differ, in each series that was long enough."""

    start: float
    warm: float
    end: float
    last: float
    most: float
    grown: list[float] = []


class UsageSummary(msgspec.Struct, frozen=True):
    """What a process held over all its lives.  ``is_flat`` is None when it was watched too short a time to say.

    Memory is what no file backs; ``files`` are those beside the lake's data files.
    """

    starts: int
    seconds: float
    longest_life_s: float
    mib: Spread
    files: Spread
    data_files_most: int
    is_flat: bool | None
    growth: list[str] = []


class UsageLog:
    """Takes what processes hold, by name, and sums it up."""

    def __init__(self) -> None:
        self._lives: dict[str, list[tuple[int, list[Point]]]] = {}

    def take(self, name: str, pid: int, at_s: float, usage: Usage) -> None:
        """Notes what a process holds now; another pid under its name is another life."""
        lives = self._lives.setdefault(name, [])
        if not lives or lives[-1][0] != pid:
            lives.append((pid, []))
        lives[-1][1].append(Point(at_s, usage.own_bytes, usage.open_files, usage.data_files))

    def summary(
        self, *, judged_s: float = JUDGED_S, together: Mapping[str, Collection[str]] | None = None
    ) -> dict[str, UsageSummary]:
        """Returns what each process held, and whether it is flat.

        ``together`` names processes that share their work: they are judged under one further name, and what each of
        them held is told without a verdict.
        """
        groups = together or {}
        shared = {name for names in groups.values() for name in names}
        found = {
            name: summarize([points for _, points in lives], judged_s=math.inf if name in shared else judged_s)
            for name, lives in self._lives.items()
        }
        for group, names in groups.items():
            lives = [points for name in names for _, points in self._lives.get(name, [])]
            if lives:
                found[group] = summarize(lives, judged_s=judged_s, is_group=True)
        return found


def summarize(lives: Sequence[Sequence[Point]], *, judged_s: float = JUDGED_S, is_group: bool = False) -> UsageSummary:
    """Returns the summary of the lives of a process, or of a group of several, each at least one point."""
    longest = max(lives, key=_seconds)
    aged = sorted(((point, point.at_s - points[0].at_s) for points in lives for point in points), key=_time)
    every = [point for point, _ in aged]
    grown_up = [point for point, age_s in aged if age_s >= YOUNG_S]
    of_an_age = [point for point, age_s in aged if YOUNG_S <= age_s < OLD_S]
    if is_group:
        # No single life, which may rise as another falls: all at one age or, where few are killed, all.
        series: list[Sequence[Point]] = [of_an_age if of_an_age and _seconds(of_an_age) >= judged_s else grown_up]
    else:
        series = [longest, of_an_age]
    judged = [points for points in series if points and _seconds(points) >= judged_s]
    mib = _spread(every, grown_up or every, judged, lambda point: point.own_bytes / _MIB)
    files = _spread(every, grown_up or every, judged, lambda point: float(point.open_files - point.data_files))
    growth: list[str] = []
    for what, spread, limit in (
        ("MiB", mib, max(GROWTH_MIB, GROWTH_SHARE * mib.warm)),
        ("open files", files, GROWTH_FILES),
    ):
        if max(spread.grown, default=0.0) > limit:
            growth.append(
                f"{max(spread.grown):.1f} {what} from the second quarter to the last, {limit:.1f} are allowed"
            )
    if mib.most > MOST_MIB:
        growth.append(f"{mib.most:.0f} MiB at the most, {MOST_MIB:.0f} are allowed")
    data_files = max(point.data_files for point in every)
    if data_files > MOST_DATA_FILES:
        growth.append(f"{data_files} data files open at the most, {MOST_DATA_FILES} are allowed")
    is_flat = False if growth else True if mib.grown else None
    return UsageSummary(
        starts=len(lives),
        seconds=round(_seconds(every), 1),
        longest_life_s=round(_seconds(longest), 1),
        mib=mib,
        files=files,
        data_files_most=data_files,
        is_flat=is_flat,
        growth=growth,
    )


def not_flat(processes: dict[str, UsageSummary]) -> list[str]:
    """Returns the processes that grow, and by how much."""
    return [f"{name}: {what}" for name, usage in sorted(processes.items()) for what in usage.growth]


def _time(aged: tuple[Point, float]) -> float:
    return aged[0].at_s


def _seconds(points: Sequence[Point]) -> float:
    return points[-1].at_s - points[0].at_s


def _spread(
    every: Sequence[Point],
    shown: Sequence[Point],
    judged: Sequence[Sequence[Point]],
    value: Callable[[Point], float],
) -> Spread:
    warm, end = (_values(shown, number, value) or [value(shown[-1])] for number in (1, 3))
    grown: list[float] = []
    for series in judged:
        second, last = _values(series, 1, value), _values(series, 3, value)
        if min(len(second), len(last)) >= _LEAST_SAMPLES:
            grown.append(round(median(last) - median(second), 1))
    return Spread(
        start=round(value(every[0]), 1),
        warm=round(median(warm), 1),
        end=round(median(end), 1),
        last=round(value(every[-1]), 1),
        most=round(max(value(point) for point in every), 1),
        grown=grown,
    )


def _values(points: Sequence[Point], quarter: int, value: Callable[[Point], float]) -> list[float]:
    """Returns the values of one quarter of the time, counted from 0."""
    began, length = points[0].at_s, _seconds(points) / 4
    return [value(point) for point in points if quarter <= (point.at_s - began) / (length or 1.0) <= quarter + 1]
