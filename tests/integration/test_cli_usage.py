"""What the command line says of itself, and of a command that cannot be understood.  No server is started."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from holdfast.ops.cli import exit_codes
from tests.command_line import CommandLine, InProcess, in_process

COMMANDS = (
    "up", "worker", "demo", "import", "put", "resolve", "emit", "query", "sql", "flush", "evict", "stats", "health",
    "metrics",
    "dead", "verify", "config", "accept-gap", "get", "set", "patch", "append", "history", "diff", "rollback", "rm",
    "ls", "watch", "session", "policy", "cleanup", "archive-old-versions", "lineage", "migrate", "export", "warm",
    "checkpoint", "handler", "orchestration", "optimization", "job", "encryption", "backup", "restore", "backups",
)  # fmt: skip


@pytest.fixture
def holdfast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Generator[InProcess]:
    with in_process(tmp_path / "data", monkeypatch, capfdbinary) as commands:
        yield commands


def test_help_lists_the_commands_and_the_exit_statuses(holdfast: InProcess) -> None:
    text = holdfast("--help").out
    for command in COMMANDS:
        assert f" {command} " in text
    for code, meaning in exit_codes.MEANINGS:
        assert f"{code}  {meaning}" in text
    assert holdfast().out.split() == text.split()


def test_the_documents_say_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    for code, meaning in exit_codes.MEANINGS:
        assert f"| {code} | {meaning} |" in page
    for command in COMMANDS:
        assert f"`{command}" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_examples(holdfast: InProcess, command: str) -> None:
    text = holdfast(command, "--help").out
    assert "Examples:" in text
    assert f"holdfast {command}" in text
    assert "--json" in text


def test_version(holdfast: InProcess) -> None:
    assert holdfast("--version").out.startswith("holdfast 0.")


def test_the_program_is_the_same(tmp_path: Path) -> None:
    line = CommandLine(tmp_path / "data")
    assert line("--version").out.startswith("holdfast 0.")
    assert line("putt", status=2).err.startswith("error: no such command")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("putt",), "no such command 'putt'"),
        (("evict",), "missing option '--older-than'"),
        (("evict", "--older-than", "soon"), "is not a duration"),
        (("put",), "give the body as an argument, or with --file"),
        (("put", "x", "--file", "y"), "give the body as an argument, or with --file"),
        (("worker", "nobody"), "there is no worker 'nobody'"),
        (("emit", "a:b", "{nonsense"), "data is not JSON"),
        (("emit", "a:b", "--context", "junk"), "is not a reference"),
        (("query", "--since", "yesterday"), "is not a time"),
        (("query", "--limit", "0"), "--limit"),
        (("sql", "SELECT 1", "--format", "xml"), "--format"),
        (("import", "/nowhere", "--format", "xml"), "there is no trace format"),
    ],
)
def test_a_command_that_cannot_be_understood_is_told_in_one_line(
    holdfast: InProcess, arguments: tuple[str, ...], told: str
) -> None:
    outcome = holdfast(*arguments, status=2)
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    assert told in outcome.err
    assert told in holdfast(*arguments, "--json", status=2).error["message"]
    assert not holdfast.data.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("put", "--file", "/nowhere/at/all"), 4, "not_found"),
        (("import", "/nowhere/at/all"), 4, "not_found"),
        (("stats", "--config", "/nowhere.toml"), 3, "configuration"),
        (("stats", "--namespace", "n" * 65), 3, "configuration"),
        (("stats", "--nats-url", "http://host"), 3, "configuration"),
        (("worker", "archiver"), 3, "configuration"),
        (("put", "x", "--kind", "no kind"), 2, "invalid_name"),
    ],
)
def test_errors_have_a_code_and_a_status(
    holdfast: InProcess, arguments: tuple[str, ...], status: int, code: str
) -> None:
    assert holdfast(*arguments, "--json", status=status).error["code"] == code


def test_an_unknown_variable_is_named(holdfast: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_PROT", "4222")
    error = holdfast("config", "--json", status=3).error
    assert "prot" in error["message"]
    assert "HOLDFAST_PORT" in error["hint"]
