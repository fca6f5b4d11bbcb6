"""Commands on named contexts, against a system that runs: their ``--json``, exit statuses, what a person reads."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from holdfast.client import connect
from holdfast.client.session_manager import ContextManager
from tests.command_line import CommandLine, InProcess, Service, in_process

VERSION_MEMBERS = {"key", "version", "op", "ref", "tags", "agent_id", "timestamp", "event_id"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "data"


@pytest.fixture(scope="module")
def running(directory: Path) -> Generator[Service]:
    # Archiving happens when a test asks for it, and then only.
    with CommandLine(directory, HOLDFAST_ARCHIVE_INTERVAL_S="3600").up() as service:
        yield service


@pytest.fixture
def program(running: Service, directory: Path, namespace: str) -> CommandLine:
    """Commands as processes, in a namespace of the test's own."""
    assert running.ready["ready"] is True
    return CommandLine(directory, HOLDFAST_NAMESPACE=namespace)


@pytest.fixture
def holdfast(
    running: Service,
    directory: Path,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Generator[InProcess]:
    """The same commands in this process."""
    assert running.ready["ready"] is True
    with in_process(directory, monkeypatch, capfdbinary, HOLDFAST_NAMESPACE=namespace) as commands:
        yield commands


def keys_of(lines: list[Any]) -> list[str]:
    return [line["key"] for line in lines]


def test_E36_E39_set_get_patch_and_rm(holdfast: InProcess) -> None:
    written = holdfast("set", "plan.trip", '{"goal": "fly", "budget": 300}', "--json").json
    assert set(written) >= VERSION_MEMBERS
    assert (written["key"], written["version"], written["op"], written["agent_id"]) == ("plan.trip", 1, "put", "cli")
    patched = holdfast("patch", "plan.trip", '{"budget": 400, "goal": null}', "--json").json
    assert (patched["version"], patched["op"]) == (2, "patch")
    value = holdfast("get", "plan.trip", "--json").json
    assert value["body"] == {"budget": 400}
    assert value["content_type"] == "application/json"
    assert value["kind"] == "context"
    assert holdfast("rm", "plan.trip", "--json").json["op"] == "delete"
    error = holdfast("get", "plan.trip", "--json", status=4).error
    assert (error["code"], error["field"]) == ("not_found", "key")
    assert holdfast("rm", "plan.trip", status=4).err.startswith("error: ")


def test_a_person_reads_what_was_written(holdfast: InProcess) -> None:
    assert holdfast("set", "k", '{"a": 1}').out.startswith("k v1  ctx_context_")
    text = holdfast("get", "k").out
    assert text.startswith("k v1  application/json  ")
    assert text.endswith('{\n  "a": 1\n}\n')
    assert holdfast("rm", "k").out == "k v2  deleted\n"


def test_exact_bytes_come_back_from_files_and_standard_input(holdfast: InProcess, tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(bytes(range(256)))
    holdfast("set", "bytes", "--file", str(path))
    assert holdfast("get", "bytes", "--raw").raw == bytes(range(256))
    holdfast("set", "text", "-", stdin="grüße\n".encode())
    assert holdfast("get", "text", "--json").json["body"] == "grüße\n"
    holdfast("set", "exact", '{"z":1,  "a": 1.50}')
    assert holdfast("get", "exact", "--raw").raw == b'{"z":1,  "a": 1.50}'
    typed = holdfast("set", "typed", "17", "--content-type", "application/json", "--kind", "number", "--json").json
    assert typed["ref"].startswith("ctx_number_")
    assert holdfast("get", "typed", "--json").json["body"] == 17


def test_E03_versions_by_number_and_time_and_the_way_back(holdfast: InProcess) -> None:
    for n in range(1, 4):
        holdfast("set", "v", json.dumps({"n": n}))
    versions = holdfast("history", "v", "--json").lines
    assert [(line["version"], line["op"]) for line in versions] == [(3, "put"), (2, "put"), (1, "put")]
    assert holdfast("get", "v", "--version", "2", "--json").json["body"] == {"n": 2}
    assert holdfast("get", "v", "--as-of", versions[2]["stored_at"], "--json").json["body"] == {"n": 1}
    holdfast("get", "v", "--as-of", "1h", status=4)
    back = holdfast("rollback", "v", "1", "--by", "ann", "--json").json
    assert (back["version"], back["op"], back["changed_by"], back["ref"]) == (4, "rollback", "ann", versions[2]["ref"])
    assert holdfast("get", "v", "--json").json["body"] == {"n": 1}
    assert [line["version"] for line in holdfast("history", "v", "--before", "3", "--json").lines] == [2, 1]
    assert [line["version"] for line in holdfast("history", "v", "--limit", "2", "--json").lines] == [4, 3]
    table = holdfast("history", "v").out
    assert "rollback" in table
    assert "ann" in table
    assert holdfast("history", "nobody", "--json", status=4).error["code"] == "not_found"


def test_a_conflict_has_a_status_of_its_own_and_says_both_versions(holdfast: InProcess) -> None:
    holdfast("set", "c", "one", "--expected-version", "0")
    error = holdfast("set", "c", "two", "--expected-version", "0", "--json", status=6).error
    assert error["code"] == "version_conflict"
    assert error["details"] == {"key": "c", "expected": 0, "actual": 1}
    for arguments in (("patch", "c", "{}"), ("append", "c", "1"), ("rm", "c"), ("rollback", "c", "1")):
        assert holdfast(*arguments, "--expected-version", "7", status=6).err.count("\n") == 1
    assert holdfast("get", "c", "--raw").raw == b"one"
    holdfast("set", "c", "two", "--expected-version", "1")


def test_E37_append_grows_a_list(holdfast: InProcess) -> None:
    holdfast("append", "chat", '{"role": "user"}', "--change-type", "append", "--tag", "t")
    appended = holdfast("append", "chat", "-", "--json", stdin=b'"text"').json
    assert (appended["version"], appended["tags"]) == (2, ["t"])
    assert holdfast("get", "chat", "--json").json["body"] == [{"role": "user"}, "text"]


def test_E31_a_time_to_live_is_given_by_the_key_or_by_the_policy(holdfast: InProcess) -> None:
    assert "expires_at" in holdfast("set", "t", "x", "--ttl", "1h", "--json").json
    assert "expires_at" not in holdfast("set", "t", "x", "--json").json
    assert holdfast("policy", "set", "short.", "--ttl", "15m", "--json").json == {"prefix": "short.", "ttl_s": 900.0}
    assert "expires_at" in holdfast("set", "short.a", "x", "--json").json
    assert "expires_at" not in holdfast("set", "short.a", "x", "--ttl", "never", "--json").json
    holdfast("policy", "set", "", "--max-versions", "5", "--plain")
    assert holdfast("policy", "list", "--json").lines == [
        {"prefix": "", "max_versions": 5, "encrypt": False},
        {"prefix": "short.", "ttl_s": 900.0},
    ]
    assert "(every key)" in holdfast("policy").out
    holdfast("policy", "rm", "short.")
    assert [line["prefix"] for line in holdfast("policy", "--json").lines] == [""]
    assert holdfast("policy", "rm", "short.", "--json", status=4).error["field"] == "prefix"


def test_E13_E75_cleanup_writes_the_expiry_of_what_is_due(holdfast: InProcess) -> None:
    holdfast("set", "soon", "x", "--ttl", "1ms")
    holdfast("set", "later", "x", "--ttl", "1h")
    # The janitor expires nothing before its clock has reached the time: it may lag the writer's.
    for _ in range(100):
        report = holdfast("cleanup", "--json").json
        assert set(report) == {"expired"}
        if holdfast("history", "soon", "--json").lines[0]["op"] == "expire":
            break
    assert [line["op"] for line in holdfast("history", "soon", "--json").lines] == ["expire", "put"]
    assert [line["op"] for line in holdfast("history", "later", "--json").lines] == ["put"]
    assert holdfast("cleanup", "--json").json == {"expired": 0}
    assert holdfast("cleanup").out == "expired 0 named contexts\n"
    holdfast("get", "soon", status=4)


def test_E76_archiving_old_versions_keeps_the_history_whole(holdfast: InProcess, namespace: str) -> None:
    for n in range(1, 6):
        holdfast("set", "many", str(n))
    report = holdfast("archive-old-versions", "1", "--json").json
    assert set(report) == {"keys", "revisions", "left"}
    # All of them are in the lake now, and in the history still.
    count = f"SELECT count(*) AS n FROM key_versions WHERE key = 'many' AND namespace = '{namespace}'"
    assert holdfast("sql", count, "--json").json == {"n": 5}
    assert [line["version"] for line in holdfast("history", "many", "--json").lines] == [5, 4, 3, 2, 1]
    assert holdfast("get", "many", "--version", "1", "--raw").raw == b"1"
    assert "left the hot tier" in holdfast("archive-old-versions", "1").out


def test_E29_E30_E34_ls_selects(holdfast: InProcess) -> None:
    holdfast("set", "p.a", "1", "--tag", "x", "--tag", "y", "--session", "s1", "--agent", "planner")
    holdfast("set", "p.b", "1", "--tag", "x", "--ttl", "2h")
    holdfast("set", "q", "1")
    holdfast("set", "p.gone", "1")
    holdfast("rm", "p.gone")
    assert keys_of(holdfast("ls", "--json").lines) == ["p.a", "p.b", "q"]
    assert keys_of(holdfast("ls", "p.", "--json").lines) == ["p.a", "p.b"]
    assert keys_of(holdfast("ls", "--tag", "x", "--tag", "y", "--json").lines) == ["p.a"]
    assert keys_of(holdfast("ls", "--session", "s1", "--json").lines) == ["p.a"]
    assert keys_of(holdfast("ls", "--agent", "planner", "--json").lines) == ["p.a"]
    assert keys_of(holdfast("ls", "--limit", "1", "--json").lines) == ["p.a"]
    table = holdfast("ls", "p.").out.splitlines()
    assert table[0].split()[:4] == ["key", "version", "op", "age"]
    assert "x, y" in table[1]
    assert " 119m" in table[2] or " 2h" in table[2]
    nothing = holdfast("ls", "nobody.")
    assert (nothing.out, nothing.err) == ("", "no named contexts\n")


def test_diff_shows_a_person_what_changed(holdfast: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    holdfast("set", "d", json.dumps({"goal": "fly", "steps": ["a", "b"], "note": "x"}))
    holdfast("set", "d", json.dumps({"goal": "swim", "steps": ["a", "b", "c"]}))
    operations = holdfast("diff", "d", "1", "2", "--json").lines
    assert {(line["op"], line["path"]) for line in operations} == {
        ("replace", "/goal"), ("add", "/steps/2"), ("remove", "/note")
    }  # fmt: skip
    lines = holdfast("diff", "d", "1", "2").out.splitlines()
    goal = lines.index("/goal")
    assert lines[goal + 1 : goal + 3] == ['  - "fly"', '  + "swim"']
    assert '  + "c"' in lines
    assert '  - "x"' in lines
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in holdfast("diff", "d", "1", "2").out
    monkeypatch.delenv("FORCE_COLOR")
    assert holdfast("diff", "d", "2", "2").err == "versions 2 and 2 of d have equal bodies\n"
    assert holdfast("diff", "d", "1", "9", "--json", status=4).error["code"] == "not_found"
    holdfast("set", "text", "one\ntwo\nthree")
    holdfast("set", "text", "one\n2\nthree")
    told = holdfast("diff", "text", "1", "2").out
    assert "  - two\n  + 2\n" in told


def test_sessions_of_the_context_manager_are_listed_shown_and_removed(
    holdfast: InProcess, running: Service, namespace: str
) -> None:
    identity = "user 4.2"
    with ContextManager(url=running.ready["nats_url"], namespace=namespace, agent="shop") as sessions:
        sessions.set_context(identity, "cart", ["book"])
        sessions.create_session("plain")
        holdfast("set", "session.no.session", "{}")
        listed = {line["session"]: line for line in holdfast("session", "list", "--json").lines}
        assert set(listed) == {identity, "plain"}
        assert listed[identity]["agent_id"] == "shop"
        shown = holdfast("session", "show", identity, "--json").json
        assert shown["session"] == identity
        assert shown["body"] == sessions.get_context(identity)
        assert '"book"' in holdfast("session", "show", identity).out
        assert identity in holdfast("session").out
        assert holdfast("session", "rm", identity, "--json").json["op"] == "delete"
        assert sessions.get_context(identity) == {}
    assert holdfast("session", "show", identity, "--json", status=4).error["field"] == "id"
    holdfast("session", "rm", identity, status=4)
    assert [line["session"] for line in holdfast("session", "--json").lines] == ["plain"]


def test_E32_a_body_is_encrypted_by_flag_and_by_policy(
    holdfast: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", "k1=" + "A" * 43 + "=")
    holdfast("set", "secret", '{"pin": 1234}', "--encrypt")
    assert holdfast("get", "secret", "--json").json["body"] == {"pin": 1234}
    holdfast("policy", "set", "safe.", "--encrypt")
    holdfast("set", "safe.a", "hidden")
    holdfast("set", "safe.b", "seen", "--plain")
    monkeypatch.delenv("HOLDFAST_KEYS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for key in ("secret", "safe.a"):
        error = holdfast("get", key, "--json", status=3).error
        assert (error["code"], error["details"]) == ("encryption_key", {"key_id": "k1"})
    assert holdfast("get", "safe.b", "--raw").raw == b"seen"


def test_watch_tells_each_change_and_goes_on_where_it_stopped(program: CommandLine, namespace: str) -> None:
    program("set", "w.a", "1")
    watching = program.start("watch", "w.", "--initial", "--json")
    try:
        first = watching.read_line()
        assert (first["key"], first["version"]) == ("w.a", 1)
        program("patch", "w.b", '{"n": 1}')
        assert (watching.read_line()["key"], watching.ready["op"]) == ("w.b", "patch")
        program("set", "other", "1")
        program("rm", "w.a")
        assert (watching.read_line()["key"], watching.ready["op"]) == ("w.a", "delete")
        assert watching.stop(signal.SIGTERM) == 0
        assert watching.err == ""
    finally:
        watching.kill()
    # What happened while nobody watched is told when it goes on.
    program("set", "w.c", "1")
    seen = program("watch", "w.", "--after", first["position"], "--count", "3", "--json").lines
    assert [(line["key"], line["version"], line["op"]) for line in seen] == [
        ("w.b", 1, "patch"), ("w.a", 2, "delete"), ("w.c", 1, "put")
    ]  # fmt: skip
    told = program("watch", "w.b", "--from-version", "1", "--count", "1").out
    assert "  w.b v1  patch  by cli  " in told


def test_watch_ends_quietly_at_ctrl_c(program: CommandLine) -> None:
    program("set", "i", "1")
    watching = program.start("watch", "--initial", "--json")
    try:
        watching.read_line()
        assert watching.stop(signal.SIGINT) == 0
        assert watching.err == ""
    finally:
        watching.kill()


def test_E01_E02_what_one_process_leaves_the_next_one_and_the_sdk_find(
    program: CommandLine, running: Service, namespace: str
) -> None:
    program("set", "state", '{"step": 1}', "--session", "s1")

    async def go_on() -> None:
        async with connect(running.ready["nats_url"], namespace, "another") as hf:
            value = await hf.keys.get("state")
            assert (value.body, value.session) == ({"step": 1}, "s1")
            await hf.keys.patch("state", {"step": 2})

    asyncio.run(go_on())
    after = program("get", "state", "--json").json
    assert (after["body"], after["session_id"], after["agent_id"]) == ({"step": 2}, "s1", "another")


def test_E02_E08_named_contexts_outlive_every_process(tmp_path: Path) -> None:
    """Without a running system each command has a server of its own on the data directory."""
    line = CommandLine(tmp_path / "data")
    line("set", "kept", '{"n": 1}')
    line("patch", "kept", '{"m": 2}')
    assert line("get", "kept", "--json").json["body"] == {"n": 1, "m": 2}
    assert [version["version"] for version in line("history", "kept", "--json").lines] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("set", "k"), "give the body as an argument, or with --file"),
        (("set", "k", "x", "--ttl", "soon"), "is not a duration"),
        (("set", "k", "x", "--ttl", "0s"), "expire at once"),
        (("set", "k", "x", "--expected-version", "-1"), "--expected-version"),
        (("patch", "k", "[1]"), "merge is not a JSON object"),
        (("patch", "k", "{nonsense"), "merge is not JSON"),
        (("append", "k", "text"), "item is not JSON"),
        (("get", "k", "--version", "1", "--as-of", "1h"), "both --version and --as-of"),
        (("get", "k", "--as-of", "yesterday"), "is not a time"),
        (("rollback", "k", "first"), "version"),
        (("watch", "k", "--after", "junk"), "is not a position"),
        (("watch", "k", "--from-version", "1", "--initial"), "give one of"),
        (("policy", "set", "p."), "the policy says nothing"),
        (("archive-old-versions", "0"), "greater than or equal to 1"),
    ],
)
def test_a_command_that_cannot_be_understood_is_told_in_one_line(
    holdfast: InProcess, arguments: tuple[str, ...], told: str
) -> None:
    outcome = holdfast(*arguments, status=2)
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert told in outcome.err
