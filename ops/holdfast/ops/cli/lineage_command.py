"""``holdfast lineage``: the tree of an event, or of every event that carries a context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import InvalidFieldError, InvalidRefError, NotFoundError
from holdfast.schemas.refs import parse_ref

if TYPE_CHECKING:
    from holdfast.client import Event, Holdfast

LIMIT: Final = 1_000

_LABEL_WIDTH: Final = 40
"""What a label needs of the screen: beyond its edge rich leaves out whole lines, so there it is plain text."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "lineage",
        examples=(
            "holdfast lineage 0198c3a1-7c3e-7d52-9b1f-0d6a2f4e8b11",
            "holdfast lineage ctx_plan_3q7… --mermaid > lineage.mmd",
            "holdfast lineage step-17 --chain --json | jq -r .event_id",
            "holdfast lineage step-17 --dot | dot -Tsvg > lineage.svg",
        ),
    )(lineage)


async def lineage(
    invocation: Invocation,
    target: Annotated[str, typer.Argument(metavar="EVENT|REF", help="Id of an event, or reference of a context.")],
    chain: Annotated[bool, typer.Option("--chain", help="Its ancestors alone, from the first of them.")] = False,
    descendants: Annotated[bool, typer.Option("--descendants", help="What follows from it alone.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a Mermaid flowchart.")] = False,
    dot: Annotated[bool, typer.Option("--dot", help="As a Graphviz digraph.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Show the id of each event, to go on from there.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, help="Most events.")] = LIMIT,
) -> None:
    """Draw where an event came from and what it led to: its whole tree, hot and archived alike.

    Of a reference, the trees of all events that carry it. With --json the events in pre-order, one a line, each with
    its depth in what is shown.
    """
    from holdfast.ops.system import open_system

    _check_one({"--chain": chain, "--descendants": descendants})
    _check_one({"--mermaid": mermaid, "--dot": dot, "--json": invocation.json})
    loaded = invocation.loaded
    async with open_system(loaded, ("resolver",)) as system, system.connect(loaded.settings.namespace) as hf:
        asked = await _asked_for(hf, target, limit)
        events: list[Event] = []
        shown: set[str] = set()
        is_cut = False
        for event_id in asked:
            if not chain and not descendants and event_id in shown:
                continue  # in a tree that is shown already
            found = await _around(hf, event_id, limit - len(events) + 1, chain=chain, descendants=descendants)
            found = [event for event in found if event.event_id not in shown]
            is_cut = len(events) + len(found) > limit
            events += found[: limit - len(events)]
            shown.update(event.event_id for event in found)
            if is_cut:
                break
    _write(invocation, events, asked, mermaid=mermaid, dot=dot, ids=ids)
    if is_cut:
        output.remark(f"there are more than {limit} events: the rest is left out, --limit takes more")


def _check_one(flags: dict[str, bool]) -> None:
    given = [name for name, is_set in flags.items() if is_set]
    if len(given) > 1:
        raise InvalidFieldError(f"{' and '.join(given)} exclude each other", field=given[1], hint="give one of them")


async def _asked_for(hf: Holdfast, target: str, limit: int) -> list[str]:
    """The ids of the events that are meant; of a reference, of all that carry it."""
    try:
        parse_ref(target)
    except InvalidRefError:
        return [(await hf.chain(target))[-1].event_id]
    found: list[str] = [event.event_id async for event in hf.query(ref=target, limit=limit)]
    if not found:
        raise NotFoundError(
            f"no event in namespace {hf.namespace!r} carries {target}",
            field="target",
            hint=f"'holdfast resolve {target}' says whether the context is stored",
        )
    return found


async def _around(hf: Holdfast, event_id: str, limit: int, *, chain: bool, descendants: bool) -> list[Event]:
    if descendants:
        return await hf.descendants(event_id, limit=limit)
    above = await hf.chain(event_id)
    if above[0].parent_event_id is not None:
        output.remark(f"{above[0].parent_event_id}, the parent of {above[0].event_id}, is not above it in this store")
    if chain:
        return above
    return await hf.tree(_top(above), limit=limit)


def _top(above: list[Event]) -> Event:
    """The topmost ancestor in whose tree the event is: the highest one that no stated root divides from it."""
    root = next((event.root_event_id for event in reversed(above) if event.root_event_id is not None), None)
    top = above[-1]
    for event in reversed(above):
        if event.root_event_id not in (None, root):
            break
        if event.root_event_id is not None or root is None:
            top = event
    return top


def _write(
    invocation: Invocation, events: list[Event], asked: list[str], *, mermaid: bool, dot: bool, ids: bool
) -> None:
    from holdfast.ops.cli import lineage_drawing as drawing
    from holdfast.ops.cli.event_commands import event_json

    nodes = drawing.nodes_of(events, asked, show_ids=ids)
    if invocation.json:
        for node in nodes:
            members: dict[str, Any] = {"depth": node.depth, **event_json(node.event)}
            output.write_json(members | {"asked": True} if node.asked else members)
        return
    console = output.stdout_console()
    if mermaid:
        lines = drawing.mermaid_lines(nodes)
    elif dot:
        lines = drawing.dot_lines(nodes)
    elif console.is_terminal and drawing.guide_width(nodes) + _LABEL_WIDTH <= console.width:
        for tree in drawing.rich_trees(nodes):
            console.print(tree)
        return
    else:
        lines = drawing.text_lines(nodes)
    for line in lines:
        output.write_line(line)
