"""How the demo looks: progress while the agents work, then tables and a tree.

On a terminal with colours and moving bars; in a file or a pipe the same text without.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.tree import Tree

from holdfast.ops.cli.quantities import format_bytes, format_seconds
from holdfast.ops.demo.agents import AGENTS, AgentName
from holdfast.ops.demo.library import MOST_MODULES

if TYPE_CHECKING:
    from holdfast.ops.demo.story import LineageStep, Story
    from holdfast.ops.importing import ImportCounts

PLAIN_WIDTH: Final = 110
"""Columns where there is no terminal to ask."""

_DOES: Final[dict[AgentName, str]] = {
    "librarian": "librarian   lists modules, stores their source",
    "surveyor": "surveyor    measures what was found",
    "reviewer": "reviewer    reviews what was measured",
}


class DemoScreen:
    """Shows the demo on stdout."""

    def __init__(self, *, quiet: bool = False) -> None:
        is_terminal = sys.stdout.isatty()
        self.console = Console(width=None if is_terminal else PLAIN_WIDTH, highlight=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=quiet or not is_terminal,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def begin(self, data: Path, nats_url: str, *, temporary: bool) -> None:
        """Says where it runs."""
        kept = "removed at the end" if temporary else "kept"
        text = (
            "[bold]Holdfast[/bold] keeps what agents know: [bold]publish once, hand on references[/bold], "
            "resolve hot or cold.\n"
            f"nats-server and all workers in this process: {escape(nats_url)}\ndata in {escape(str(data))} ({kept})"
        )
        self.console.print(Panel(text, border_style="cyan", expand=False))
        self._progress.start()

    def agent_done(self, name: AgentName, modules: int) -> None:
        """Moves an agent's bar."""
        if not self._tasks:
            for agent in AGENTS:
                self._tasks[agent] = self._progress.add_task(_DOES[agent], total=MOST_MODULES)
        if name == "librarian":
            # Whoever is ahead knows how much there is at least.
            for task in self._tasks.values():
                self._progress.update(task, total=modules)
        self._progress.update(self._tasks[name], completed=modules)

    def imported(self, counts: ImportCounts) -> None:
        """Moves the bar of an import."""
        if not self._tasks:
            self._tasks["import"] = self._progress.add_task("importing traces", total=None)
        self._progress.update(self._tasks["import"], completed=counts.steps)

    def step(self, text: str) -> None:
        """Shows what is under way."""
        for task in self._tasks.values():
            self._progress.update(task, visible=False)
        self._tasks["step"] = self._progress.add_task(text, total=None)

    def end_of_work(self) -> None:
        """Nothing to show: the bars stay until the next step."""

    def stop(self) -> None:
        """Takes the bars away."""
        self._progress.stop()

    def show(self, story: Story, *, temporary: bool, data: Path) -> None:
        """Shows what happened."""
        self.stop()
        self._show_work(story)
        self._show_deduplication(story)
        self._show_bytes(story)
        self._show_resolved(story)
        self._show_answer(story)
        self._show_lineage(story)
        self._show_next(story, temporary=temporary, data=data)

    def _title(self, number: int, text: str) -> None:
        self.console.print(f"\n[bold cyan]{number}[/bold cyan]  [bold]{text}[/bold]")

    def _show_work(self, story: Story) -> None:
        if story.imported is None:
            self._title(1, "Three agents, no language model, no shared memory: events with references")
            self.console.print(
                f"   librarian ──module:found──▶ surveyor ──module:measured──▶ reviewer ──module:reviewed──▶\n"
                f"   {story.modules} modules of this machine's standard library in {story.work_s:.1f} s: "
                f"{story.storage.events:,} events,\n   {story.storage.contexts:,} contexts, each acknowledged "
                f"once it is {'on the disk' if story.durability == 'durable' else 'taken'} (mode {story.durability})"
            )
            return
        counts = story.imported
        self._title(1, "Recorded traces: each step a context and an event")
        self.console.print(
            f"   {counts.steps:,} steps of {counts.files} files in {counts.seconds:.1f} s "
            f"({counts.steps / max(counts.seconds, 1e-9):,.0f} a second): {counts.events:,} new events, "
            f"\n   {counts.distinct_contexts:,} distinct contexts, {counts.errors} unreadable places; "
            f"mode {story.durability}"
        )

    def _show_deduplication(self, story: Story) -> None:
        self._title(2, "Equal contexts are one context")
        table = _table("kind", "referred to", "stored", "spared", "bytes stored")
        for line in story.deduplication[:10]:
            spared = 1 - line.distinct / line.mentions if line.mentions else 0
            table.add_row(
                line.kind, f"{line.mentions:,}", f"{line.distinct:,}", f"{spared:.0%}", format_bytes(line.bytes)
            )
        self.console.print(table)

    def _show_bytes(self, story: Story) -> None:
        sizes = story.bytes
        self._title(3, "The same work in bytes")
        table = _table("how", "bytes", "of line 1")
        for how, size in (
            ("embedded: each event carries its context and all it followed from", sizes.lineage_embedded),
            ("embedded: each event carries its own context alone", sizes.embedded),
            ("referenced: each context once, events with references (as stored, hot)", sizes.referenced),
            (f"archived: Parquet in the lake, {story.storage.lake_files} files", sizes.archived),
            ("for comparison: line 2 as one zstd stream, nothing in it addressable", sizes.compressed),
        ):
            table.add_row(how, format_bytes(size), f"{size / max(1, sizes.lineage_embedded):.1%}")
        self.console.print(table)
        self.console.print(
            "   [dim]Line 1 is what agents move that hand each other whole histories. A compressor alone shrinks it, "
            "too:\n   what references add is that each context is stored once, checked, and found by itself.[/dim]"
        )

    def _show_resolved(self, story: Story) -> None:
        archived = story.archived
        self._title(4, "Hot, then archived, then cold: the same bytes")
        table = _table("reference", "size", "first", "", "evicted", "", "bytes")
        for line in story.resolved:
            table.add_row(
                line.ref,
                format_bytes(line.size),
                line.tiers[0],
                format_seconds(line.hot_s),
                line.tiers[1],
                format_seconds(line.lake_s),
                "identical" if line.same else "[bold red]differ[/bold red]",
            )
        self.console.print(table)
        self.console.print(
            f"   In between: flushed in {format_seconds(archived.flush_s)}, {archived.purged:,} messages evicted, "
            f"{archived.left:,} left in the hot tier"
        )

    def _show_answer(self, story: Story) -> None:
        answer = story.answer
        self._title(5, f"One question in SQL: {answer.question}  [dim]({format_seconds(answer.seconds)})[/dim]")
        self.console.print(Syntax(answer.sql.strip(), "sql", background_color="default", padding=(0, 3)))
        table = _table(*answer.columns)
        for row in answer.rows:
            table.add_row(
                *("" if value is None else f"{value:,}" if isinstance(value, int) else str(value) for value in row)
            )
        self.console.print(table)

    def _show_lineage(self, story: Story) -> None:
        self._title(6, "Where one result comes from")
        branch: Tree | None = None
        tree: Tree | None = None
        for step in story.lineage:
            label = _label(step)
            if branch is None:
                tree = branch = Tree(label, guide_style="cyan")
            else:
                branch = branch.add(label)
        if tree is not None:
            self.console.print(_indented(tree))

    def _show_next(self, story: Story, *, temporary: bool, data: Path) -> None:
        self.console.print(f"\n[bold]Done in {story.seconds:.1f} s.[/bold]  Next:")
        directory = "./demo-data" if temporary else str(data)
        program = _program()
        lines = [
            (f"{program} demo --data ./demo-data", "the same, and the data stays"),
            (f"{program} sql --data {directory} 'FROM events LIMIT 5'", "ask it anything"),
            *_lineage_line(story, program, directory),
            (f"{program} verify --data {directory}", "check every promise"),
            (f"{program} up", "a server and all workers, for agents of your own"),
            (f"{program} demo --traces PATH", "these figures on recorded traces"),
        ]
        grid = Table.grid(padding=(0, 3, 0, 0))
        for command, meaning in lines if temporary else lines[1:]:
            grid.add_row(f"[cyan]{escape(command)}[/cyan]", f"[dim]{meaning}[/dim]")
        self.console.print(_indented(grid))


