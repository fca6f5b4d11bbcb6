"""Removing what a log no longer needs: old commits, and checkpoints that later ones have replaced.

A checkpoint names every file of its table, and each file that left it within a week: megabytes, every few minutes,
where much is archived and merged.  What always stays are the two newest checkpoints that are sound, and every commit
since the older of them: with one of the two destroyed, the other and the commits tell the table.

Everything else goes by age.  Each version of the last week can be told: a backup goes back to the version that fits
its image of the stream, and readers of Delta may ask for an earlier one.  A version is told from a checkpoint before
it and the commits since.  So the newest checkpoint at or before the week's first commit stays, and every commit since
that checkpoint: up to ten thousand more than those of the week.  After it, one checkpoint in ten thousand commits
stays.  The rest of the checkpoints stay for an hour after two others took their place, for who has just listed them
and reads them next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa

from holdfast.lake.files import fsync_directory
from holdfast.lake.log import LOG_DIRECTORY, checkpoint_path, commit_path, list_log
from holdfast.lake.log_copies import drop_copies_before
from holdfast.lake.log_repair import drop_bad_hint, require_readable_checkpoint
from holdfast.schemas.failpoints import failpoint

CHECKPOINT_AGE_S: Final = 3_600.0
"""How long a checkpoint stays that two later ones have replaced: whoever listed it has read it long since."""

BASE_INTERVAL: Final = 10_000
"""Of how many commits one checkpoint stays for as long as they do: to tell a version between two of them takes a
second, and a busy week keeps a dozen instead of 2,400."""


class LogFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Some files of a log by their versions, ascending."""

    commits: Sequence[int] = ()
    checkpoints: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.commits) + len(self.checkpoints)


def plan_cleaning(
    log: LogFiles, *, kept: int, old_commits: int, written_ms: Mapping[int, float], before_ms: float
) -> LogFiles:
    """Returns what may go of a log.

    Nothing goes from version ``kept`` on, which is a checkpoint.  Of the commits the ``old_commits`` first ones are old
    enough, and every version from the next one on can be told by what is left; checkpoints were ``written_ms``, and
    those that two others had replaced at ``before_ms`` are.
    """
    first_young = min(next(iter(log.commits[old_commits:]), kept), kept)
    first_base = _base_of(first_young, log.checkpoints)
    commits = [version for version in log.commits[:old_commits] if version < first_base]
    doomed: list[int] = []
    block = None
    for version, replacing in zip(log.checkpoints, log.checkpoints[2:], strict=False):
        # The first of its block stays the first, whatever goes: each call chooses the same ones.
        is_base = version // BASE_INTERVAL != block and version >= first_base
        block = version // BASE_INTERVAL if is_base else block
        if version < kept and not is_base and written_ms.get(replacing, float("inf")) <= before_ms:
            doomed.append(version)
    return LogFiles(commits=commits, checkpoints=doomed)


def _base_of(version: int, checkpoints: Sequence[int]) -> int:
    """Returns the checkpoint that a version is told from, with the commits since; 0, of which there is none, when it
    takes every commit."""
    return max((number for number in checkpoints if number <= version), default=0)


def clean_log(directory: Path, *, commits_before_ms: float, checkpoints_before_ms: float) -> LogFiles:
    """Removes what a table's log no longer needs, and returns what that was.

    Killed or cut from power anywhere, it leaves a table that opens at its newest version; the next call goes on.
    Safe beside writers, readers and another cleaner.
    """
    log = _listed(directory)
    if len(log.checkpoints) < 2:
        return LogFiles()
    replaced = [version for version in log.commits if version < log.checkpoints[-2]]
    old_commits = _old_commits(directory, replaced, commits_before_ms)
    written_ms = _written_ms(directory, log.checkpoints)

    def plan(kept: int) -> LogFiles:
        return plan_cleaning(
            log, kept=kept, old_commits=old_commits, written_ms=written_ms, before_ms=checkpoints_before_ms
        )

    return _remove_planned(directory, log.checkpoints, plan)


