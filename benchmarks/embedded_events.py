"""Made-up events of the earlier system, with embedded contexts, from a seed; and how much there is to know of them."""

from __future__ import annotations

import json
import math
import random
import uuid
from typing import Any, Final, Literal

IdForm = Literal["evt", "uuid7"]
"""``evt_`` and 8 hexadecimal digits, as that system writes them; or UUIDv7 of the event's time."""

ID_FORMS: Final[tuple[IdForm, ...]] = ("evt", "uuid7")

_START_S: Final = 1_754_300_000.0
_MEAN_GAP_S: Final = 0.05
_FLOAT_STEP_S: Final = 2.0**-22
"""Distance of two neighbouring floating-point numbers at such a time."""
_OPEN_TREES: Final = 8
_TREES_A_SESSION: Final = 12
_AGENTS: Final = tuple(f"{role}_agent_{number}" for role in ("research", "writer", "review") for number in range(4))
_NAMES: Final = ("agent:status", "completion:request", "completion:result", "tool:call", "state:changed")
_STATES: Final = ("active", "waiting", "done", "failed")


class Generated:
    """Events as NDJSON lines, and their information content in bits: ids, and everything else."""

    def __init__(self, lines: list[bytes], id_bits: float, other_bits: float, trees: int) -> None:
        self.lines = lines
        self.id_bits = id_bits
        self.other_bits = other_bits
        self.trees = trees


class _Tree:
    def __init__(self, session: str, correlation: str, size: int) -> None:
        self.session = session
        self.correlation = correlation
        self.left = size
        self.nodes: list[tuple[str, int]] = []


def generate(count: int, seed: int, ids: IdForm) -> Generated:
    """Returns ``count`` events of trees of 1 to 60 events, eight of them growing at a time; chains and bushes.

    The bits are those that a decoder would need who knew this generator: no encoding of these events can be smaller
    on the average.
    """
    chance = random.Random(seed)
    clock = _START_S
    lines: list[bytes] = []
    id_bits = other_bits = 0.0
    trees = 0
    session = ""
    open_trees: list[_Tree] = []
    gap_bits = math.log2(math.e * _MEAN_GAP_S / _FLOAT_STEP_S)
    for _ in range(count):
        while len(open_trees) < _OPEN_TREES:
            if trees % _TREES_A_SESSION == 0:
                session = f"session_{chance.getrandbits(48):012x}"
                id_bits += 48
            open_trees.append(_Tree(session, f"corr_{chance.getrandbits(32):08x}", chance.randint(1, 60)))
            id_bits += 32
            other_bits += math.log2(60)
            trees += 1
        tree = chance.choice(open_trees)
        clock += chance.expovariate(1 / _MEAN_GAP_S)
        event_id, bits = _event_id(chance, clock, ids)
        id_bits += bits
        parent = None
        if tree.nodes:
            # Mostly the newest, so that some trees are deep; else one of the last few.
            reach = min(4, len(tree.nodes))
            parent = tree.nodes[-chance.randint(1, reach)]
            other_bits += math.log2(reach)
        depth = 0 if parent is None else parent[1] + 1
        agent, name, state = chance.choice(_AGENTS), chance.choice(_NAMES), chance.choice(_STATES)
        other_bits += math.log2(_OPEN_TREES * len(_AGENTS) * len(_NAMES) * len(_STATES)) + gap_bits
        context: dict[str, Any] = {"_event_id": event_id, "_correlation_id": tree.correlation}
        if parent is not None:
            context["_parent_event_id"] = parent[0]
        context |= {
            "_root_event_id": tree.nodes[0][0] if tree.nodes else event_id,
            "_event_depth": depth,
            "_agent_id": agent,
            "_session_id": tree.session,
            "_timestamp": clock,
        }
        event = {"event": name, "data": {"agent_id": agent, "status": state}, "_ksi_context": context}
        lines.append(json.dumps(event).encode())
        tree.nodes.append((event_id, depth))
        tree.left -= 1
        if not tree.left:
            open_trees.remove(tree)
    return Generated(lines, id_bits, other_bits, trees)


def _event_id(chance: random.Random, at_s: float, ids: IdForm) -> tuple[str, float]:
    if ids == "evt":
        return f"evt_{chance.getrandbits(32):08x}", 32
    value = int(at_s * 1000) << 80 | 0x7 << 76 | chance.getrandbits(12) << 64 | 0x2 << 62 | chance.getrandbits(62)
    return str(uuid.UUID(int=value)), 74
