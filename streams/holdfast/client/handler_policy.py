"""What handlers decide: which events are theirs, what a failure means, under which names they stand.  Pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, Literal, cast

import msgspec

from holdfast.schemas.errors import HandlerError, HoldfastError, InputError, InvalidFieldError, InvalidNameError
from holdfast.schemas.names import check_agent, encode_token
from holdfast.streams.consumer import ACK_WAIT_S, ConsumerOptions, Start
from holdfast.streams.wire import event_filter

RESULT: Final = "result"
ERROR: Final = "error"
SYSTEM: Final = "holdfast"
"""First segment of the names of Holdfast's own events."""

CONTROL: Final = f"{SYSTEM}:handler"
"""Name of the events that tell one handler something; its consumer is their last segment."""

HANDLER_KEY: Final = "holdfast.handler"
NAMESPACE_KEY: Final = "holdfast.namespace"
PATTERN_KEY: Final = "holdfast.pattern"
"""Members of the metadata of a handler's consumer."""

MAX_DELIVER: Final = 5
BACKOFF_S: Final = (0.5, 2.0, 10.0, 60.0)
CONCURRENCY: Final = 16

INTERRUPTED: Final = 5
"""Deliveries beyond ``max_deliver`` that may still run: an attempt that was cut short, by a kill or by a restart of the
handler's process, is no failure of the handler.  Beyond these, the event itself must be what kills it."""

MOST_UNSETTLED: Final = 10_000
"""Deliveries of one handler that may be unsettled at once, in all processes: those at work, and those that failed and
wait for their time."""

FRESH_S: Final = 60.0
"""How far the time in an event's id and that of its storing may be apart in an event that counts as new: a producer's
clock is seldom off by as much."""

AHEAD_S: Final = 0.02
"""What one process takes ahead of being able to begin it is as much as it begins in this time: enough to bridge the way
to the server and back, and too little to keep from other processes."""

MOST_AHEAD: Final = 256
"""Most events taken ahead: with a function that takes no time at all, those of 10 ms."""

_JITTER: Final = 0.25
_READABLE_CHARS: Final = 40
_NAME_CHARS: Final = 256
_MOST_CONCURRENT: Final = 10_000


class HandlerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler is registered with; see :meth:`holdfast.client.handlers.Handlers.on`."""

    pattern: str
    name: str
    agent: str
    idempotent: bool = False
    max_deliver: int = MAX_DELIVER
    backoff_s: tuple[float, ...] = BACKOFF_S
    concurrency: int = CONCURRENCY
    track: bool = True
    start: Start = "new"
    for_me: bool = False
    timeout_s: float | None = None
    ack_wait_s: float = ACK_WAIT_S


class Again(msgspec.Struct, frozen=True):
    """The event is delivered again, after a delay."""

    delay_s: float


Verdict = Again | Literal["final"]

Settlement = Again | Literal["ack", "term"]
"""How a delivery is settled: tried again, done, or given up."""


def check_options(options: HandlerOptions) -> HandlerOptions:
    """Returns the options when they can be kept; raises InvalidFieldError naming the one that cannot."""
    if not 0 < len(options.name) <= _NAME_CHARS:
        raise InvalidNameError(
            f"handler name {options.name[:40]!r} is not 1 to {_NAME_CHARS} characters", field="name", limit=_NAME_CHARS
        )
    check_agent(options.agent)
    _ = event_filter("x", options.pattern)
    # Wrong values come from callers that no type checker sees.
    start: str = options.start
    for field, fits, wanted in (
        ("max_deliver", options.max_deliver >= 1, "at least 1"),
        ("concurrency", 1 <= options.concurrency <= _MOST_CONCURRENT, f"1 to {_MOST_CONCURRENT}"),
        ("ack_wait_s", options.ack_wait_s >= 0.1, "at least 0.1 seconds"),
        ("timeout_s", options.timeout_s is None or options.timeout_s > 0, "over 0 seconds"),
        ("backoff_s", all(delay_s >= 0 for delay_s in options.backoff_s), "times of 0 seconds or more"),
        ("start", start in ("all", "new"), "'all' or 'new'"),
    ):
        if not fits:
            raise InvalidFieldError(f"{field} is {getattr(options, field)!r}, not {wanted}", field=field)
    return options


def consumer_name(namespace: str, name: str) -> str:
    """Returns the name of a handler's consumer: readable, bounded, and one for each (namespace, name)."""
    hasher = blake2b(digest_size=8, person=b"holdfast-hdl-1")
    for part in (namespace, name):
        raw = part.encode("utf-8", "surrogatepass")
        hasher.update(len(raw).to_bytes(8, "little") + raw)
    return f"hf-on-{encode_token(name)[-_READABLE_CHARS:]}-{hasher.hexdigest()}"


def consumer_options(namespace: str, options: HandlerOptions) -> ConsumerOptions:
    """Returns how the consumer of a handler is declared: for its events, and for what it alone is told."""
    consumer = consumer_name(namespace, options.name)
    filters = [event_filter(namespace, options.pattern)]
    if not fits(options.pattern, control_name(consumer)):  # two filters may not overlap
        filters.append(event_filter(namespace, control_name(consumer)))
    return ConsumerOptions(
        filter_subjects=tuple(filters),
        start=options.start,
        ack_wait_s=options.ack_wait_s,
        max_ack_pending=MOST_UNSETTLED,
        batch=options.concurrency,
        metadata={
            HANDLER_KEY: encode_token(options.name),
            NAMESPACE_KEY: encode_token(namespace),
            PATTERN_KEY: encode_token(options.pattern),
        },
    )


def control_name(consumer: str) -> str:
    """Returns the name of the events that tell one handler something."""
    return f"{CONTROL}:{consumer}"


