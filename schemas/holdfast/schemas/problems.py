"""What ``health`` and ``verify`` tell an operator."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A broken promise, or one in danger: which invariant of the design (I1, I2, …), of what object, what was seen,
    and what to do next."""

    invariant: str
    object: str
    what: str
    next_step: str
