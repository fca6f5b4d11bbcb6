"""``holdfast checkpoint`` and ``holdfast warm`` against a system that runs, and one that does not."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.command_line import CommandLine, InProcess, Service, in_process

COUNTS = ("contexts", "versions", "events", "dead_letters")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "data"


@pytest.fixture(scope="module")
def running(directory: Path) -> Generator[Service]:
    with CommandLine(directory, HOLDFAST_ARCHIVE_INTERVAL_S="3600").up() as service:
        yield service


@pytest.fixture
def holdfast(
    running: Service,
    directory: Path,
    tmp_path: Path,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Generator[InProcess]:
    """Commands against the running system, in a namespace of the test's own."""
    assert running.ready["ready"] is True
    kept = str(tmp_path / "kept")
    with in_process(
        directory, monkeypatch, capfdbinary, HOLDFAST_NAMESPACE=namespace, HOLDFAST_CHECKPOINTS=kept
    ) as commands:
        yield commands


def test_B34_B35_B36_a_checkpoint_is_saved_shown_restored_elsewhere_and_compared(
    holdfast: InProcess, tmp_path: Path, namespace: str
) -> None:
    ref = holdfast("put", '{"goal": "fly"}', "--kind", "plan", "--json").json["ref"]
    holdfast("set", "plan", '{"step": 1}')
    holdfast("emit", "agent:status", '{"state": "ready"}', "--context", ref)
    file, elsewhere = str(tmp_path / "one"), str(tmp_path / "elsewhere")
    saved = holdfast("checkpoint", "save", file, "--name", "before", "--json").json
    assert saved["checkpoint_id"] == "before"
    assert saved["namespace"] == namespace
    assert [saved[name] for name in COUNTS] == [2, 1, 1, 0]
    assert (saved["purged"], saved["elsewhere"], saved["unreadable"]) == (0, 0, 0)
    assert saved["points"]["KV_ctx-hot"]["last_seq"] > 0
    assert holdfast("checkpoint", "show", file, "--json").json == saved
    assert "checkpoint before of 20" in holdfast("checkpoint", "show", file).out

    restored = holdfast("checkpoint", "restore", file, "--data", elsewhere, "--json").json
    assert [restored["stored"][name] for name in COUNTS] == [2, 1, 1, 0]
    assert set(restored["present"].values()) == {0}
    assert holdfast("resolve", ref, "--data", elsewhere, "--json").json["body"] == {"goal": "fly"}
    assert holdfast("get", "plan", "--data", elsewhere, "--json").json["version"] == 1
    assert holdfast("verify", "--data", elsewhere, "--json").json["ok"] is True
    compared = holdfast("checkpoint", "verify", file, "--data", elsewhere, "--json").json
    assert compared["ok"] is True
    assert compared["checked"] == compared["hot"] == restored["stored"]
    assert "ok: everything is there" in holdfast("checkpoint", "verify", file).out


def test_without_a_file_the_newest_is_taken(holdfast: InProcess, tmp_path: Path) -> None:
    assert "no checkpoint" in holdfast("checkpoint", "show", status=4).err
    holdfast("put", '"one"')
    first = holdfast("checkpoint", "save", "--json").json
    holdfast("put", '"two"')
    second = holdfast("checkpoint", "save", "--json").json
    assert Path(second["path"]).parent == tmp_path / "kept"
    assert (first["contexts"], second["contexts"]) == (1, 2)
    assert holdfast("checkpoint", "show", "--json").json["checkpoint_id"] == second["checkpoint_id"]
    assert holdfast("checkpoint", "verify", "--json").json["checkpoint_id"] == second["checkpoint_id"]


def test_what_is_missing_ends_with_status_5(holdfast: InProcess, tmp_path: Path) -> None:
    holdfast("put", '"one"')
    file = str(tmp_path / "one")
    holdfast("checkpoint", "save", file)
    empty = str(tmp_path / "empty")
    holdfast("put", '"another"', "--data", empty)
    outcome = holdfast("checkpoint", "verify", file, "--data", empty, "--json", status=5).json
    assert outcome["ok"] is False
    assert outcome["missing"]["contexts"] == 1
    assert outcome["findings"][0]["what"] == "context"
    assert "stored nowhere" in holdfast("checkpoint", "verify", file, "--data", empty, status=5).out


def test_a_system_that_holds_something_is_refused_and_merged_into_when_told(
    holdfast: InProcess, tmp_path: Path
) -> None:
    file = str(tmp_path / "one")
    holdfast("set", "plan", "1")
    holdfast("checkpoint", "save", file)
    other = str(tmp_path / "other")
    holdfast("set", "plan", "2", "--data", other)
    refused = holdfast("checkpoint", "restore", file, "--data", other, "--json", status=3).error
    assert refused["code"] == "configuration"
    assert "--merge" in refused["hint"]
    merged = holdfast("checkpoint", "restore", file, "--data", other, "--merge")
    assert "skipped: plan: the system has another chain" in merged.err
    assert holdfast("get", "plan", "--data", other, "--json").json["body"] == "2"


@pytest.mark.parametrize("name", ["show", "restore", "verify"])
def test_no_file_and_a_damaged_one_have_their_statuses(holdfast: InProcess, tmp_path: Path, name: str) -> None:
    holdfast("put", '"one"')
    file = tmp_path / "one"
    assert "there is no checkpoint" in holdfast("checkpoint", name, str(file), status=4).err
    holdfast("checkpoint", "save", str(file))
    file.write_bytes(file.read_bytes()[:-9])
    assert "damaged" in holdfast("checkpoint", name, str(file), status=5).err
    file.write_bytes(b"something else")
    assert "is no checkpoint" in holdfast("checkpoint", name, str(file), status=2).err


def test_a_place_that_cannot_be_written_is_told(holdfast: InProcess, tmp_path: Path) -> None:
    outcome = holdfast("checkpoint", "save", str(tmp_path / "none" / "one"), status=3)
    assert "cannot be written" in outcome.err
    assert "id" in holdfast("checkpoint", "save", "--name", "a/b", status=2).err


def test_B10_warm_brings_archived_contexts_back(holdfast: InProcess) -> None:
    ref = holdfast("put", '{"goal": "fly"}', "--kind", "plan", "--json").json["ref"]
    holdfast("flush")
    holdfast("evict", "--older-than", "0s")
    assert holdfast("resolve", ref, "--json").json["tier"] == "lake"
    assert holdfast("warm", "--since", "1h", "--kind", "note", "--json").json["stored"] == 0
    report = holdfast("warm", "--since", "1h", "--kind", "plan", "--json").json
    assert (report["stored"], report["hot"], report["failed"], report["is_whole"]) == (1, 0, 0, True)
    assert holdfast("resolve", ref, "--json").json["tier"] == "hot"
    assert "0 contexts are hot again" in holdfast("warm").out
    assert "is not a time" in holdfast("warm", "--since", "soon", status=2).err
    assert "limit" in holdfast("warm", "--limit", "0", status=2).err


def test_a_system_at_rest_is_captured_too(holdfast: InProcess, tmp_path: Path) -> None:
    """No server runs on that directory: the command starts one for as long as it takes."""
    resting = str(tmp_path / "resting")
    holdfast("put", '"one"', "--data", resting)
    saved = holdfast("checkpoint", "save", str(tmp_path / "one"), "--data", resting, "--json").json
    assert saved["contexts"] == 1
