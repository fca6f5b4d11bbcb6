"""Which revisions of named contexts may leave the hot tier: values in, values out.

A purge names a subject and a sequence, and takes what the subject holds below it.  The sequence is always that of a
revision that stays, or one that follows an archived tombstone directly: so what is written meanwhile, which stands
higher, stays too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from holdfast.schemas.rows import KeyVersionRow

YOUNG_S: Final = 600.0
"""Nothing younger than this goes: for as long a writer may retry, and looks for its own revision."""

HEAD_AGE_S: Final = 30 * 86_400.0
"""A head goes only as a tombstone older than this."""

TOMBSTONES: Final = frozenset({"delete", "expire"})


class SubjectPurge(msgspec.Struct, frozen=True):
    """Take from ``subject`` what stands below ``below_seq``."""

    subject: str
    below_seq: int


class Revision(msgspec.Struct, frozen=True):
    """A version as it stands in the stream, at ``row.seq``."""

    subject: str
    row: KeyVersionRow


def newest_of_each(revisions: Iterable[Revision]) -> list[Revision]:
    """Returns the last revision of each subject; ``revisions`` are in stream order."""
    newest: dict[str, Revision] = {revision.subject: revision for revision in revisions}
    return list(newest.values())


def plan_superseded(revisions: Iterable[Revision]) -> list[SubjectPurge]:
    """Returns the purges of what revisions that are archived and old have superseded.

    The newest old one of a subject stays, until a newer one has grown old as well.
    """
    # Nothing stands before a first version.
    return [
        SubjectPurge(revision.subject, revision.row.seq)
        for revision in newest_of_each(revisions)
        if revision.row.version > 1
    ]


def oldest_kept(revision: Revision, most_versions: int | None) -> int | None:
    """Returns the oldest version that stays when a key keeps its newest ``most_versions``, this one among them.

    None when there is no such limit, or nothing is beyond it.
    """
    if most_versions is None or revision.row.version <= most_versions:
        return None
    return revision.row.version - most_versions + 1


def plan_limited(oldest: Mapping[str, int], first_young_seq: int | None = None) -> list[SubjectPurge]:
    """Returns the purges below the oldest revision that stays of each subject, given by its sequence.

    What stands at ``first_young_seq`` or higher stays whatever the limit says.
    """
    return [
        SubjectPurge(subject, seq if first_young_seq is None else min(seq, first_young_seq))
        for subject, seq in oldest.items()
    ]


def plan_heads(revisions: Iterable[Revision]) -> list[SubjectPurge]:
    """Returns the purges of tombstones, themselves included, that are archived and old enough for a head to go.

    One that was superseded since goes alike: it is no head any more.
    """
    return [
        SubjectPurge(revision.subject, revision.row.seq + 1)
        for revision in newest_of_each(revisions)
        if revision.row.op in TOMBSTONES
    ]
