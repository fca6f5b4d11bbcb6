"""Commands where nothing runs: each starts a server and the workers that it needs, for as long as it lasts."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.command_line import CommandLine


@pytest.fixture
def holdfast(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "data")


@pytest.mark.slow
def test_what_one_command_stores_the_next_finds_hot_then_cold(holdfast: CommandLine) -> None:
    ref = holdfast("put", "a fact", "--json").json["ref"]
    holdfast("emit", "fact:stored", "--context", ref, "--session", "s1")
    assert holdfast("resolve", ref, "--json").json["tier"] == "hot"
    holdfast("flush")
    assert holdfast("evict", "--older-than", "0s", "--json").json == {"purged": 1, "left": 0}
    assert holdfast("resolve", ref, "--json").json["tier"] == "lake"
    (event,) = holdfast("query", "--json").lines
    assert event["context_ref"] == ref
    # The lake alone answers without any server.
    assert holdfast("sql", "SELECT ref FROM contexts", "--json").json == {"ref": ref}
    assert holdfast("verify", "--offline", "--json").json["ok"] is True
    assert not (holdfast.data / "server.json").exists()


def test_damage_in_the_lake_is_found_and_not_served(holdfast: CommandLine) -> None:
    # Random, so that nearly all of the file is the body.
    ref = holdfast("put", "-", stdin=random.Random(17).randbytes(100_000)).out.strip()
    holdfast("flush")
    holdfast("evict", "--older-than", "0s")
    (path,) = (holdfast.data / "lake" / "contexts").rglob("*.parquet")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(damaged)
    report = holdfast("verify", "--offline", "--json", status=5).json
    assert report["ok"] is False
    assert {violation["invariant"] for violation in report["violations"]} <= {"I1", "I4"}
    assert holdfast("resolve", ref, "--raw", status=5).raw == b""


def test_streams_that_the_lake_knows_and_the_server_lost_are_not_papered_over(holdfast: CommandLine) -> None:
    holdfast("put", "a fact")
    holdfast("flush")
    shutil.rmtree(holdfast.data / "jetstream")
    error = holdfast("put", "another", "--json", status=5).error
    assert error["code"] == "gap"
    assert "--accept-lost-streams" in error["hint"]
    with holdfast.up("--accept-lost-streams"):
        holdfast("put", "another")


def test_verify_of_nothing_says_so_and_makes_nothing(holdfast: CommandLine) -> None:
    assert holdfast("verify", "--json", status=3).error["code"] == "data_directory"
    assert not holdfast.data.exists()


def test_sql_without_a_lake_says_how_to_get_one(holdfast: CommandLine) -> None:
    error = holdfast("sql", "SELECT 1", "--json", status=3).error
    assert error["code"] == "data_directory"
    assert "holdfast" in error["hint"]


def test_a_server_that_is_named_is_never_replaced(holdfast: CommandLine) -> None:
    error = holdfast("put", "x", "--nats-url", "nats://127.0.0.1:9", "--json", status=3).error
    assert error["code"] == "unavailable"
    assert "nats://127.0.0.1:9" in error["message"]
    assert not holdfast.data.exists()


def test_commands_at_the_same_moment_take_turns(holdfast: CommandLine) -> None:
    started = [holdfast.start("put", f"fact {number}", "--json") for number in range(4)]
    try:
        refs = [service.read_line()["ref"] for service in started]
        assert [service.wait() for service in started] == [0, 0, 0, 0]
    finally:
        for service in started:
            service.kill()
    assert [line["body"] for line in holdfast("resolve", *refs, "--json").lines] == [f"fact {n}" for n in range(4)]


def test_health_says_that_nothing_was_running(holdfast: CommandLine) -> None:
    outcome = holdfast("health", "--json")
    assert outcome.json["ok"] is True
    assert "nothing was running" in outcome.err
