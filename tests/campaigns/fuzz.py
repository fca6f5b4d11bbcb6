"""Fuzzes every way in: names, references, events, requests, frames, headers, keys, bodies, envelopes, settings.

Run it with ``python -m tests.campaigns.fuzz --inputs 1000000 --seed 1``.  Inputs are made by grammars and by mutation
from a seed alone; a target says what must hold of each.  A violation is any exception but a typed error, a broken
property, an input that takes over a second of computing, or memory that grows by over 64 MiB.  The input is made as
small as it can be and printed as a Python literal.  ``--served N`` sends N more through a real server to all workers.

Holds no tests itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.campaigns.fuzz_targets import TARGETS, TOML, Target
from tests.campaigns.rig import tell

SLOW_S: Final = 1.0
"""Most processor time of one input: the machine's other work does not count."""

HANG_S: Final = 20.0
"""After this long an input is interrupted, and told as one that hangs."""

GROWTH_BYTES: Final = 64 * 1024 * 1024
_WARM: Final = 300
"""Inputs of each target before memory is first measured: caches are filled, modules loaded."""

_EVERY: Final = 500
_MOST_VIOLATIONS: Final = 20
_SHRINKS: Final = 2_000
_LITERAL_CHARS: Final = 4_000


class Violation(msgspec.Struct, frozen=True):
    """An input that broke a rule, as small as it could be made; ``error`` is what it did."""

    target: str
    number: int
    error: str
    input: str


class Outcome(msgspec.Struct, kw_only=True):
    """What a target took and how it fared; ``digest`` is the same whenever the inputs are."""

    inputs: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    outcomes: dict[str, int] = {}
    digest: str = ""


class Report(msgspec.Struct, kw_only=True):
    """What a run did."""

    seed: int
    inputs: int = 0
    served: int = 0
    seconds: float = 0.0
    targets: dict[str, Outcome] = {}
    rss_start_bytes: int = 0
    rss_growth_bytes: int = 0
    violations: list[Violation] = []


class HangError(Exception):
    """An input has not come to an end."""


