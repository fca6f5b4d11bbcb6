"""Named points at which a test can make a process fail, so that every step of a protocol can be cut short.

A call of :func:`failpoint` costs one dictionary look-up while nothing is armed.  Points are armed by
:func:`arm`, or for a whole process by ``HOLDFAST_FAILPOINTS``, a comma-separated list of ``name=action[:hit]``:
``kill`` sends SIGKILL to the process itself, ``raise`` raises :class:`FailpointError`, ``pause`` sends SIGSTOP: the
process stands still, all of its threads, until somebody sends it SIGCONT.  ``hit`` is the ordinal of the call at which
it happens, from 1 (default 1).  Example: ``HOLDFAST_FAILPOINTS=lake.after_rename=kill:2``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

ENVIRONMENT: Final = "HOLDFAST_FAILPOINTS"


class FailpointError(Exception):
    """Raised at an armed failpoint.  Not a HoldfastError: nothing may handle it as an expected one."""


class _Armed:
    __slots__ = ("action", "hits_left")

    def __init__(self, action: Callable[[str], None], hit: int) -> None:
        self.action = action
        self.hits_left = hit


_armed: dict[str, _Armed] = {}
_environment_read = False


def failpoint(name: str) -> None:
    """Fails here if ``name`` is armed and this is the chosen hit; otherwise does nothing."""
    if not _environment_read:
        _read_environment()
    if not _armed:
        return
    armed = _armed.get(name)
    if armed is None:
        return
    armed.hits_left -= 1
    if armed.hits_left == 0:
        del _armed[name]
        armed.action(name)


def arm(name: str, action: Callable[[str], None] | None = None, *, hit: int = 1) -> None:
    """Arms ``name``: its ``hit``-th call runs ``action`` (default: raise FailpointError), once."""
    _armed[name] = _Armed(action or _raise, hit)


def disarm_all() -> None:
    """Disarms every failpoint."""
    _armed.clear()


def _raise(name: str) -> None:
    raise FailpointError(f"failpoint {name}")


def _kill(_name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _pause(_name: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _read_environment() -> None:
    global _environment_read  # noqa: PLW0603  read once, at the first failpoint, not at import
    _environment_read = True
    actions = {"kill": _kill, "raise": _raise, "pause": _pause}
    for entry in filter(None, os.environ.get(ENVIRONMENT, "").split(",")):
        name, _, what = entry.strip().partition("=")
        action, _, hit = what.partition(":")
        if action not in actions:
            raise ValueError(f"{ENVIRONMENT}: {entry!r} is not name=<{'|'.join(actions)}>[:hit]")
        arm(name, actions[action], hit=int(hit or 1))
