"""Commands against a system that runs: the contracts of their ``--json``, their exit statuses, their errors."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from holdfast.schemas.refs import compute_digest
from tests.command_line import MODULE, CommandLine, InProcess, Service, in_process
from tests.support import plain_client

UNKNOWN = "ctx_plan_" + "a" * 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("running") / "data"


@pytest.fixture(scope="module")
def running(directory: Path) -> Generator[Service]:
    # Archiving happens when a test asks for it, and then only.
    line = CommandLine(directory, HOLDFAST_ARCHIVE_INTERVAL_S="3600")
    with line.up() as service:
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


def test_up_says_where_it_serves(running: Service, directory: Path) -> None:
    assert running.ready == {"ready": True, "nats_url": running.ready["nats_url"], "data": str(directory)}
    assert running.ready["nats_url"].startswith("nats://127.0.0.1:")


def test_put_prints_the_reference_that_any_language_computes(holdfast: InProcess, namespace: str) -> None:
    ref = holdfast("put", '{"goal": "fly"}', "--kind", "plan", "--json").json["ref"]
    digest = compute_digest(namespace, "plan", b'{"goal": "fly"}')
    assert ref == f"ctx_plan_{digest}"
    assert holdfast("put", '{"goal": "fly"}', "-k", "plan").out == f"{ref}\n"


def test_resolve_gives_the_contract_and_the_exact_bytes(holdfast: InProcess, tmp_path: Path) -> None:
    body = b'{"n": 1.10,\n "text": "gr\xc3\xbc\xc3\x9fe"}'
    path = tmp_path / "body.json"
    path.write_bytes(body)
    ref = holdfast("put", "--file", str(path), "--json").json["ref"]
    context = holdfast("resolve", ref, "--json").json
    assert list(context) == ["ref", "kind", "body", "tier", "size", "created_at"]
    assert context["body"] == {"n": 1.10, "text": "grüße"}
    assert (context["ref"], context["kind"], context["tier"], context["size"]) == (ref, "context", "hot", len(body))
    assert holdfast("resolve", ref, "--raw").raw == body


def test_bytes_of_any_kind_come_back_from_standard_input(program: CommandLine) -> None:
    body = bytes(range(256)) * 5_000  # chunked: over 512 KiB
    ref = program("put", "-", "--json", stdin=body).json["ref"]
    assert program("resolve", ref, "--raw").raw == body


def test_unknown_references_are_named_and_the_rest_is_printed(holdfast: InProcess) -> None:
    ref = holdfast("put", "text").out.strip()
    outcome = holdfast("resolve", UNKNOWN, ref, "--json", status=4)
    assert outcome.json["body"] == "text"
    assert outcome.error["code"] == "not_found"
    assert UNKNOWN in outcome.error["message"]
    assert UNKNOWN in holdfast("resolve", UNKNOWN, status=4).err


def test_what_is_no_reference_is_a_usage_error(holdfast: InProcess) -> None:
    ref = holdfast("put", "text").out.strip()
    outcome = holdfast("resolve", "junk", ref, status=2)
    assert "'junk' is not a reference" in outcome.err
    assert "text" in outcome.out


def test_references_are_read_from_standard_input(holdfast: InProcess) -> None:
    refs = [holdfast("put", f"text {number}").out.strip() for number in range(3)]
    outcome = holdfast("resolve", "-", "--json", stdin="\n".join(refs).encode())
    assert [line["body"] for line in outcome.lines] == ["text 0", "text 1", "text 2"]


def test_events_are_emitted_and_found(holdfast: InProcess) -> None:
    ref = holdfast("put", '{"plan": 1}', "-k", "plan").out.strip()
    first = holdfast(
        "emit", "plan:made", '{"n": 1}', "--context", ref, "--session", "s1", "--agent", "planner", "--json"
    ).json  # fmt: skip
    assert first["context_ref"] == ref
    second = holdfast("emit", "plan:checked", "--parent", first["event_id"], "--json").json
    assert (second["session_id"], second["parent_event_id"], second["event_depth"]) == ("s1", first["event_id"], 1)
    assert second["root_event_id"] == first["event_id"]
    found = holdfast("query", "--session", "s1", "--json").lines
    assert [event["event_id"] for event in found] == [first["event_id"], second["event_id"]]
    assert found[0]["data"] == {"n": 1}
    assert len(holdfast("query", "--kind", "plan", "--json").lines) == 1
    assert len(holdfast("query", "--agent", "cli", "--since", "1h", "--json").lines) == 1
    assert not holdfast("query", "--until", "1h", "--json").lines
    table = holdfast("query", "--session", "s1").out
    assert "plan:made" in table
    assert ref in table


def test_the_same_event_id_is_stored_once(holdfast: InProcess) -> None:
    for _ in range(2):
        holdfast("emit", "a:b", "--id", "order-17", "--session", "once")
    (event,) = holdfast("query", "--session", "once", "--json").lines
    assert event["source_id"] == "order-17"


def test_a_parent_that_there_is_none_of_is_not_found(holdfast: InProcess) -> None:
    outcome = holdfast("emit", "a:b", "--parent", "nobody", "--json", status=4)
    assert outcome.error["field"] == "parent"


@pytest.mark.slow
def test_flush_evict_stats_and_the_lake(holdfast: InProcess, namespace: str) -> None:
    refs = [holdfast("put", f"cold {number}").out.strip() for number in range(2)]
    holdfast("emit", "a:b", "--context", refs[0])
    live = f"SELECT count(*) AS n FROM contexts WHERE namespace = '{namespace}'"
    assert holdfast("sql", live, "--live", "--json").json == {"n": 2}
    assert holdfast("stats", "--json").json["events"]["unarchived"] >= 1

    flushed = holdfast("flush", "--json").json
    assert set(flushed) == {"rows", "watermarks", "seconds"}
    assert set(flushed["rows"]) == {"contexts", "events", "key_versions"}
    evicted = holdfast("evict", "--older-than", "0s", "--json").json
    assert evicted["purged"] >= 2
    assert evicted["left"] == 0

    stats = holdfast("stats", "--json").json
    assert set(stats) == {"hot", "contexts", "events", "keys", "lake", "watermarks", "handlers", "dead", "scrub"}
    assert stats["hot"] == {"contexts": 0, "bytes": stats["hot"]["bytes"]}
    assert stats["events"]["unarchived"] == 0
    assert set(stats["lake"]) == {"contexts", "events", "key_versions", "bytes", "files"}
    assert "lake contexts" in holdfast("stats").out
    assert holdfast("resolve", refs[1], "--json").json["tier"] == "lake"
    assert holdfast("sql", live, "--json").json == {"n": 2}
    assert holdfast("sql", live, "--live", "--json").json == {"n": 2}


def test_sql_has_three_forms(holdfast: InProcess) -> None:
    query = "SELECT 1 AS a, 'x,y' AS b, NULL AS c, [1, 2] AS d, TIMESTAMP '2026-01-31 09:30:00' AS e"
    row = {"a": 1, "b": "x,y", "c": None, "d": [1, 2], "e": "2026-01-31T09:30:00"}
    holdfast("flush")  # there is a lake
    assert holdfast("sql", query, "--json").json == row
    assert holdfast("sql", query, "--format", "json").json == row
    assert holdfast("sql", "-", "--format", "csv", stdin=query.encode()).out == (
        'a,b,c,d,e\n1,"x,y",,"[1,2]",2026-01-31 09:30:00\n'
    )
    assert "x,y" in holdfast("sql", query).out


def test_a_query_that_fails_says_why(holdfast: InProcess) -> None:
    holdfast("flush")
    error = holdfast("sql", "SELECT nothing FROM nowhere", "--json", status=2).error
    assert error["field"] == "query"
    assert "nowhere" in error["message"]


def test_health_is_ok_while_all_runs(holdfast: InProcess) -> None:
    answer = holdfast("health", "--json").json
    assert answer["ok"] is True
    assert answer["problems"] == []
    assert holdfast("health").out == "ok\n"


def test_verify_counts_what_it_checked(holdfast: InProcess) -> None:
    ref = holdfast("put", "checked").out.strip()
    holdfast("emit", "a:b", "--context", ref)
    holdfast("flush")
    report = holdfast("verify", "--json").json
    assert set(report) == {"ok", "checked", "violations"}
    assert report["ok"] is True
    assert report["violations"] == []
    assert report["checked"]["archived_positions"] >= 1
    assert report["checked"]["refs"] >= 1
    assert "ok: no violation" in holdfast("verify").out


def test_a_message_that_is_no_event_is_a_dead_letter(holdfast: InProcess, running: Service, namespace: str) -> None:
    async def publish() -> None:
        async with plain_client(running.ready["nats_url"]) as client:
            await client.jetstream().publish(f"ctx.{namespace}.event.agent.bad", b'{"data": NaN}')

    asyncio.run(publish())
    holdfast("flush")
    letters = [letter for letter in holdfast("dead", "--json").lines if namespace in letter["subject"]]
    (letter,) = letters
    assert {"seq", "stream", "origin_seq", "code", "reason", "died_at", "size"} <= set(letter)
    shown = holdfast("dead", "show", str(letter["seq"]), "--json").json
    assert shown["payload"] == '{"data": NaN}'
    assert holdfast("dead", "show", str(letter["seq"]), "--raw").raw == b'{"data": NaN}'
    assert "NaN" in holdfast("dead", "show", str(letter["seq"])).out
    assert holdfast("dead", "show", "999999", "--json", status=4).error["code"] == "not_found"
    # It is no event, so it is not archived; it is kept, so nothing is broken.
    assert holdfast("verify", "--json").json["ok"] is True


def test_a_reference_to_nothing_is_a_violation(tmp_path: Path) -> None:
    line = CommandLine(tmp_path / "data")
    line("emit", "a:b", "--context", UNKNOWN)
    report = line("verify", "--json", status=5).json
    assert report["ok"] is False
    (violation,) = report["violations"]
    assert violation["invariant"] == "I1"
    assert UNKNOWN in violation["what"]
    assert violation["next_step"]
    assert UNKNOWN in line("verify", status=5).out


def test_accept_gap_has_nothing_to_give_up(holdfast: InProcess) -> None:
    assert holdfast("accept-gap", "events", "--json").json["from"] is None
    assert holdfast("accept-gap", "nonsense", "--json", status=2).error["field"] == "table"


def test_global_options_stand_before_or_after_the_command(holdfast: InProcess) -> None:
    ref = holdfast("put", "--json", "same", "--namespace", "elsewhere").json["ref"]
    assert holdfast("--namespace", "elsewhere", "--json", "resolve", ref).json["body"] == "same"
    holdfast("resolve", ref, status=4)
    # After is stronger than before.
    assert holdfast("--namespace", "nowhere", "resolve", ref, "--namespace", "elsewhere", "--raw").raw == b"same"


def test_a_second_up_on_the_same_data_is_refused(holdfast: InProcess) -> None:
    error = holdfast("up", "--json", status=3).error
    assert error["code"] == "data_directory"
    assert "in use" in error["message"]


def test_output_that_nobody_reads_ends_the_command_quietly(program: CommandLine) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*MODULE, "config", "--json"], stdout=writer, stderr=subprocess.PIPE, env=program.environment, check=False
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""


def test_config_names_the_source_of_each_setting(holdfast: InProcess, namespace: str) -> None:
    lines = {line["name"]: line for line in holdfast("config", "--json").lines}
    assert set(lines["namespace"]) == {"name", "value", "source", "description"}
    assert (lines["namespace"]["value"], lines["namespace"]["source"]) == (namespace, "HOLDFAST_NAMESPACE")
    masked = holdfast("config", "--nats-url", "nats://me:secret@host:4222").out
    assert "secret" not in masked
    assert "***@host" in masked


def test_json_of_every_command_is_json(holdfast: InProcess) -> None:
    for arguments in (("dead",), ("config",), ("query",), ("stats",), ("health",)):
        for line in holdfast(*arguments, "--json").raw.splitlines():
            json.loads(line)
