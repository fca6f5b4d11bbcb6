"""Finding traces: formats told from content and name, directories walked, errors that name the path."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from holdfast.ops.traces import Format, Malformed, Source, Step, detect, find_traces, read_file, read_path
from holdfast.ops.traces.detect import first_keys
from holdfast.schemas.errors import InvalidFieldError, NotFoundError
from tests.unit.traces_samples import claude_code_lines, jsonl, mini_swe_agent_run, packed, samples, step_lines

SAMPLES = [pytest.param(*sample[:2], id=f"{number}-{sample[0]}") for number, sample in enumerate(samples())]
SESSIONS = jsonl([{"session_id": "s", "source_file": "x", "n_steps": 3, "model": "m"}])


@pytest.mark.parametrize(("source_format", "raw"), SAMPLES)
def test_formats_are_told_from_content_alone(source_format: Format, raw: bytes) -> None:
    assert detect(Source.of_bytes(raw)) == source_format
    assert detect(Source.of_bytes(packed(raw))) == source_format
    assert detect(Source.of_bytes(b"\xef\xbb\xbf\r\n " + raw)) == source_format


def test_a_damaged_first_line_does_not_hide_the_format() -> None:
    assert detect(Source.of_bytes(b'{"broken\n' + jsonl(step_lines(1, 1)))) == "steps"
    assert detect(Source.of_bytes(b"junk\n" + jsonl(claude_code_lines(1)))) == "claude-code"


def test_the_name_decides_where_the_content_does_not() -> None:
    assert detect(Source.of_bytes(b"?", "a/b.steps.jsonl.gz")) == "steps"
    assert detect(Source.of_bytes(b"?", "a/b.traj.json")) == "mini-swe-agent"
    assert detect(Source.of_bytes(b"?", "a/b.sessions.jsonl")) == "sessions"
    assert detect(Source.of_bytes(b"?", "a/b.jsonl")) is None


def test_the_content_goes_before_the_name() -> None:
    assert detect(Source.of_bytes(jsonl(claude_code_lines(1)), "a.sessions.jsonl")) == "claude-code"


def test_a_format_is_told_behind_a_long_first_member() -> None:
    run = {"info": {"config": "x" * 1_000_000}} | {
        key: value for key, value in mini_swe_agent_run(1).items() if key != "info"
    }

    assert detect(Source.of_bytes(json.dumps(run).encode())) == "mini-swe-agent"


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        (b'{"a": {"b": 1}, "c": [{"d": 1}], "e', {"a", "c"}),
        (b'[ {"a": 1, "b": "x"}, {"c": 1}]', {"a", "b"}),
        (b'{"a": "{\\"b\\": 1", "c" : 2}', {"a", "c"}),
        (b'{"a": 1}\n{"b": 1}', {"a"}),
        (b'[[{"a": 1}]]', set()),
        (b"[1, 2]", set()),
        (b'"a": 1', set()),
        (b"", set()),
        (b"}{", set()),
    ],
)
def test_first_keys(head: bytes, keys: set[str]) -> None:
    assert first_keys(head) == keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "b/run.steps.jsonl.gz": packed(jsonl(step_lines(1, 1))),
        "b/run.sessions.jsonl.gz": packed(SESSIONS),
        "a/claude.jsonl": jsonl(claude_code_lines(1)),
        "a/subagents/agent-1.jsonl": jsonl(claude_code_lines(2)),
        "a/subagents/agent-1.meta.json": b'{"agentType": "x", "toolUseId": "t"}',
        "c.traj.json": json.dumps(mini_swe_agent_run(1)).encode(),
        "LICENSE": b"MIT",
        "outcomes.csv": b"a,b\n",
        "MANIFEST.sha256": b"00  x\n",
        "stats.json": b'{"sessions": 1}',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_directories_are_walked_in_order_and_other_files_are_counted(folder: Path) -> None:
    found = find_traces([folder])

    assert [(str(file.path.relative_to(folder)), file.format) for file in found.files] == [
        ("c.traj.json", "mini-swe-agent"),
        ("a/claude.jsonl", "claude-code"),
        ("a/subagents/agent-1.jsonl", "claude-code"),
        ("b/run.steps.jsonl.gz", "steps"),
    ]
    assert len(found.skipped) == 6
    assert found.files[0].size_bytes == (folder / "c.traj.json").stat().st_size


def test_a_file_reached_twice_is_read_once(folder: Path) -> None:
    (folder / "link.jsonl").symlink_to(folder / "a" / "claude.jsonl")

    assert len(find_traces([folder, folder / "a", folder / "b" / "run.steps.jsonl.gz"]).files) == 4


def test_summaries_of_sessions_are_passed_over_even_when_named(folder: Path) -> None:
    found = find_traces([folder / "b" / "run.sessions.jsonl.gz"], "steps")

    assert (found.files, len(found.skipped)) == ([], 1)


def test_a_named_file_of_no_known_format_is_reported(folder: Path) -> None:
    [record] = read_path(folder / "stats.json")

    assert isinstance(record, Malformed)
    assert record.path.endswith("stats.json")
    assert "name its format" in record.reason


def test_a_forced_format_goes_for_every_file(folder: Path) -> None:
    found = find_traces([folder], "steps")

    assert {file.format for file in found.files} == {"steps"}
    assert len(found.files) == 6
    by_file = {file.path.name: list(read_file(file)) for file in found.files}
    assert all(isinstance(record, Step) for record in by_file.pop("run.steps.jsonl.gz"))
    assert all(isinstance(record, Malformed) for records in by_file.values() for record in records)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.jsonl") as raised:
        find_traces([tmp_path / "gone.jsonl"])
    assert raised.value.field == "path"


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0", "\ud800"])
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidFieldError) as raised:
        find_traces([tmp_path / name])
    assert raised.value.field == "path"


def test_a_path_that_is_no_file_is_refused_and_passed_over_in_a_directory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InvalidFieldError, match=r"pipe\.jsonl"):
        find_traces([tmp_path / "pipe.jsonl"])

    assert find_traces([tmp_path]).files == []


def test_a_format_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError, match="claude-code"):
        find_traces([tmp_path], "xml")


def test_a_file_that_may_not_be_read_is_no_error_until_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.steps.jsonl"
    path.write_bytes(jsonl(step_lines(1, 1)))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")

    [record] = read_path(path)

    assert isinstance(record, Malformed)
