"""Encryption from the command line: keys, their rotation, and bodies whose key is not there."""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.command_line import CommandLine, InProcess, in_process

KEY = base64.b64encode(bytes(range(32))).decode()
SECRET = "the combination is 31-17-42"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "config" / "holdfast" / "keys.json"


@pytest.fixture
def holdfast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Generator[InProcess]:
    """Commands in this process, with no configuration but what the test makes; nothing is started for them."""
    monkeypatch.delenv("CONTEXT_ENCRYPTION_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with in_process(tmp_path / "data", monkeypatch, capfdbinary) as commands:
        yield commands


def secrets_of(path: Path) -> list[str]:
    return [entry["key"] for entry in json.loads(path.read_bytes())["keys"].values()]


def test_E12_init_rotate_status(holdfast: InProcess, keys: Path) -> None:
    nothing = holdfast("encryption", "status", "--json")
    assert nothing.json == {"active": None, "origin": str(keys), "keys": []}
    assert "encryption init" in holdfast("encryption").err

    made = holdfast("encryption", "init", "--json").json
    assert made == {"active": made["active"], "path": str(keys)}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    rotated = holdfast("encryption", "rotate", "--json").json
    assert rotated == {"active": rotated["active"], "previous": made["active"], "path": str(keys)}

    status = holdfast("encryption", "status", "--json").json
    assert (status["active"], status["origin"]) == (rotated["active"], str(keys))
    assert [(key["key_id"], key["active"]) for key in status["keys"]] == [
        (made["active"], False),
        (rotated["active"], True),
    ]
    assert all(key["created_at"].endswith("Z") for key in status["keys"])

    words = holdfast("encryption", "rotate").out + holdfast("encryption", "status").out
    assert rotated["active"] in words
    assert not [secret for secret in secrets_of(keys) if secret in words + str(status)]


def test_init_and_rotate_refuse_what_would_lose_a_key_or_change_nothing(holdfast: InProcess, keys: Path) -> None:
    assert "encryption init" in holdfast("encryption", "rotate", "--json", status=3).error["hint"]
    holdfast("encryption", "init")
    before = keys.read_bytes()
    assert "encryption rotate" in holdfast("encryption", "init", "--json", status=3).error["hint"]
    keys.chmod(0o644)
    for subcommand in ("rotate", "status"):
        assert f"chmod 600 {keys}" in holdfast("encryption", subcommand, "--json", status=3).error["hint"]
    assert keys.read_bytes() == before


def test_keys_in_a_variable_are_rotated_there(
    holdfast: InProcess, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", f"mine={KEY}")
    for subcommand in ("init", "rotate"):
        error = holdfast("encryption", subcommand, "--json", status=3).error
        assert error["code"] == "configuration"
        assert "first in HOLDFAST_KEYS" in error["hint"]
    assert not keys.exists()
    status = holdfast("encryption", "status", "--json")
    assert status.json["keys"] == [{"key_id": "mine", "active": True, "created_at": None, "origin": "HOLDFAST_KEYS"}]
    assert KEY not in status.out
    # As a path it is a file like any other.
    monkeypatch.setenv("HOLDFAST_KEYS", str(tmp_path / "mine.json"))
    assert holdfast("encryption", "init", "--json").json["path"] == str(tmp_path / "mine.json")
    assert "HOLDFAST_KEYS" not in holdfast("config").out


def test_E21_a_key_of_the_source_documents_variable_is_listed(
    holdfast: InProcess, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phrase = "a secret of exactly 32 letters.."
    monkeypatch.setenv("CONTEXT_ENCRYPTION_KEY", phrase)
    status = holdfast("encryption", "status", "--json").json
    assert status["active"].startswith("phrase-")
    made = holdfast("encryption", "init", "--json").json
    listed = holdfast("encryption", "status")
    assert phrase not in listed.out
    assert status["active"] in listed.out
    assert holdfast("encryption", "status", "--json").json["active"] == made["active"]


@pytest.mark.slow
def test_E12_E60_a_body_is_opened_where_its_key_is_and_told_where_it_is_not(tmp_path: Path, keys: Path) -> None:
    mine = CommandLine(tmp_path / "data", HOLDFAST_KEYS_FILE=str(keys))
    without = CommandLine(tmp_path / "data", HOLDFAST_KEYS=f"other={KEY}")
    with mine.up():
        assert mine("put", "x", "--encrypt", "--json", status=3).error["code"] == "configuration"
        first = mine("encryption", "init", "--json").json["active"]
        sealed = mine("put", SECRET, "--encrypt", "--kind", "note", "--json").json["ref"]
        plain = mine("put", "for all to read", "--json").json["ref"]
        mine("encryption", "rotate")
        later = mine("put", '{"n": 1}', "--encrypt", "--json").json["ref"]

        found = mine("resolve", sealed, plain, later, "--json").lines
        assert [context["body"] for context in found] == [SECRET, "for all to read", {"n": 1}]
        assert found[0]["size"] == len(SECRET)
        assert mine("resolve", sealed, "--raw").raw == SECRET.encode()
        assert SECRET in mine("resolve", sealed).out

        # Every reference has its own outcome, and the status says that not all of them could be served.
        outcome = without("resolve", sealed, plain, later, "--json", status=3)
        assert [context["ref"] for context in outcome.lines] == [plain]
        told = [json.loads(line)["error"] for line in outcome.err.splitlines()]
        assert [error["code"] for error in told] == ["encryption_key", "encryption_key"]
        assert sealed in told[0]["message"]
        assert first in told[0]["message"]
        assert KEY not in outcome.err
        assert without("resolve", sealed, "--raw", status=3).raw == b""

    # The same from the lake.
    mine("flush")
    mine("evict", "--older-than", "0s")
    (cold,) = mine("resolve", sealed, "--json").lines
    assert (cold["body"], cold["tier"]) == (SECRET, "lake")
    assert mine("verify", "--offline", "--json").json["ok"] is True
