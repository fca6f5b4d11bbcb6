"""What changed between two bodies, as a person is told it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from holdfast.ops.cli.differences import describe_changes
from holdfast.ops.cli.key_output import age


def told(before: Any, *operations: dict[str, Any]) -> list[str]:
    return [f"{sign}{text}" for sign, text in describe_changes(before, operations)]


def test_a_replaced_member_shows_both_values() -> None:
    before = {"goal": "fly", "budget": 300}
    assert told(before, {"op": "replace", "path": "/budget", "value": 400}) == ["~/budget", "-300", "+400"]
    assert before == {"goal": "fly", "budget": 300}


def test_what_is_added_and_what_is_gone_is_shown() -> None:
    assert told({}, {"op": "add", "path": "/a~1b", "value": None}) == ["~/a~1b", "+null"]
    assert told({"a": {"b": [1, 2]}}, {"op": "remove", "path": "/a/b"}) == ["~/a/b", "-[1,2]"]
    # RFC 6902, 4.1: adding a member that exists replaces it.
    assert told({"a": 1}, {"op": "add", "path": "/a", "value": 2}) == ["~/a", "-1", "+2"]


def test_later_operations_see_what_earlier_ones_did() -> None:
    operations: tuple[dict[str, Any], ...] = (
        {"op": "remove", "path": "/0"},
        {"op": "add", "path": "/0", "value": "new"},
        {"op": "replace", "path": "/1", "value": "B"},
        {"op": "add", "path": "/-", "value": "end"},
        {"op": "remove", "path": "/3"},
    )
    lines = told(["a", "b", "c"], *operations)
    assert lines == ["~/0", '-"a"', "~/0", '+"new"', "~/1", '-"b"', '+"B"', "~/-", '+"end"', "~/3", '-"end"']


def test_moves_copies_and_tests_keep_the_document_in_step() -> None:
    lines = told(
        {"a": {"x": 1}, "b": [0]},
        {"op": "test", "path": "/b", "value": [0]},
        {"op": "move", "from": "/a/x", "path": "/b/0"},
        {"op": "copy", "from": "/b", "path": "/c"},
        {"op": "remove", "path": "/b/0"},
        {"op": "remove", "path": "/c"},
    )
    assert lines == ["~/a/x moved to /b/0", "~/b copied to /c", "~/b/0", "-1", "~/c", "-[1,0]"]


def test_of_a_long_text_only_what_changed_is_shown() -> None:
    old = "\n".join(f"line {n}" for n in range(100))
    new = old.replace("line 50", "line fifty")
    lines = told(old, {"op": "replace", "path": "", "value": new})
    assert lines[:2] == ["~(the whole body)", "@@@ -49,5 +49,5 @@"]
    assert lines[2:] == [" line 48", " line 49", "-line 50", "+line fifty", " line 51", " line 52"]


def test_a_large_value_is_spread_out_and_compared_by_line() -> None:
    old = {"items": [f"item {n}" for n in range(30)]}
    new = {"items": [*old["items"], "one more"]}
    lines = told({"v": old}, {"op": "replace", "path": "/v", "value": new})
    assert '+    "one more"' in lines
    assert len(lines) < 12


def test_values_of_many_lines_are_told_whole_and_soon() -> None:
    old, new = "\n".join(["a"] * 10_000), "\n".join(["b"] * 10_000)
    lines = told(old, {"op": "replace", "path": "", "value": new})
    assert len(lines) == 20_001


def test_bytes_are_told_by_their_number() -> None:
    lines = told(b"\xff\x00", {"op": "replace", "path": "", "value": "text"})
    assert lines == ["~(the whole body)", "-(2 bytes that are no text)", '+"text"']


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (7_199, "119m"), (7_200, "2h"), (172_800, "2d")],
)
def test_an_age_is_told_in_one_unit(seconds: int, text: str) -> None:
    now = datetime(2026, 1, 31, tzinfo=UTC)
    assert age(now - timedelta(seconds=seconds), now) == text