def follow_cleaning(lake: Path, copy: Path) -> LogFiles:
    """Removes from the copy of a table's log what the table's own no longer has, and returns what that was.

    The copy judges for itself what it must keep: its own two newest checkpoints that can be read, and what came since;
    and, should it lack the first checkpoint of the lake, the one before it that tells the versions of the lake's log.
    """
    log, held = _listed(lake), _listed(copy)
    if not log.commits or len(held.checkpoints) < 2:
        return LogFiles()

    def plan(kept: int) -> LogFiles:
        first_base = _base_of(min(kept, log.commits[0]), held.checkpoints)
        staying = {*log.checkpoints, first_base}
        return LogFiles(
            commits=[version for version in held.commits if version < first_base],
            checkpoints=[version for version in held.checkpoints if version < kept and version not in staying],
        )

    return _remove_planned(copy, held.checkpoints, plan)


def _remove_planned(directory: Path, checkpoints: Sequence[int], plan: Callable[[int], LogFiles]) -> LogFiles:
    """Removes what ``plan`` says may go when everything from a version on stays, and returns what that was."""
    # Looked into only when there is something to remove: a checkpoint may be large, and this is asked all the time.
    if not plan(checkpoints[-2]):
        return LogFiles()
    kept = older_of_two_sound(directory, checkpoints)
    doomed = LogFiles() if kept is None else plan(kept)
    if kept is not None and doomed:
        remove_log_files(directory, doomed, kept=kept)
    return doomed


def older_of_two_sound(directory: Path, checkpoints: Sequence[int]) -> int | None:
    """Returns the last but one of the checkpoints that are sound: everything before it can be done without.

    None when there are not two: then the commits are what mends the table.
    """
    sound = (version for version in reversed(checkpoints) if _is_whole(directory, version))
    next(sound, None)
    return next(sound, None)


def remove_log_files(directory: Path, doomed: LogFiles, *, kept: int) -> None:
    """Removes files of a log that lie before version ``kept``, oldest first, with all that is kept beside them."""
    log = directory / LOG_DIRECTORY
    if drop_bad_hint(directory, going=doomed.checkpoints):
        fsync_directory(log)  # a power cut must not bring back the hint alone
    _unlink(checkpoint_path(directory, version) for version in doomed.checkpoints)
    # Commits last: a checkpoint with a gap behind it would be of no use to whoever must go back to it.
    _unlink(commit_path(directory, version) for version in doomed.commits)
    fsync_directory(log)
    failpoint("clean.before_copies")
    # Only now: what a power cut brought back without its checksum would be believed, whatever became of it.
    left = _listed(directory)
    drop_copies_before(directory, kept, commits=left.commits, checkpoints=left.checkpoints)


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        failpoint("clean.before_unlink")
        path.unlink(missing_ok=True)  # another vacuum may be here


def _listed(directory: Path) -> LogFiles:
    commits, checkpoints = list_log(directory)
    return LogFiles(commits=commits, checkpoints=checkpoints)


def _old_commits(directory: Path, commits: Sequence[int], before_ms: float) -> int:
    """Returns how many of the first commits were all written before a time."""
    for number, version in enumerate(commits):
        try:
            if commit_path(directory, version).stat().st_mtime * 1000 > before_ms:
                return number
        except FileNotFoundError:
            continue  # another vacuum was here
    return len(commits)


def _written_ms(directory: Path, checkpoints: Sequence[int]) -> dict[int, float]:
    found: dict[int, float] = {}
    for version in checkpoints:
        try:
            found[version] = checkpoint_path(directory, version).stat().st_mtime * 1000
        except FileNotFoundError:
            continue  # another vacuum was here
    return found


def _is_whole(directory: Path, version: int) -> bool:
    try:
        require_readable_checkpoint(directory, version)
    except (pa.ArrowException, OSError):
        return False
    return True
