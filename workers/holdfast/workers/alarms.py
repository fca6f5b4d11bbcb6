"""Alarms about lost messages, kept beside the lake until an operator has accepted the loss.

Such a loss shows once: when the stream is compared with the lake.  Afterwards a new epoch has begun and all looks well,
so an alarm in memory alone would end with the process that raised it.  The active archiver writes the file, under its
lock; whoever tells health reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from holdfast.lake.files import write_durably
from holdfast.schemas.problems import Problem

FILE: Final = ".alarms.json"
_MOST: Final = 100
"""Alarms kept for one stream: the first ones, which tell where it began."""

_BYTES: Final = 4 * 1024 * 1024


class _File(msgspec.Struct, kw_only=True):
    alarms: list[Problem] = []
    v: int = 1


_DECODER: Final = msgspec.json.Decoder(_File)


def read_alarms(lake: Path) -> list[Problem]:
    """Returns the alarms of a lake directory, oldest first; that the file cannot be read is an alarm itself."""
    path = lake / FILE
    try:
        with path.open("rb") as file:
            return _DECODER.decode(file.read(_BYTES)).alarms
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return [
            Problem(
                invariant="I1",
                object=str(path),
                what=f"the alarms about lost messages cannot be read: {str(error)[:200]}",
                next_step="see the archiver's log for 'messages were lost', check what it says, and remove the file",
            )
        ]


def raise_alarm(lake: Path, alarm: Problem) -> None:
    """Adds an alarm, durably; one that is there already changes nothing.  Raises OSError when the disk does not."""
    alarms = read_alarms(lake)
    if any((known.object, known.what) == (alarm.object, alarm.what) for known in alarms):
        return
    if sum(known.object == alarm.object for known in alarms) < _MOST:
        _write(lake, [*alarms, alarm])


class AcceptedGap(NamedTuple):
    """The range of sequences that was given up, None when nothing was missing; and how many alarms were ended."""

    span: tuple[int, int] | None
    alarms: int


def end_alarms(lake: Path, of: str) -> int:
    """Removes the alarms of one object, durably, and returns how many there were."""
    alarms = read_alarms(lake)
    left = [alarm for alarm in alarms if alarm.object != of]
    if left != alarms:
        _write(lake, left)
    return len(alarms) - len(left)


def _write(lake: Path, alarms: list[Problem]) -> None:
    write_durably(lake / FILE, msgspec.json.encode(_File(alarms=alarms)))
