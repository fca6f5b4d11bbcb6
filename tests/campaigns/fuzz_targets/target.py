"""What a target is, what every check asks of an error, and how a check calls what it tests.

Holds no tests itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

import msgspec

from holdfast.schemas.errors import HoldfastError
from holdfast.streams.dead import _escaped
from holdfast.streams.service import ErrorBody, ErrorReply

Check = Callable[[Any], str]
TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\Z")
ASCII: Final = re.compile(r"[\x20-\x7e]*\Z")
MESSAGE_CHARS: Final = 4_000
"""Longest message of an error: it goes into replies, headers and logs."""


class Target(NamedTuple):
    """``make(rng)`` draws an input, ``check(input)`` says what became of it.  ``share``: of the inputs, relatively."""

    name: str
    make: Callable[[random.Random], Any]
    check: Check
    share: float = 1.0


def told(error: HoldfastError) -> str:
    """The code of an error that could be told to whoever asked, in a reply, a header and a dead letter."""
    message = str(error)
    assert message, "an error without a message"
    assert len(message) <= MESSAGE_CHARS, f"a message of {len(message)} characters"
    msgspec.json.encode(ErrorReply(ErrorBody.of(error)))
    assert ASCII.match(_escaped(message[:1_000])), "a reason that no header holds"
    return error.code


def attempt(call: Callable[[], Any]) -> str:
    """What became of a call: ``ok``, or the code of the typed error it raised."""
    try:
        call()
    except HoldfastError as error:
        return told(error)
    return "ok"


def drive(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise AssertionError("it waits for something")