def fits(pattern: str, name: str) -> bool:
    """Whether an event's name fits a pattern, as the subject filter has it."""
    wanted, segments = pattern.split(":"), name.split(":")
    if wanted[-1] == "*":
        wanted = wanted[:-1]
        if len(segments) <= len(wanted):
            return False
        segments = segments[: len(wanted)]
    return len(wanted) == len(segments) and all(
        want in ("*", segment) for want, segment in zip(wanted, segments, strict=True)
    )


def is_taken(options: HandlerOptions, name: str, originator: str | None) -> bool:
    """Whether an event that the consumer delivered is for the handler.

    Results, errors and Holdfast's own events are for handlers whose pattern says so: ``a:*`` would else be handed what
    it brought about itself, without end.
    """
    return _is_named(options.pattern, name) and (not options.for_me or originator == options.agent)


@lru_cache(1_024)  # of names that repeat: splitting both takes a microsecond an event
def _is_named(pattern: str, name: str) -> bool:
    wanted, segments = pattern.split(":"), name.split(":")
    if segments[0] == SYSTEM and wanted[0] != SYSTEM:
        return False
    if segments[-1] in (RESULT, ERROR) and wanted[-1] != segments[-1]:
        return False
    return fits(pattern, name)


def judge(
    error: Exception, attempt: int, *, max_deliver: int, backoff_s: Sequence[float], jitter: float = 0.0
) -> Verdict:
    """Returns what a failed attempt leads to; ``jitter``, from 0 to 1, spreads those that failed at once.

    What the input itself is to blame for cannot get better, and is final; so is the attempt numbered ``max_deliver``.
    """
    if isinstance(error, InputError) or attempt >= max_deliver:
        return "final"
    delay_s = backoff_s[min(attempt, len(backoff_s)) - 1] if backoff_s else 0.0
    return Again(delay_s * (1 + _JITTER * jitter))


def delay_s(options: HandlerOptions, attempt: int) -> float:
    """Returns after which time a delivery is tried again when nothing of the handler's has failed."""
    backoff_s = options.backoff_s or (1.0,)
    return backoff_s[min(attempt, len(backoff_s)) - 1]


def events_ahead(concurrency: int, mean_s: float | None) -> int:
    """Returns how many events a process takes beyond those that it can begin at once.

    ``mean_s`` is how long the function works on one; while that is not known there are none, and of slow ones, which
    another process could begin, neither.
    """
    if mean_s is None:
        return 0
    return int(min(MOST_AHEAD, concurrency * AHEAD_S / max(mean_s, 1e-6)))


def is_often(attempt: int) -> bool:
    """Whether a delivery was handed out more often than by one process that stopped, or died, with it in hand.

    Then it may be what processes die of, and each time they take an attempt from all that they hold: so none is taken
    ahead beside it.
    """
    return attempt > 2


def turn(attempt: int, chance: float) -> float:
    """Returns by what deliveries that came together are put in turn: as they came, then those that were handed out
    often in any order, by ``chance`` from 0 to 1.

    If always the same ones came behind an event that kills its process, they would be given up together with it, and
    never have been begun.
    """
    return 1.0 + chance if is_often(attempt) else 0.0


def kills_its_handler(attempt: int, max_deliver: int) -> bool:
    """Whether an event has been delivered so often, without an attempt that came to an end, that it is given up."""
    return attempt > max_deliver + INTERRUPTED


def is_surely_new(
    event_id: str, stored_at_ms: int, attempt: int, *, created_ms: int, duplicate_window_s: float
) -> bool:
    """Whether a handler cannot have worked on an event before, so that nobody needs to be asked.

    It is handed out for the first time, by a consumer that is older than it; and it is no repetition of an earlier
    event with its id: by the time in the id there was none before, and since then the server would have refused it.
    """
    if attempt > 1 or stored_at_ms < created_ms or event_id[14:15] != "7":
        return False
    age_s = (stored_at_ms - int(event_id.replace("-", "")[:12], 16)) / 1000
    return abs(age_s) <= min(FRESH_S, duplicate_window_s / 4)


def as_typed(error: Exception, handler: str) -> HoldfastError:
    """Returns an error as one of ours: what the dead letter and the event of the failure say."""
    if isinstance(error, HoldfastError):
        return error
    return HandlerError(
        f"handler {handler!r} failed with {type(error).__name__}: {error}"[:1_000],
        handler=handler,
        cause=type(error).__name__,
    )


def error_data(error: HoldfastError, handler: str) -> dict[str, Any]:
    """Returns the data of the event that tells of a failure."""
    cause = error.cause if isinstance(error, HandlerError) else error.code
    data = {"code": error.code, "message": error.message, "handler": handler, "cause": cause, "hint": error.hint}
    return {name: value for name, value in data.items() if value is not None}


def error_of_data(data: object, *, event: str) -> HandlerError:
    """Returns the error that the event of a failure tells of, for who waits for a result."""
    members = cast("dict[str, object]", data) if isinstance(data, dict) else {}
    text = {name: value for name, value in members.items() if isinstance(value, str)}
    return HandlerError(
        text.get("message", "the handler failed and did not say why")[:1_000],
        handler=text.get("handler", ""),
        cause=text.get("cause", text.get("code", "")),
        hint=text.get("hint", f"the event {event} is kept: list it with 'holdfast dead'"),
    )


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether a handler takes the lineage beside the event.

    Raises InvalidFieldError when it can be called neither with an event nor with both.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False  # a built-in without a signature
    for count in (2, 1):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 2
    raise InvalidFieldError(
        f"handler {getattr(function, '__qualname__', function)!r} takes {signature}",
        field="handler",
        hint="define it as (event) or (event, context)",
    )
