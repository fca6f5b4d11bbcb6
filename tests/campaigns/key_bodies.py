"""Keys, bodies and changes that campaigns draw from, by number, so that a failing example can be printed.

Holds no tests itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tests.campaigns.key_model import KEEP

KEYS: Final = ("plan", "plan.a", "plan.a.b c*>ü", "x--.$.")
"""Few, so that steps meet; some are the beginning of others, some are odd."""

TURNS: Final = [{"role": "user", "content": f"turn {number}: " + "words and words " * 8} for number in range(40)]

BODIES: Final[list[Any]] = [
    *({}, {"a": 1}, [], [True], [1], None, 0, "", "ü text\x00", b"\x00\xff", {"a": {"b": [1, {"c": None}]}}),
    *(TURNS[:8], TURNS[:20], TURNS, {"turns": TURNS[:25], "count": 25}, "long text " * 300, b"\x01\x02" * 2_000),
    "very long text " * 40_000,
]
"""Small ones, those that are stored in parts (over 2 KiB), and one that is chunked (over 512 KiB)."""

PATCHES: Final[list[dict[str, Any]]] = [
    *({}, {"a": 1}, {"a": None}, {"b": {"c": 2}}, {"b": {"c": None}}, {"b": [1, 2]}, {"count": 7}),
    *({"turns": TURNS[:30]}, {"turns": None}, {"note": "long note " * 250}),
]

FOREIGN: Final = (b"", b"garbage", b'{"version":0}', b'{"version":9,"op":"write"}', b'{"version":9,"op":"put","v":2}')


def grown(body: Any) -> Any:
    """More of the same."""
    if isinstance(body, list):
        return [*body, TURNS[len(body) % len(TURNS)]]
    if isinstance(body, dict):
        turns = body.get("turns")
        more = [*turns, TURNS[len(turns) % len(TURNS)]] if isinstance(turns, list) else TURNS[:20]
        return {**body, "turns": more, "count": len(more)}
    if isinstance(body, str):
        return f"{body} and more text"[:4_000]
    return TURNS[:16]


def _edited(body: Any) -> Any:
    if isinstance(body, list) and body:
        middle = len(body) // 2
        return [*body[:middle], {"edited": body[middle] if middle % 2 else middle}, *body[middle + 1 :]]
    return {"edited": 1}


CHANGES: Final[list[Callable[[Any], Any]]] = [
    grown,
    lambda body: grown(grown(body)),
    lambda body: body[:-1] if isinstance(body, list) else body,
    _edited,
    lambda body: body[::-1] if isinstance(body, list) else [body],
    lambda body: [*body[1:], *body[:1]] if isinstance(body, list) else {"was": body},
    lambda _: KEEP,
]
