"""Bad trace files: each fault is reported with file and line, the rest is read, nothing raises."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.ops.traces import FORMATS, Format, Malformed, Source, Step, TraceFile, read_file, step_event
from holdfast.ops.traces.elements import read_elements
from holdfast.ops.traces.records import CONTAINERS
from holdfast.ops.traces.sources import LINE_BYTES, read_lines
from tests.unit.traces_samples import (
    claude_code_line,
    jsonl,
    malformed_of,
    mini_swe_agent_run,
    packed,
    read,
    samples,
    step_lines,
    steps_of,
    tau_bench_runs,
)

GOOD = b'{"session_id":"s","seq":0,"role":"user","content":"good"}\n'
SAMPLES = list(samples(1))


def one_bad_line(bad: bytes) -> tuple[int, int, str]:
    records = read(GOOD + bad + b"\n" + GOOD.replace(b":0", b":1"), "steps")
    [malformed] = malformed_of(records)
    return len(steps_of(records)), malformed.line, malformed.reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\xff\xfe{}", "not JSON"),
        (b'{"session_id":"s","seq":1,"role":"user","content":"\xff"}', "not UTF-8"),
        (b'{"session_id":"s","seq":1,"role":"user","content":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"session_id":"s","seq":1,"role":"user","content":"\\ud800"}', "not JSON"),
        (b'{"session_id":"s","seq":1,"role":"user","content":NaN}', "not JSON"),
        (b'{"session_id":"s","seq":1,"role":"user","content":1e999}', "not JSON"),
        (b'{"session_id":"s","seq":1,"role":"user","content":' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"session_id":"s","seq":1,"role":"user","content":"cut', "not JSON"),
        (b'{"session_id":"s","seq":1,"role":"user","content":"\0"}', "not JSON"),
        (b'{"session_id":"s","seq":1,"role":"user","content":' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper"),
        (b'{"session_id":"s","seq":1,"role":"user","content":' + b"[" * 9999 + b"]" * 9999 + b"}", "nested deeper"),
        (b"[" * 1_000_000, "nested deeper"),
        (b'["session_id"]', "an array"),
        (b"null", "null"),
        (b"17", "a number"),
        (b'{"seq":1,"role":"user"}', "session_id is missing"),
        (b'{"session_id":5,"seq":1,"role":"user"}', "session_id is a number"),
        (b'{"session_id":"","seq":1,"role":"user"}', "session id has 0"),
        (b'{"session_id":"' + b"s" * 257 + b'","seq":1,"role":"user"}', "session id has 257"),
        (b'{"session_id":"s","role":"user"}', "seq is missing"),
        (b'{"session_id":"s","seq":true,"role":"user"}', "seq is True"),
        (b'{"session_id":"s","seq":-1,"role":"user"}', "seq is -1"),
        (b'{"session_id":"s","seq":1.0,"role":"user"}', "seq is 1.0"),
        (b'{"session_id":"s","seq":1}', "role is missing"),
        (b'{"session_id":"s","seq":1,"role":["user"]}', "role is an array"),
        (b'{"session_id":"s","seq":1,"role":"two words"}', "kind"),
        (b'{"session_id":"s","seq":1,"role":"user","kind":"a.b"}', "kind"),
        (b'{"session_id":"s","seq":1,"role":"user","ts":5}', "ts is a number"),
        (b'{"session_id":"s","seq":1,"role":"user","ts":"yesterday"}', "ts 'yesterday'"),
        (b'{"session_id":"s","seq":1,"role":"user","caused_by":"0"}', "caused_by is '0'"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
def test_a_bad_line_costs_that_line_alone(bad: bytes, reason: str) -> None:
    good, line, said = one_bad_line(bad)

    assert (good, line) == (2, 2)
    assert said.startswith(reason) or reason in said


def test_nesting_of_64_is_read() -> None:
    raw = b'{"session_id":"s","seq":0,"role":"user","content":' + b"[" * 63 + b"]" * 63 + b"}"

    assert malformed_of(read(raw, "steps")) == []


def test_a_byte_order_mark_carriage_returns_and_blank_lines_are_no_fault() -> None:
    raw = jsonl(step_lines(1, 2))

    assert read(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\r\n"), "steps") == read(raw, "steps")


@pytest.mark.parametrize("source_format", FORMATS)
@pytest.mark.parametrize("raw", [b"", b" \r\n\n", b"\xef\xbb\xbf", packed(b"")])
def test_an_empty_file_is_reported(source_format: Format, raw: bytes) -> None:
    assert read(raw, source_format) == [Malformed("sample", 1, "the file is empty")]


def test_a_line_over_the_limit_is_passed_over_without_being_held() -> None:
    def pieces() -> Iterator[bytes]:
        yield GOOD
        yield from (b"x" * (1 << 20) for _ in range(100))
        yield b"\n" + GOOD

    class Long(Source):
        def chunks(self) -> Iterator[bytes]:
            return pieces()

    tracemalloc.start()
    try:
        first, bad, last = read_lines(Long.of_bytes(b"", "long"))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert isinstance(first, tuple)
    assert isinstance(last, tuple)
    assert last[0] == 3
    assert bad == Malformed("long", 2, f"the line has {100 << 20} bytes, the limit is {LINE_BYTES}")
    assert peak_bytes < LINE_BYTES + (8 << 20)


def test_a_body_over_the_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.schemas.limits.BODY_BYTES", 1000)
    good, line, reason = one_bad_line(b'{"session_id":"s","seq":1,"role":"user","content":"' + b"x" * 1000 + b'"}')

    assert (good, line) == (2, 2)
    assert "the limit is 1000" in reason


def test_more_arrays_than_the_limit_are_reported_but_brackets_in_text_are_not_counted() -> None:
    many = b"[]," * (CONTAINERS + 1)
    line = b'{"session_id":"s","seq":0,"role":"user","content":%s}'

    [bad] = read(line % (b"[" + many + b"0]"), "steps")
    [good] = read(line % (b'"\\"' + many + b'"'), "steps")

    assert isinstance(bad, Malformed)
    assert "arrays and objects" in bad.reason
    assert isinstance(good, Step)


def test_elements_over_the_limit_are_passed_over() -> None:
    elements = [{"a": 1}, {"b": "\\" * 500}, {"c": [1, {"d": "]"}]}]
    source = Source.of_bytes(json.dumps(elements, indent=1).encode(), "long")

    first, bad, last = read_elements(source, limit_bytes=100)

    assert isinstance(first, tuple)
    assert isinstance(bad, Malformed)
    assert bad.line == 4
    assert isinstance(last, tuple)
    assert last[0] == 8
    assert json.loads(last[1]) == elements[2]


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_elements_do_not_depend_on_how_the_file_is_cut_into_pieces(step: int) -> None:
    text = b'[ {"a": "x\\\\"} ,\n{"b": "\\"}]{,"}, 5, "s,\\\\" ,\n [1, [2]] ]\n {"after": 1}{"c": {}} tail'

    class Cut(Source):
        def chunks(self) -> Iterator[bytes]:
            return (text[at : at + step] for at in range(0, len(text), step))

    expected = [
        (1, b'{"a": "x\\\\"}'), (2, b'{"b": "\\"}]{,"}'), (2, b"5"), (2, b'"s,\\\\"'), (3, b"[1, [2]]"),
        (4, b'{"after": 1}'), (4, b'{"c": {}}'), (4, b"tail"),
    ]  # fmt: skip
    assert list(read_elements(Source.of_bytes(text))) == expected
    assert list(read_elements(Cut.of_bytes(b""))) == expected


def test_an_element_missing_at_a_comma_is_reported_and_the_rest_is_read() -> None:
    run = json.dumps(tau_bench_runs(1, 1)[0]).encode()

    for raw, good in ((b"[" + run + b",,\n" + run + b"]", 10), (b"[" + run + b",]", 5)):
        records = read(raw, "tau-bench")
        assert len(steps_of(records)) == good
        assert [bad.reason for bad in malformed_of(records)] == ["an element is missing at a comma"]


def test_a_broken_run_costs_that_run_and_a_broken_message_that_message() -> None:
    runs = tau_bench_runs(4, 1)
    runs[0]["traj"] = "none"
    runs[1]["traj"][2] = ["not a message"]
    raw = json.dumps(runs).encode().replace(b'"task_id": 1', b'"task_id": nope', 1)

    records = read(raw, "tau-bench")

    assert len(steps_of(records)) == 4 + 5
    assert [bad.reason.partition(":")[0] for bad in malformed_of(records)] == [
        "not JSON of the format", "message 2", "not JSON of the format"
    ]  # fmt: skip


def test_malformed_elements_carry_the_line_they_begin_on() -> None:
    raw = b'[\n{"task_id": 1,\n "trial": 0, "traj": []},\n\n{"task_id": 2}\n]'

    [bad] = malformed_of(read(raw, "tau-bench"))

    assert bad.line == 5


@pytest.mark.parametrize(
    "bad",
    [
        {"uuid": "u"},
        {"type": 5, "uuid": "u"},
        {"type": "user", "uuid": 5},
        claude_code_line(1, None, "user"),
        claude_code_line(1, None, "user", message="hello"),
        claude_code_line(1, None, "user", message={}, sessionId=None),
        claude_code_line(1, None, "user", message={}, parentUuid=["u"]),
        claude_code_line(1, None, "user", message={}, timestamp=1),
        claude_code_line(1, None, "user", message={}, isSidechain=True, agentId={}),
    ],
)
def test_a_bad_line_of_claude_code_costs_that_line_alone(bad: dict[str, object]) -> None:
    good = [claude_code_line(number, None, "user", message={"content": "x"}) for number in (0, 2)]
    records = read(jsonl([good[0], bad, good[1]]), "claude-code")

    assert len(steps_of(records)) == 2
    assert [record.line for record in malformed_of(records)] == [2]


@pytest.mark.parametrize("source_format", FORMATS)
def test_a_format_forced_on_another_formats_file_is_reported(source_format: Format) -> None:
    for other, raw, _ in SAMPLES:
        # Runs of mini-swe-agent hold "messages", which is all that the chat format asks for.
        if other == source_format or (other, source_format) == ("mini-swe-agent", "openai-messages"):
            continue
        if {other, source_format} == {"openai-messages", "mini-swe-agent"} and b'"messages"' in raw:
            continue
        if (other, source_format) == ("steps", "openai-messages"):
            continue  # A step has a role, as a message has.
        records = read(raw, source_format)
        assert steps_of(records) == []
        assert malformed_of(records) != []


def test_a_file_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    for source_format in FORMATS:
        [record] = read_file(TraceFile(tmp_path / "gone.jsonl", source_format, 0))
        assert isinstance(record, Malformed)
        assert "gone.jsonl" in record.path


@pytest.mark.parametrize("fault", ["truncated", "damaged", "garbage behind"])
def test_a_broken_gzip_gives_what_it_holds_and_one_report(fault: str) -> None:
    raw = jsonl(step_lines(40, 5))
    whole = packed(raw)
    broken = {
        "truncated": whole[: len(whole) // 2],
        "damaged": whole[:-8] + bytes(8),
        "garbage behind": whole + b"garbage",
    }[fault]

    records = read(broken, "steps")
    good = read(raw, "steps")

    assert records[:-1] == good[: len(records) - 1]
    assert len(records) > 100
    assert isinstance(records[-1], Malformed)
    assert "cannot be read further" in records[-1].reason


def test_several_gzip_members_and_padding_are_one_file() -> None:
    lines = jsonl(step_lines(2, 2)).splitlines(keepends=True)
    parts = [packed(line) for line in lines]

    assert read(b"".join(parts) + bytes(1000), "steps") == read(b"".join(lines), "steps")


# Properties

JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "session_id",
                    "seq",
                    "role",
                    "content",
                    "messages",
                    "traj",
                    "task_id",
                    "type",
                    "uuid",
                    "sessionId",
                    "message",
                    "parentUuid",
                    "tool_calls",
                    "tool_call_id",
                    "id",
                    "extra",
                    "timestamp",
                    "caused_by",
                    "ts",
                ]
            )
            | st.text(max_size=5),
            inner,
            max_size=8,
        )
    ),
    max_leaves=20,
)


@given(raw=st.binary(max_size=400), source_format=st.sampled_from(get_args(Format)))
def test_arbitrary_bytes_never_raise(raw: bytes, source_format: Format) -> None:
    for record in read(raw, source_format):
        assert isinstance(record, Malformed)


@given(raw=st.text(alphabet='{}[]",:\\ \n1a', max_size=60), source_format=st.sampled_from(get_args(Format)))
def test_arbitrary_structure_never_raises(raw: str, source_format: Format) -> None:
    read(raw.encode(), source_format)


@given(values=st.lists(JSONISH, max_size=5), source_format=st.sampled_from(get_args(Format)), lines=st.booleans())
def test_arbitrary_json_never_raises(values: list[object], source_format: Format, lines: bool) -> None:
    raw = jsonl(values) if lines else json.dumps(values).encode()
    seen: set[str] = set()
    for step in steps_of(read(raw, source_format)):
        step_event("default", step)
        assert step.parent_source_id is None or step.parent_source_id in seen
        seen.add(step.source_id)


@settings(max_examples=200)
@given(data=st.data())
def test_a_truncated_file_gives_a_prefix_and_at_most_one_report(data: st.DataObject) -> None:
    source_format, raw, _ = data.draw(st.sampled_from(SAMPLES))
    content = packed(raw) if data.draw(st.booleans()) else raw
    cut = content[: data.draw(st.integers(0, len(content)))]

    whole, part = steps_of(read(content, source_format)), read(cut, source_format)

    steps = steps_of(part)
    if source_format == "openai-messages":
        # Their session, and so their id, is a digest of the content.
        assert [step.body for step in steps] == [step.body for step in whole[: len(steps)]]
    else:
        assert steps == whole[: len(steps)]
    assert len(malformed_of(part)) <= 1
    # A transcript of Claude Code begins with lines that are no steps: a cut behind one of them leaves nothing to tell.
    assert part or not cut.strip() or source_format == "claude-code"


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_byte_never_raises_nor_changes_the_lines_before_it(data: st.DataObject) -> None:
    raw = jsonl(step_lines(2, 2))
    at = data.draw(st.integers(0, len(raw) - 1))
    damaged = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]

    before = raw.count(b"\n", 0, at)

    assert read(damaged, "steps")[:before] == read(raw, "steps")[:before]


def test_a_run_cut_short_is_one_report() -> None:
    raw = json.dumps(mini_swe_agent_run(3)).encode()

    assert [type(record) for record in read(raw[:-30], "mini-swe-agent")] == [Malformed]
