"""A wrong clock for the processes of a test: shifted by ``HOLDFAST_TORTURE_CLOCK_S`` seconds."""

from __future__ import annotations

import os
import time
from typing import Final

ENVIRONMENT: Final = "HOLDFAST_TORTURE_CLOCK_S"


def shift_clock() -> None:
    """Shifts the wall clock of this process as the environment says; the clocks that only count go on as they are.

    What reads the time through ``time.time`` and ``time.time_ns`` is deceived, which is all of Holdfast's code; what
    libraries in C read is not.
    """
    shift_s = float(os.environ.get(ENVIRONMENT, "0"))
    if not shift_s:
        return
    real, real_ns, shift_ns = time.time, time.time_ns, int(shift_s * 1_000_000_000)
    time.time = lambda: real() + shift_s
    time.time_ns = lambda: real_ns() + shift_ns
