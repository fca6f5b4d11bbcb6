"""Which test shows which row of the acceptance list: ``python -m tests.acceptance`` writes ``docs/acceptance.md``.

A test shows a row by carrying its id in its name, between underscores: ``test_A13_…``, or ``test_A05_A11_…`` for two.
The rows are in ``tests/acceptance_rows.toml``.  Holds no tests itself.
"""

from __future__ import annotations

import ast
import gc
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

ROOT: Final = Path(__file__).resolve().parents[1]
ROWS: Final = ROOT / "tests" / "acceptance_rows.toml"
PAGE: Final = ROOT / "docs" / "acceptance.md"
NOT_YET: Final = "no test yet"

_ID: Final = re.compile(r"[A-E]\d{2,3}")
_NUMBER: Final = re.compile(r"([A-E])(\d+)")
_NEVER_RUN: Final = frozenset({"skip", "xfail"})
_HEAD: Final = """\
# What Holdfast does, and the test that shows it

Each row is something that users of earlier context stores could do, or were promised. A test carries the ids of the
rows that it shows in its name; a row without one may be there all the same. This page is written by
`python -m tests.acceptance`; a test fails when it is out of date.
"""


class Row(NamedTuple):
    """One feature; ``kind`` is a letter of :attr:`AcceptanceList.kinds`."""

    id: str
    kind: str
    title: str


class AcceptanceList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rows by section, and those that must have a test by now, as ids and ranges of them (``A01-A29``)."""

    due: list[str]
    kinds: dict[str, str]
    sections: dict[str, str]
    rows: dict[str, tuple[str, str]]

    def all_rows(self) -> list[Row]:
        """Returns every row, in the order of the file."""
        return [Row(identity, kind, title) for identity, (kind, title) in self.rows.items()]

    def due_ids(self) -> list[str]:
        """Returns the ids of the rows that must have a test; raises ValueError for one that there is none of."""
        return [identity for part in self.due for identity in _expand(part, self.rows)]


class ShownBy(NamedTuple):
    """A test, by its file from the root of the project and its name."""

    path: str
    name: str


def load_rows(path: Path = ROWS) -> AcceptanceList:
    """Returns the acceptance list."""
    return msgspec.convert(tomllib.loads(path.read_text("utf-8")), AcceptanceList)


def _expand(part: str, rows: Iterable[str]) -> list[str]:
    known = list(rows)
    first, _, last = part.partition("-")
    for identity in (first, last or first):
        if identity not in known:
            raise ValueError(f"there is no row {identity!r}")
    return known[known.index(first) : known.index(last or first) + 1]


def ids_in(name: str) -> list[str]:
    """Returns the ids of rows that a test's name carries."""
    return [part for part in name.split("_") if _ID.fullmatch(part)]


def find_tests(tests: Path = ROOT / "tests") -> dict[str, list[ShownBy]]:
    """Returns the tests that carry an id, by id; one that is skipped or expected to fail, whatever happens, is none.

    ``tests`` is read as text: nothing is imported.
    """
    found: dict[str, list[ShownBy]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for name in _test_names(_parsed(path)):
            for identity in ids_in(name):
                shown = ShownBy(path.relative_to(tests.parent).as_posix(), name)
                if shown not in found.setdefault(identity, []):
                    found[identity].append(shown)
    return found


def _parsed(path: Path) -> ast.Module:
    # A finalizer that runs while CPython 3.11 builds a tree makes it a SystemError.
    gc.disable()
    try:
        return ast.parse(path.read_text("utf-8"))
    finally:
        gc.enable()


def _test_names(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        functions = node.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test") else [node]
        for function in functions:
            if (
                isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
                and function.name.startswith("test_")
                and not any(_never_runs(decorator) for decorator in function.decorator_list)
            ):
                yield function.name


def _never_runs(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Attribute) and called.attr in _NEVER_RUN


def write_page(accepted: AcceptanceList, shown: dict[str, list[ShownBy]]) -> str:
    """Returns the page: a table a section, in which every row has its tests or ``no test yet``."""
    rows = accepted.all_rows()
    done = sum(1 for row in rows if row.id in shown)
    lines = [_HEAD, f"{done} of {len(rows)} rows have a test.", ""]
    for letter, title in accepted.sections.items():
        lines += [f"## {title}", "", "| row | kind | what | shown by |", "| --- | --- | --- | --- |"]
        for row in rows:
            if row.id.startswith(letter):
                tests = "<br>".join(_link(test) for test in shown.get(row.id, [])) or NOT_YET
                lines.append(f"| {row.id} | {accepted.kinds[row.kind]} | {row.title} | {tests} |")
        lines.append("")
    return "\n".join(lines)


def _link(test: ShownBy) -> str:
    return f"[{test.name}](../{test.path})"


def problems(accepted: AcceptanceList, shown: dict[str, list[ShownBy]]) -> list[str]:
    """Returns what is wrong: tests of rows that there are none of, and rows that are due and have no test."""
    found = [
        f"{test.path}: {test.name} names {identity}, and there is no such row"
        for identity, tests in shown.items()
        if identity not in accepted.rows
        for test in tests
    ]
    missing = [identity for identity in accepted.due_ids() if identity not in shown]
    return found + [f"{identity} is due and has no test: {accepted.rows[identity][1]}" for identity in missing]


def gaps_in_numbers(accepted: AcceptanceList) -> list[str]:
    """Returns the ids before which a number is left out or out of order; a section counts from 1."""
    last = dict.fromkeys(accepted.sections, 0)
    found: list[str] = []
    for identity in accepted.rows:
        matched = _NUMBER.fullmatch(identity)
        if matched is None or int(matched[2]) != last[matched[1]] + 1:
            found.append(identity)
        else:
            last[matched[1]] += 1
    return found


def main() -> int:
    """Writes the page, tells what is wrong, and returns the exit status."""
    accepted, shown = load_rows(), find_tests()
    PAGE.write_text(write_page(accepted, shown), "utf-8")
    found = problems(accepted, shown)
    for problem in found:
        print(problem)  # noqa: T201  a script of the command line
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
