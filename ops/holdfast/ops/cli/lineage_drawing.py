"""Trees of events as text, Mermaid, Graphviz and rich: pure functions of the events in pre-order.

Names and agents may hold anything that JSON can, so every form has its own way to make a label harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client.model import Event

if TYPE_CHECKING:
    from rich.tree import Tree

DEEPEST: Final = 24
"""Levels that fit a screen.  In a deeper tree an only child is drawn right below its parent, not one level further
in: the tree of a session is mostly one long line."""

_FOLLOWS: Final = "↳ "
_MERMAID_SAFE: Final = frozenset(" _-.:+,/()")


class Node(msgspec.Struct, frozen=True):
    """An event of a tree.  ``depth`` counts from the topmost event that is shown; ``above`` is the position of its
    parent among the nodes, None for a topmost one.  ``shows_id``: its label says which event it is."""

    event: Event
    depth: int
    above: int | None
    asked: bool
    offset_s: float
    shows_id: bool = False

    @property
    def when(self) -> str:
        """The time since the topmost event: ``+0s``, ``+1.250s``, ``+2m05s``, ``-3s``."""
        return format_offset(self.offset_s)


def nodes_of(events: Sequence[Event], asked: Iterable[str], *, show_ids: bool = False) -> list[Node]:
    """Returns the nodes of events in pre-order; several trees may follow each other."""
    marked = frozenset(asked)
    places: dict[str, int] = {}
    nodes: list[Node] = []
    tops: list[Event] = []
    for event in events:
        parent = event.parent_event_id
        above = None if parent is None else places.get(parent)
        top = event if above is None else tops[above]
        places[event.event_id] = len(nodes)
        tops.append(top)
        nodes.append(
            Node(
                event=event,
                depth=0 if above is None else nodes[above].depth + 1,
                above=above,
                asked=event.event_id in marked,
                offset_s=(event.timestamp - top.timestamp).total_seconds(),
                shows_id=show_ids,
            )
        )
    return nodes


def format_offset(seconds: float) -> str:
    """Returns a time between two events, exact to the millisecond below a minute."""
    sign = "-" if seconds < 0 else "+"
    milliseconds = round(abs(seconds) * 1000)
    if milliseconds < 60_000:
        whole, rest = divmod(milliseconds, 1000)
        return f"{sign}{whole}.{rest:03}s" if rest else f"{sign}{whole}s"
    minutes, rest_s = divmod(round(milliseconds / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{sign}{days}d{hours:02}h"
    return f"{sign}{hours}h{minutes:02}m" if hours else f"{sign}{minutes}m{rest_s:02}s"


def label(node: Node) -> str:
    """Returns what a line of the terminal says of an event, without control characters."""
    event = node.event
    parts = [printable(event.name), printable(event.agent_id), node.when, f"depth {event.event_depth}"]
    if event.context_ref is not None:
        parts.append(event.context_ref)
    if node.shows_id:
        parts.append(event.event_id)
    return "  ".join(parts) + ("  ← asked for" if node.asked else "")


def text_lines(nodes: Sequence[Node]) -> list[str]:
    """Returns the trees as lines of plain text with guide lines."""
    above, follows = _shown_under(nodes)
    is_last = _last_children(above)
    lines: list[str] = []
    # The guides of what stands under each node; several nodes have the same ones, so they are kept as they are made.
    guides: list[str] = []
    for position, node in enumerate(nodes):
        parent = above[position]
        text = (_FOLLOWS if follows[position] else "") + label(node)
        if parent is None:
            lines.append(text)
            guides.append("")
        else:
            lines.append(f"{guides[parent]}{'└── ' if is_last[position] else '├── '}{text}")
            guides.append(f"{guides[parent]}{'    ' if is_last[position] else '│   '}")
    return lines


def rich_trees(nodes: Sequence[Node]) -> list[Tree]:
    """Returns the trees for a rich console."""
    from rich.text import Text
    from rich.tree import Tree

    above, follows = _shown_under(nodes)
    branches: list[Tree] = []
    tops: list[Tree] = []
    for position, node in enumerate(nodes):
        # Text, not a string: what looks like markup is none.
        text = Text((_FOLLOWS if follows[position] else "") + label(node), style="bold reverse" if node.asked else "")
        parent = above[position]
        branch = Tree(text) if parent is None else branches[parent].add(text)
        if parent is None:
            tops.append(branch)
        branches.append(branch)
    return tops


def guide_width(nodes: Sequence[Node]) -> int:
    """Returns how many columns the guide lines of the deepest node take."""
    levels: list[int] = []
    for parent in _shown_under(nodes)[0]:
        levels.append(0 if parent is None else levels[parent] + 1)
    return 4 * max(levels, default=0)


def mermaid_lines(nodes: Sequence[Node]) -> list[str]:
    """Returns a Mermaid flowchart."""
    lines = ["flowchart TD"]
    for position, node in enumerate(nodes):
        lines.append(f'  n{position}["{"<br/>".join(_mermaid(part) for part in _box(node))}"]')
        if node.above is not None:
            lines.append(f"  n{node.above} --> n{position}")
    asked = [f"n{position}" for position, node in enumerate(nodes) if node.asked]
    if asked:
        lines.append("  classDef asked stroke-width:4px")
        lines.append(f"  class {','.join(asked)} asked")
    return lines


def dot_lines(nodes: Sequence[Node]) -> list[str]:
    """Returns a Graphviz digraph."""
    lines = ["digraph lineage {", "  node [shape=box];"]
    for position, node in enumerate(nodes):
        bold = ", penwidth=3" if node.asked else ""
        text = "\\n".join(_dot(part) for part in _box(node))
        lines.append(f'  n{position} [label="{text}"{bold}];')
        if node.above is not None:
            lines.append(f"  n{node.above} -> n{position};")
    lines.append("}")
    return lines


def printable(text: str) -> str:
    """Returns text on one line: what would move the cursor, change colours or turn the direction is written out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _box(node: Node) -> list[str]:
    event = node.event
    lines = [printable(event.name), f"{printable(event.agent_id)} {node.when}"]
    return lines if event.context_ref is None else [*lines, event.context_ref]