def _lineage_line(story: Story, program: str, directory: str) -> list[tuple[str, str]]:
    # References name content: the same ones come out of the next demo.
    ref = next((step.event.context_ref for step in reversed(story.lineage) if step.event.context_ref), None)
    return [] if ref is None else [(f"{program} lineage --data {directory} {ref}", "where that one comes from")]


def _program() -> str:
    """What a user has to type to run this program again: its name alone only works when it is on the path."""
    if shutil.which("holdfast") is not None or not Path(sys.argv[0]).is_file():
        return "holdfast"
    return os.path.relpath(sys.argv[0])


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 1), pad_edge=True)
    for position, column in enumerate(columns):
        # What identifies a row is never broken: on a narrow screen the figures are.
        table.add_column(column, justify="left" if position < left else "right", no_wrap=position < left)
    return table


def _label(step: LineageStep) -> str:
    event = step.event
    name = f"[bold]{escape(event.name)}[/bold]"
    who = f"[dim]by[/dim] {escape(event.agent_id)}"
    ref = f"[cyan]{escape(event.context_ref)}[/cyan]" if event.context_ref else "[dim]no context[/dim]"
    gist = f"\n[dim]{escape(step.gist)}[/dim]" if step.gist else ""
    return f"{name} {who}  {ref}{gist}"


def _indented(shown: Tree | Table) -> Padding:
    return Padding(shown, (0, 0, 0, 3), expand=False)
