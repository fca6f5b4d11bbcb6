"""The fuzz campaign, in short: every way in holds, the same seed makes the same inputs, and a defect would be found."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

from holdfast.schemas import names
from holdfast.schemas.errors import InvalidNameError
from tests.campaigns import fuzz
from tests.campaigns.fuzz_served import trial_served
from tests.campaigns.fuzz_targets import TARGETS, Target, told

if TYPE_CHECKING:
    import pytest


def quiet(_: str) -> None:
    pass


def test_bad_input_gets_a_typed_answer_on_every_way_in() -> None:
    report = fuzz.trial(8_000, 1, say=quiet)
    assert [(found.target, found.error, found.input) for found in report.violations] == []
    assert report.inputs > 7_900
    assert report.targets.keys() == TARGETS.keys()
    for outcome in report.targets.values():
        # Neither a target that lets everything pass nor one that never does would show anything.
        assert len(outcome.outcomes) > 1, outcome


def test_a_seed_names_its_inputs() -> None:
    def digests(seed: int) -> list[str]:
        return [outcome.digest for outcome in fuzz.trial(500, seed, say=quiet).targets.values()]

    assert digests(7) == digests(7)
    assert digests(7) != digests(8)


def test_a_defect_is_found_and_its_input_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a name not escaped that ends with a line break, as a pattern with $ lets pass, the campaign would say so."""
    whole = names.encode_token

    def careless(name: str) -> str:
        return name if name.endswith("\n") and whole(name[:-1]) == name[:-1] else whole(name)

    monkeypatch.setattr("tests.campaigns.fuzz_targets.names.encode_token", careless)
    report = fuzz.trial(4_000, 1, [TARGETS["names"]], say=quiet)
    assert report.violations
    assert report.violations[0].target == "names"
    [first, _, _] = eval(report.violations[0].input)  # noqa: S307  a literal of our own
    assert first.endswith("\n")
    assert len(first) <= 2


def test_what_hangs_leaks_or_crashes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []

    def check(given: str) -> str:
        match given[:1]:
            case "h":
                while True:
                    time.sleep(0.01)
            case "s":
                until = time.thread_time() + 0.15
                while time.thread_time() < until:
                    pass
            case "c":
                raise ZeroDivisionError("by nought")
            case "r":
                return told(InvalidNameError("refused as it should be"))
            case _:
                kept.append(b"x" * 1_000_000)
        return "ok"

    monkeypatch.setattr(fuzz, "SLOW_S", 0.1)
    monkeypatch.setattr(fuzz, "_SHRINKS", 3)
    monkeypatch.setattr(fuzz, "_EVERY", 10)
    monkeypatch.setattr(fuzz, "_WARM", 1)

    def trial(letters: str) -> list[str]:
        inputs = iter([*letters, *"xxxx"])
        target = Target("planted", lambda _: next(inputs), check)
        return [
            found.error.split(":")[0].split(" at ")[0]
            for found in fuzz.trial(len(letters) - 1, 1, [target], say=quiet).violations
        ]

    assert trial("xs") == ["slow"]
    assert trial("xc") == ["ZeroDivisionError"]
    assert trial("xr") == []
    assert [told.startswith("grew by ") for told in trial("x" * 101)] == [True]
    monkeypatch.setattr(fuzz, "HANG_S", 0.2)
    assert trial("xh") == ["hang"]


def test_an_input_is_minimised_in_every_part() -> None:
    def fails(given: Any) -> bool:
        return "!" in given[0] and b"\xff" in given[1].get("k", b"")

    large = ("abc" * 50 + "!" + "xyz" * 50, {"k": b"12345\xff6789" * 3, "other": b"1"}, [1, 2])
    assert fuzz.minimised(large, fails) == ("!", {"k": b"\xff"}, [])


async def test_bad_input_stops_nobody_that_serves() -> None:
    report = fuzz.Report(seed=3)
    await trial_served(320, report, say=quiet)
    assert [(found.error, found.input) for found in report.violations] == []
    outcomes = report.targets["served"].outcomes
    assert outcomes["answered"] > 3
    assert outcomes["invalid_field"] > 10
    assert outcomes["published"] > 10


def test_inputs_are_made_fast_enough_for_a_million() -> None:
    """Each generator alone: what is tested shall take the time, not what makes its input."""
    for target in TARGETS.values():
        rng = random.Random(1)
        started = time.thread_time()
        for _ in range(300):
            target.make(rng)
        assert time.thread_time() - started < 1.0, target.name
