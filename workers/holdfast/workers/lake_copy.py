"""Keeps the second copy of the lake up to date after each round of the archiver, and says why it is not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from holdfast.schemas.errors import HoldfastError, IntegrityError
from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import TABLES

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake

logger = logging.getLogger(__name__)

PRUNE_S: Final = 60.0
"""How often the copy is looked through for what the lake has removed: that takes a listing of both."""


def keep_copy(lake: Lake) -> Problem | None:
    """Copies what the lake's copy has not yet, for some seconds; returns what keeps it from that.  Blocks."""
    copies = lake.copies
    if copies is None:
        return None
    for table in TABLES:
        try:
            copies.catch_up(lake.table(table))
            copies.prune(lake.table(table), every_s=PRUNE_S)
        except (HoldfastError, OSError) as error:
            logger.warning(
                "the copy of the lake is not up to date",
                extra={"action": "copy_failed", "table": table, "error": str(error)},
            )
            message, hint = (error.message, error.hint) if isinstance(error, HoldfastError) else (str(error), None)
            return Problem(
                invariant="I4" if isinstance(error, IntegrityError) else "I8",
                object=f"copy of lake/{table}",
                what=message,
                next_step=hint or "check the disk of copy_directory; nothing is purged meanwhile",
            )
    return None
