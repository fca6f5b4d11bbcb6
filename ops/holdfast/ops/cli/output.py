"""What commands write: data to stdout and nothing else there; errors and remarks to stderr.

With ``--json`` data is one JSON object a line, and an error is ``{"error": {"code", "message", "field", "limit",
"hint"}}`` on stderr; otherwise an error is one line, ``error: <what happened>; <what to do>``.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.errors import HoldfastError

if TYPE_CHECKING:
    from rich.console import Console

DEBUG_VARIABLE: Final = "HOLDFAST_DEBUG"

_ENCODER: Final = msgspec.json.Encoder(enc_hook=str, decimal_format="number")
_WIDEST: Final = 10_000


def write_json(value: object) -> None:
    """Writes one line of JSON to stdout."""
    sys.stdout.buffer.write(_ENCODER.encode(value) + b"\n")


def write_bytes(raw: bytes) -> None:
    """Writes exact bytes to stdout."""
    sys.stdout.buffer.write(raw)


def write_line(text: str = "") -> None:
    """Writes a line of text to stdout."""
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")


def flush() -> None:
    """Hands what was written to the reader now."""
    sys.stdout.flush()


def remark(text: str) -> None:
    """Writes a line to stderr: for a person, not for a program."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """Writes a table to stdout; ``right`` are the columns to align on their right.

    On a terminal it fits the width of the screen; in a file or a pipe nothing is cut.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    aligned_right = frozenset(right)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in aligned_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    stdout_console().print(table)


def stdout_console() -> Console:
    """Returns a rich console on stdout: as wide as the screen, or as wide as needed where there is none."""
    from rich.console import Console

    sys.stdout.flush()
    return Console(width=None if sys.stdout.isatty() else _WIDEST, highlight=False, soft_wrap=False)


def report_error(error: BaseException, *, as_json: bool) -> None:
    """Tells an error on stderr, without a traceback unless ``HOLDFAST_DEBUG`` is set."""
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error, file=sys.stderr)
    body = describe_error(error)
    if as_json:
        remark(msgspec.json.encode({"error": body}).decode())
        return
    hint = f"; {body['hint']}" if body["hint"] else ""
    remark(f"error: {_one_line(body['message'])}{_one_line(hint)}")


def describe_error(error: BaseException) -> dict[str, Any]:
    """Returns an error as the members of its JSON form."""
    if isinstance(error, HoldfastError):
        body = {
            "code": error.code,
            "message": error.message,
            "field": error.field,
            "limit": error.limit,
            "hint": error.hint,
        }
        details = {name: getattr(error, name) for name in error.details}
        return {**body, "details": details} if details else body
    return {
        "code": "internal",
        "message": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
        "field": None,
        "limit": None,
        "hint": f"set {DEBUG_VARIABLE}=1 to see where; please report it",
    }


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))