def _mermaid(text: str) -> str:
    # Inside quotes Mermaid reads entities by number; quotes, angle brackets and backticks mean something else there.
    return "".join(char if char.isalnum() or char in _MERMAID_SAFE else f"#{ord(char)};" for char in text)


def _dot(text: str) -> str:
    # Graphviz reads escapes (\N is the node's name) and entities (&amp;) in a quoted label.
    return text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')


def _shown_under(nodes: Sequence[Node]) -> tuple[list[int | None], list[bool]]:
    """The position under which each node is drawn, and whether it follows from the line right above it instead."""
    if max((node.depth for node in nodes), default=0) <= DEEPEST:
        return [node.above for node in nodes], [False for _ in nodes]
    children = [0] * len(nodes)
    for node in nodes:
        if node.above is not None:
            children[node.above] += 1
    above: list[int | None] = []
    follows: list[bool] = []
    for node in nodes:
        only = node.above is not None and children[node.above] == 1
        if only and node.above is not None and above[node.above] is not None:
            above.append(above[node.above])
        else:
            above.append(node.above)
            only = False
        follows.append(only)
    return above, follows


def _last_children(above: Sequence[int | None]) -> list[bool]:
    """Whether each node is the last one drawn under its parent."""
    last: dict[int | None, int] = {parent: position for position, parent in enumerate(above)}
    return [last[parent] == position for position, parent in enumerate(above)]


__all__ = [
    "Node",
    "dot_lines",
    "format_offset",
    "guide_width",
    "label",
    "mermaid_lines",
    "nodes_of",
    "printable",
    "rich_trees",
    "text_lines",
]
