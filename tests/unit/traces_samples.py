"""Small made-up traces in every format, and where the recorded ones lie.

Each generator is a pure function of its arguments, so that a test may compare what two files of one content give.
"""

from __future__ import annotations

import gzip
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.ops.traces import Format, Malformed, Record, Source, Step, read_source

JsonObject = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[2]
SESSION = "5f0c0a52-6c6a-4c0e-9a43-0d7c0a5f3b11"


def recorded() -> Path:
    """Returns the folder of the recorded traces; skips the test where there is none."""
    named = os.environ.get("HOLDFAST_TEST_DATA")
    folder = Path(named) if named else _ROOT.parent / "shared" / "data"
    if not (folder / "steps").is_dir():
        pytest.skip("no recorded traces: set HOLDFAST_TEST_DATA to their folder")
    return folder


def read(raw: bytes, source_format: Format) -> list[Record]:
    return list(read_source(Source.of_bytes(raw, "sample"), source_format))


def steps_of(records: Iterable[Record]) -> list[Step]:
    return [record for record in records if isinstance(record, Step)]


def malformed_of(records: Iterable[Record]) -> list[Malformed]:
    return [record for record in records if isinstance(record, Malformed)]


def jsonl(records: Iterable[object]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def packed(raw: bytes) -> bytes:
    return gzip.compress(raw, mtime=0)


def chat(turns: int, seed: int = 0) -> list[JsonObject]:
    """Returns a conversation in which each turn is a question, a tool call, its result and an answer."""
    messages: list[JsonObject] = [{"role": "system", "content": f"# Airline Agent Policy\n\nBe brief. ({seed})"}]
    for turn in range(turns):
        call = f"call_{seed}_{turn}"
        function = {"name": "look_up", "arguments": json.dumps({"turn": turn})}
        messages += [
            {"role": "user", "content": f'question {turn}: a "quoted" \\ thing, [brackets] {{and}} ünïcode'},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": call, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call, "name": "look_up", "content": f"result {turn}"},
            {"role": "assistant", "content": f"answer {turn}"},
        ]
    return messages


def step_lines(sessions: int, turns: int) -> list[JsonObject]:
    """Returns the lines of a ``steps`` file."""
    lines: list[JsonObject] = []
    for session in range(sessions):
        for seq, message in enumerate(chat(turns, session)):
            line: JsonObject = {"session_id": f"session-{session}", "seq": seq, **message}
            if seq:
                source = "tool_call_id" if message["role"] == "tool" else "order"
                line |= {"caused_by": seq - 1, "caused_by_source": source}
            if message["role"] == "assistant":
                line["ts"] = f"2026-01-31T09:{seq // 60:02}:{seq % 60:02}Z"
            lines.append(line)
    return lines


def tau_bench_runs(runs: int, turns: int) -> list[JsonObject]:
    return [
        {"task_id": run // 2, "reward": 1.0, "info": {"task": {}}, "traj": chat(turns, run), "trial": run % 2}
        for run in range(runs)
    ]


def mini_swe_agent_run(turns: int) -> JsonObject:
    messages: list[JsonObject] = [
        {"role": "system", "content": "You have a shell."},
        {"role": "user", "content": "Mend the bug."},
    ]
    for turn in range(turns):
        response = {"created": 1_763_511_061 + turn, "usage": {"total_tokens": turn}}
        messages += [
            {"role": "assistant", "content": f"```bash\nls {turn}\n```", "extra": {"response": response}},
            {"role": "user", "content": f"<output>{turn}</output>"},
        ]
    return {
        "info": {"exit_status": "Submitted"},
        "messages": messages,
        "trajectory_format": "mini-swe-agent-1",
        "instance_id": "made__up-1",
    }


def claude_code_uuid(number: int) -> str:
    return str(uuid.UUID(int=0x4000_8000_0000_0000_0000 + number))


def claude_code_line(number: int, parent: int | None, line_type: str, **more: object) -> JsonObject:
    return {
        "parentUuid": None if parent is None else claude_code_uuid(parent),
        "isSidechain": False,
        "sessionId": SESSION,
        "version": "2.1.0",
        "cwd": "/home/someone/project",
        "type": line_type,
        "uuid": claude_code_uuid(number),
        "timestamp": f"2026-01-31T09:30:00.{number:03}Z",
    } | more


def claude_code_lines(turns: int) -> list[JsonObject]:
    """Returns a transcript with two parallel tool calls a turn, and with lines of bookkeeping."""
    lines: list[JsonObject] = [
        {"type": "summary", "summary": "A title", "leafUuid": claude_code_uuid(1)},
        {"type": "file-history-snapshot", "messageId": claude_code_uuid(0), "snapshot": {}, "isSnapshotUpdate": False},
    ]
    last: int | None = None
    number = 0
    for turn in range(turns):
        calls = [f"toolu_{turn}_{place}" for place in range(2)]
        uses = [{"type": "tool_use", "id": call, "name": "Bash", "input": {}} for call in calls]
        results = [{"type": "tool_result", "tool_use_id": call, "content": "done"} for call in calls]
        lines += [
            claude_code_line(number, last, "user", message={"role": "user", "content": f"do {turn}"}),
            {"type": "queue-operation", "operation": "enqueue", "sessionId": SESSION, "content": "more"},
            claude_code_line(number + 1, number, "assistant", message={"role": "assistant", "content": [uses[0]]}),
            claude_code_line(number + 2, number + 1, "assistant", message={"role": "assistant", "content": [uses[1]]}),
            claude_code_line(number + 3, number + 2, "user", message={"role": "user", "content": [results[0]]}),
            claude_code_line(number + 4, number + 3, "user", message={"role": "user", "content": [results[1]]}),
            claude_code_line(number + 5, number + 4, "system", subtype="turn_duration", durationMs=5),
        ]
        last = number + 5
        number += 6
    return lines


def samples(turns: int = 2) -> Iterator[tuple[Format, bytes, int]]:
    """Yields a well-formed file of every format and shape, with the number of its steps."""
    messages = 1 + 4 * turns
    yield "steps", jsonl(step_lines(2, turns)), 2 * messages
    yield "tau-bench", json.dumps(tau_bench_runs(3, turns), indent=2).encode(), 3 * messages
    yield "tau-bench", json.dumps(tau_bench_runs(3, turns)).encode(), 3 * messages
    yield "mini-swe-agent", json.dumps(mini_swe_agent_run(turns), indent=2).encode(), 2 + 2 * turns
    yield "openai-messages", json.dumps(chat(turns), indent=1).encode(), messages
    yield "openai-messages", jsonl(chat(turns)), messages
    yield "openai-messages", jsonl({"messages": chat(turns, seed)} for seed in range(3)), 3 * messages
    yield "openai-messages", json.dumps({"messages": chat(turns)}, indent=2).encode(), messages
    yield "claude-code", jsonl(claude_code_lines(turns)), 6 * turns
