"""``holdfast lineage`` and ``holdfast query``: what a user sees of trees, in each form."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from holdfast.client import Event
from holdfast.ops.cli.lineage_drawing import (
    dot_lines,
    format_offset,
    guide_width,
    mermaid_lines,
    nodes_of,
    rich_trees,
    text_lines,
)
from holdfast.schemas.ids import EventId, normal_event_id
from tests.command_line import CommandLine, InProcess, Service, in_process
from tests.support import plain_client

T0 = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lineage") / "data"


@pytest.fixture(scope="module")
def running(directory: Path) -> Generator[Service]:
    with CommandLine(directory, HOLDFAST_ARCHIVE_INTERVAL_S="3600").up() as service:
        yield service


@pytest.fixture
def holdfast(
    running: Service,
    directory: Path,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Generator[InProcess]:
    assert running.ready["ready"] is True
    with in_process(directory, monkeypatch, capfdbinary, HOLDFAST_NAMESPACE=namespace) as commands:
        yield commands


@pytest.fixture
def family(holdfast: InProcess) -> list[str]:
    """The ids of a root, its two children, and a child of the first of them that carries a context."""
    holdfast("put", '{"goal": "fly"}', "--kind", "plan")
    common = ("--correlation", "c-17", "--agent", "planner")
    moment = "2026-01-31T09:30:0"
    root = holdfast("emit", "plan:made", *common, "--timestamp", f"{moment}0Z", "--id", "step-1").out.strip()
    left = holdfast("emit", "tool:called", "--parent", root, "--timestamp", f"{moment}1.250Z").out.strip()
    right = holdfast("emit", "tool:called", "--parent", "step-1", "--timestamp", f"{moment}2Z").out.strip()
    leaf = holdfast(
        *("emit", "tool:answered", "--parent", left, "--timestamp", f"{moment}3Z", "--context", ref_of(holdfast))
    ).out.strip()
    return [root, left, leaf, right]


def ref_of(holdfast: InProcess) -> str:
    return holdfast("put", '{"goal": "fly"}', "--kind", "plan").out.strip()


def test_B12_a_tree_is_drawn_with_the_event_asked_for_marked(holdfast: InProcess, family: list[str]) -> None:
    root, left, _, right = family
    assert holdfast("lineage", left).out.splitlines() == [
        "plan:made  planner  +0s  depth 0",
        "├── tool:called  cli  +1.250s  depth 1  ← asked for",
        f"│   └── tool:answered  cli  +3s  depth 2  {ref_of(holdfast)}",
        "└── tool:called  cli  +2s  depth 1",
    ]
    shown = holdfast("lineage", left, "--ids").out.splitlines()
    assert [line.removesuffix("  ← asked for").split("  ")[-1] for line in shown] == family
    assert holdfast("lineage", "step-1").out.splitlines()[0] == "plan:made  planner  +0s  depth 0  ← asked for"
    holdfast("flush")
    lines = holdfast("lineage", right, "--json").lines
    assert [(line["depth"], line["event_id"], line.get("asked")) for line in lines] == [
        (0, root, None),
        (1, left, None),
        (2, family[2], None),
        (1, right, True),
    ]
    assert lines[2]["context_ref"] == ref_of(holdfast)


def test_of_a_reference_the_trees_of_all_events_that_carry_it(holdfast: InProcess, family: list[str]) -> None:
    ref = ref_of(holdfast)
    other = holdfast("emit", "other", "--context", ref).out.strip()
    lines = holdfast("lineage", ref, "--json").lines
    assert [line["event_id"] for line in lines] == [*family, other]
    assert [line["event_id"] for line in lines if line.get("asked")] == [family[2], other]
    assert holdfast("lineage", ref).out.count("← asked for") == 2
    unused = holdfast("put", "unused").out.strip()
    assert holdfast("lineage", unused, "--json", status=4).error["code"] == "not_found"


def test_ancestors_or_descendants_alone(holdfast: InProcess, family: list[str]) -> None:
    root, left, leaf, right = family
    assert [line["event_id"] for line in holdfast("lineage", leaf, "--chain", "--json").lines] == [root, left, leaf]
    below = holdfast("lineage", root, "--descendants", "--json").lines
    assert [(line["depth"], line["event_id"]) for line in below] == [(0, left), (1, leaf), (0, right)]
    assert "exclude each other" in holdfast("lineage", root, "--chain", "--descendants", status=2).err


def test_the_limit_is_kept_and_what_is_left_out_is_told(holdfast: InProcess, family: list[str]) -> None:
    outcome = holdfast("lineage", family[0], "--limit", "2", "--json")
    assert [line["event_id"] for line in outcome.lines] == family[:2]
    assert "more than 2 events" in outcome.err
    assert holdfast("lineage", family[0], "--limit", "4").err == ""


def test_a_parent_that_is_not_stored_is_told(holdfast: InProcess, running: Service, namespace: str) -> None:
    async def publish_orphan() -> None:
        async with plain_client(running.ready["nats_url"]) as client:
            message = b'{"id": "orphan", "parent_event_id": "lost"}'
            await client.jetstream().publish(f"ctx.{namespace}.event.a.e", message)

    asyncio.run(publish_orphan())
    outcome = holdfast("lineage", "orphan")
    assert "e  a  +0s  depth 1  ← asked for" in outcome.out
    assert f"{normal_event_id(namespace, 'lost')[0]}, the parent of" in outcome.err
    assert holdfast("lineage", "lost", "--json", status=4).error["field"] == "event_id"


def test_mermaid_and_dot_name_every_event_and_link(holdfast: InProcess, family: list[str]) -> None:
    mermaid = holdfast("lineage", family[1], "--mermaid").out.splitlines()
    assert mermaid[0] == "flowchart TD"
    assert mermaid[1] == '  n0["plan:made<br/>planner +0s"]'
    assert [line for line in mermaid if "-->" in line] == ["  n0 --> n1", "  n1 --> n2", "  n0 --> n3"]
    assert mermaid[-1] == "  class n1 asked"
    dot = holdfast("lineage", family[1], "--dot").out
    assert dot.startswith("digraph lineage {\n")
    assert '  n1 [label="tool:called\\ncli +1.250s", penwidth=3];\n  n0 -> n1;\n' in dot
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=dot.encode(), check=True, capture_output=True)
    assert "exclude each other" in holdfast("lineage", family[0], "--dot", "--mermaid", status=2).err


def test_B28_B33_query_by_correlation_with_limit_fields_and_cursor(holdfast: InProcess, family: list[str]) -> None:
    lines = holdfast("query", "--correlation", "c-17", "--limit", "10", "--json").lines
    assert sorted(line["event_id"] for line in lines) == sorted(family)
    first = holdfast("query", "--correlation", "c-17", "--limit", "3", "--fields", "event_id,name", "--json")
    assert [set(line) for line in first.lines] == [{"event_id", "name"}] * 3
    cursor = first.err.split("--cursor ")[1].strip()
    rest = holdfast("query", "--correlation", "c-17", "--cursor", cursor, "--json").lines
    assert [line["event_id"] for line in first.lines + rest] == [line["event_id"] for line in lines]
    table = holdfast("query", "--root", "step-1", "--fields", "name, event_depth").out.splitlines()
    assert [line.split() for line in table] == [
        ["name", "event_depth"],
        ["plan:made", "0"],
        ["tool:called", "1"],
        ["tool:called", "1"],
        ["tool:answered", "2"],
    ]
    assert [line["event_id"] for line in holdfast("query", "--parent", family[1], "--json").lines] == [family[2]]
    assert [line["event_id"] for line in holdfast("query", "--ref", ref_of(holdfast), "--json").lines] == [family[2]]
    assert holdfast("query", "--fields", "nothing", "--json", status=2).error["field"] == "fields"
    assert holdfast("query", "--ref", "junk", status=2).err


def test_B31_B32_resolve_one_or_many(holdfast: InProcess) -> None:
    refs = [holdfast("put", f'{{"n": {n}}}', "--kind", "plan").out.strip() for n in range(3)]
    assert holdfast("resolve", refs[0], "--json").json["body"] == {"n": 0}
    holdfast("flush")
    holdfast("evict", "--older-than", "0s")
    assert [line["body"]["n"] for line in holdfast("resolve", *refs, "--json").lines] == [0, 1, 2]
    assert {line["tier"] for line in holdfast("resolve", *refs, "--json").lines} == {"lake"}


# Drawing, without a system


def drawn(n: int, parent: int | None, name: str = "e", agent: str = "a") -> Event:
    return Event(
        event_id=EventId(f"id-{n}"),
        name=name,
        namespace="default",
        agent_id=agent,
        timestamp=T0 + timedelta(milliseconds=n),
        parent_event_id=None if parent is None else EventId(f"id-{parent}"),
        event_depth=n,
    )


HOSTILE = 'a"b\\N]<script>&amp;#35;`\x1b[31m\n\u202e[bold]x[/bold]; n0 --> n9'


def test_names_cannot_break_out_of_a_label() -> None:
    nodes = nodes_of([drawn(0, None, HOSTILE, HOSTILE)], [])
    [line] = text_lines(nodes)
    assert "\x1b" not in line
    assert "\\x1b[31m\\n\\u202e[bold]" in line
    mermaid = mermaid_lines(nodes)
    assert len(mermaid) == 2
    label = mermaid[1].removeprefix('  n0["').removesuffix('"]')
    assert not set('"[]{}`\\&') & set(label.replace("<br/>", ""))
    assert label.count("<") == label.count("<br/>") == 1
    assert "a#34;b#92;N#93;#60;script#62;#38;amp#59;#35;35#59;#96;" in label
    dot = dot_lines(nodes)
    assert len(dot) == 4
    assert 'a\\"b\\\\N]<script>&amp;amp;#35;`\\\\x1b[31m\\\\n\\\\u202e[bold]x' in dot[2]
    console = Console(width=300, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        for tree in rich_trees(nodes):
            console.print(tree)
    assert "[bold]x[/bold]" in captured.get()


def test_on_a_terminal_the_tree_is_the_same() -> None:
    nodes = nodes_of([drawn(0, None), drawn(1, 0), drawn(2, 1), drawn(3, 0), drawn(4, None)], ["id-2"])
    console = Console(width=200)
    with console.capture() as captured:
        for tree in rich_trees(nodes):
            console.print(tree)
    assert [line.rstrip() for line in captured.get().splitlines()] == text_lines(nodes)


def test_a_long_line_of_only_children_is_drawn_at_one_level() -> None:
    nodes = nodes_of([drawn(0, None), *(drawn(n, n - 1) for n in range(1, 300)), drawn(300, 0)], [])
    lines = text_lines(nodes)
    assert lines[1].startswith("├── e  a  +0.001s  depth 1")
    assert lines[2].startswith("├── ↳ e  a  +0.002s  depth 2")
    assert lines[299].startswith("├── ↳ e  a  +0.299s  depth 299")
    assert lines[300].startswith("└── e")
    assert nodes[299].depth == 299
    console = Console(width=200)
    with console.capture() as captured:
        for tree in rich_trees(nodes):
            console.print(tree)
    assert [line.rstrip() for line in captured.get().splitlines()] == lines


def test_a_tree_wider_than_the_screen_loses_no_line() -> None:
    """Every event has two children, so nothing can be drawn at one level."""
    deep = 60
    events = [drawn(0, None), *(drawn(n, n - 1) for n in range(1, deep))]
    nodes = nodes_of([*events, *(drawn(1_000 + n, n - 1) for n in range(deep - 1, 0, -1))], [])
    assert guide_width(nodes) == 4 * (deep - 1)
    assert len(text_lines(nodes)) == len(nodes)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "+0s"),
        (0.0004, "+0s"),
        (1.25, "+1.250s"),
        (-3, "-3s"),
        (59.9994, "+59.999s"),
        (59.9996, "+1m00s"),
        (3_725, "+1h02m"),
        (90_000, "+1d01h"),
    ],
)
def test_offsets(seconds: float, expected: str) -> None:
    assert format_offset(seconds) == expected