def trial(
    inputs: int,
    seed: int,
    targets: Sequence[Target] = tuple(TARGETS.values()),
    *,
    say: Callable[[str], None] = tell,
) -> Report:
    """Feeds ``inputs`` to the targets, by their shares, and returns what came of them."""
    report = Report(seed=seed)
    started = time.perf_counter()
    shares = sum(target.share for target in targets)
    counts = {target.name: max(1, round(inputs * target.share / shares)) for target in targets}
    # Nobody but the checks shall see what is logged of bad input.
    logging.disable(logging.CRITICAL)
    previous = signal.signal(signal.SIGALRM, _interrupt)
    try:
        for target in targets:
            _feed(target, min(_WARM, counts[target.name]), random.Random(f"{seed}-warm"), Report(seed=seed))
        gc.collect()
        report.rss_start_bytes = _rss_bytes()
        for target in targets:
            outcome = _feed(target, counts[target.name], random.Random(f"{seed}-{target.name}"), report)
            report.targets[target.name] = outcome
            report.inputs += outcome.inputs
            say(
                f"{target.name:10} {outcome.inputs:9,} inputs, "
                f"{outcome.inputs / max(outcome.seconds, 1e-3):8,.0f}/s, slowest {outcome.slowest_s * 1000:6.1f} ms, "
                f"{len(report.violations)} violations, "
                f"{report.rss_growth_bytes / 2**20:+.1f} MiB"
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        logging.disable(logging.NOTSET)
        TOML.remove()
    if report.rss_growth_bytes > GROWTH_BYTES:
        report.violations.append(
            Violation("memory", report.inputs, f"grew by {report.rss_growth_bytes:,} bytes", f"seed {seed}")
        )
    report.seconds = round(time.perf_counter() - started, 1)
    return report


def _feed(target: Target, count: int, rng: random.Random, report: Report) -> Outcome:
    outcome = Outcome()
    seen: Counter[str] = Counter()
    known = {signature(found.error) for found in report.violations}
    number = 0
    started = time.perf_counter()
    for number in range(count):
        given = target.make(rng)
        error, spent_s, became = run(target, given)
        outcome.slowest_s = max(outcome.slowest_s, spent_s)
        if error is None:
            seen[became] += 1
        elif signature(error) not in known:
            known.add(signature(error))
            small = minimised(given, partial(_fails_alike, target, error))
            report.violations.append(Violation(target.name, number, error, literal(small)))
        if number % _EVERY == 0:
            report.rss_growth_bytes = max(report.rss_growth_bytes, _rss_bytes() - report.rss_start_bytes)
            if len(report.violations) >= _MOST_VIOLATIONS:
                break
    outcome.inputs = number + 1
    outcome.seconds = round(time.perf_counter() - started, 3)
    outcome.outcomes = dict(seen.most_common(12))
    # Of two runs the generators are in the same state only if they drew the same.
    outcome.digest = f"{rng.getrandbits(64):016x}"
    return outcome


def run(target: Target, given: Any) -> tuple[str | None, float, str]:
    """Returns what is wrong with an input, if anything; the processor time it took; and what became of it."""
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    before = time.thread_time()
    error = None
    became = ""
    try:
        became = target.check(given)
    except HangError:
        error = f"hang: not done after {HANG_S:.0f} s"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as failure:  # noqa: BLE001  whatever leaves a target is what is looked for
        place = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__} at {Path(place.filename).name}:{place.lineno}: {str(failure)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    spent_s = time.thread_time() - before
    if error is None and spent_s > SLOW_S:
        error = f"slow: {spent_s:.2f} s of processor time"
    return error, spent_s, became


def _fails_alike(target: Target, error: str, given: Any) -> bool:
    found = run(target, given)[0]
    return found is not None and signature(found) == signature(error)


def signature(error: str) -> str:
    """What two violations of one cause have in common: the kind of error and where it came from."""
    return error.split(": ")[0]


def minimised(given: Any, fails: Callable[[Any], bool]) -> Any:
    """Returns the smallest input found that still fails: parts left out, then bytes and characters made plain."""
    tries = _SHRINKS
    changed = True
    while changed and tries > 0:
        changed = False
        for smaller in shrunk(given):
            tries -= 1
            if tries <= 0:
                break
            if fails(smaller):
                given, changed = smaller, True
                break
    return given


def shrunk(value: Any) -> Iterator[Any]:
    """Smaller variants of an input, the smallest first."""
    if isinstance(value, str) and value:
        yield from _cut(value, "a")
    elif isinstance(value, bytes) and value:
        yield from _cut(value, b"a")
    elif isinstance(value, dict):
        for name in value:
            yield {other: item for other, item in value.items() if other != name}
        for name, item in value.items():
            for smaller in shrunk(item):
                yield {**value, name: smaller}
    elif isinstance(value, list | tuple):
        if isinstance(value, list):
            for at in range(len(value)):
                yield value[:at] + value[at + 1 :]
        for at, item in enumerate(value):
            for smaller in shrunk(item):
                yield type(value)([*value[:at], smaller, *value[at + 1 :]])


def _cut(value: Any, plain: Any) -> Iterator[Any]:
    """Text or bytes with a part left out, the largest parts first; then with each character made plain."""
    size = len(value)
    step = size
    while step:
        for start in range(0, size, step):
            yield value[:start] + value[start + step :]
        step //= 2
    for at in range(min(size, 64)):
        if value[at : at + 1] != plain:
            yield value[:at] + plain + value[at + 1 :]


def literal(value: Any) -> str:
    """An input as Python would write it; of a long one its beginning and its length."""
    text = repr(value)
    return text if len(text) <= _LITERAL_CHARS else f"{text[:_LITERAL_CHARS]}… ({len(text)} characters)"


def _interrupt(*_: object) -> None:
    raise HangError


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs in this process")
    parser.add_argument("--served", type=int, default=0, help="inputs through a real server, beside those")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of them, parted by commas")
    parser.add_argument("--json", action="store_true", help="only the last line, as JSON")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.targets.split(",")) - set(TARGETS))
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; one of {', '.join(TARGETS)}")
    say: Callable[[str], None] = (lambda _: None) if given.json else tell
    report = trial(given.inputs, given.seed, [TARGETS[name] for name in given.targets.split(",")], say=say)
    if given.served:
        from tests.campaigns.fuzz_served import trial_served

        asyncio.run(trial_served(given.served, report, say=say))
    for violation in report.violations:
        tell(f"VIOLATION in {violation.target}, seed {given.seed}, input {violation.number}: {violation.error}")
        tell(f"    {violation.input}")
    tell(json.dumps(msgspec.to_builtins(report) | {"violations_count": len(report.violations)}))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
