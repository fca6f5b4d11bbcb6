"""What the demo's agents can do: list the standard library, measure a module, review it."""

from __future__ import annotations

import ast
import re
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

MOST_MODULES: Final = 600
"""Enough for all of CPython's own library; bounds the demo where somebody put more there."""

LONG_FUNCTION_LINES: Final = 80
MANY_ARGUMENTS: Final = 8

RULES: Final = {
    "bare-except": "an except clause names what it catches",
    "long-function": f"a function has {LONG_FUNCTION_LINES} lines at most",
    "many-arguments": f"a function takes {MANY_ARGUMENTS} arguments at most",
    "mutable-default": "a default value is not a list, a dict or a set",
    "note-to-self": "a comment says neither TODO nor FIXME nor XXX",
    "undocumented": "a public function or class has a docstring",
}
"""The reviewer's rules: part of what it knew when it reviewed, so it stores them with each review."""

_SKIPPED: Final = frozenset(
    {"__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)
_NOTE: Final = re.compile(r"#.*\b(TODO|FIXME|XXX)\b")
_MOST_LISTED: Final = 20

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(msgspec.Struct, frozen=True):
    """A module of the library: its dotted name and its source."""

    name: str
    source: str


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """What the surveyor measures.  ``coverage`` is the share of public definitions with a docstring."""

    module: str
    source: str
    """The reference of the source that was measured."""
    lines: int
    functions: int
    classes: int
    public: int
    documented: int
    coverage: float
    longest_function: str | None
    longest_lines: int
    imports: list[str]


class Finding(msgspec.Struct, frozen=True):
    """One place that breaks a rule."""

    rule: str
    line: int
    what: str


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """What the reviewer found; of each rule at most ``20`` places are listed, all are counted."""

    module: str
    measures: str
    """The reference of the measures that the review is based on."""
    findings: int
    by_rule: dict[str, int]
    listed: list[Finding]


def list_modules() -> Iterator[Module]:
    """Yields the modules of this machine's standard library, by name; blocks on the disk.

    Files that are no UTF-8 are passed over.
    """
    root = Path(sysconfig.get_path("stdlib"))
    count = 0
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED or part.startswith("config-") for part in parts[:-1]):
            continue
        try:
            source = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        names = [*parts[:-1], path.stem] if path.stem != "__init__" else list(parts[:-1])
        yield Module(".".join(names) or path.stem, source)
        count += 1
        if count >= MOST_MODULES:
            return


def measure(name: str, source: str, source_ref: str) -> Measures:
    """Returns the measures of a module; of one that does not parse, its lines alone."""
    nodes = list(ast.walk(parse_module(source)))
    functions = [node for node in nodes if isinstance(node, Function)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    public = [node for node in (*functions, *classes) if not node.name.startswith("_")]
    documented = sum(ast.get_docstring(node, clean=False) is not None for node in public)
    longest = max(functions, key=_length, default=None)
    return Measures(
        module=name,
        source=source_ref,
        lines=source.count("\n"),
        functions=len(functions),
        classes=len(classes),
        public=len(public),
        documented=documented,
        coverage=round(documented / len(public), 3) if public else 1.0,
        longest_function=None if longest is None else longest.name,
        longest_lines=0 if longest is None else _length(longest),
        imports=sorted(set(_imports(nodes))),
    )


def review(measures: Measures, source: str, measures_ref: str) -> Review:
    """Returns what breaks the rules in a module."""
    tree = parse_module(source)
    findings = [*_review_tree(tree), *_review_comments(source)]
    findings.sort(key=lambda finding: (finding.line, finding.rule))
    by_rule: dict[str, int] = {}
    listed: list[Finding] = []
    for finding in findings:
        by_rule[finding.rule] = by_rule.get(finding.rule, 0) + 1
        if by_rule[finding.rule] <= _MOST_LISTED:
            listed.append(finding)
    return Review(module=measures.module, measures=measures_ref, findings=len(findings), by_rule=by_rule, listed=listed)


# CPython 3.11 keeps the depth of an AST under construction for the whole interpreter: when a finalizer lets another
# thread in, and that one parses too, both may end in "SystemError: AST constructor recursion depth mismatch".
_PARSER: Final = threading.Lock()


def parse_module(source: str) -> ast.Module:
    """Returns the tree of a module's source, an empty one when it does not parse; safe to call from several threads."""
    try:
        with _PARSER:
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module(body=[], type_ignores=[])


def _length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _review_tree(tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield Finding("bare-except", node.lineno, "catches everything, also a Ctrl-C")
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_public = not node.name.startswith("_")
            if is_public and ast.get_docstring(node, clean=False) is None:
                yield Finding("undocumented", node.lineno, node.name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _review_function(node)


def _review_function(node: Function) -> Iterator[Finding]:
    if _length(node) > LONG_FUNCTION_LINES:
        yield Finding("long-function", node.lineno, f"{node.name} has {_length(node)} lines")
    arguments = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
    if arguments > MANY_ARGUMENTS:
        yield Finding("many-arguments", node.lineno, f"{node.name} takes {arguments}")
    for default in (*node.args.defaults, *node.args.kw_defaults):
        if isinstance(default, ast.List | ast.Dict | ast.Set):
            yield Finding("mutable-default", node.lineno, f"{node.name} shares it between calls")


def _review_comments(source: str) -> Iterator[Finding]:
    for number, line in enumerate(source.splitlines(), 1):
        if _NOTE.search(line):
            yield Finding("note-to-self", number, line.partition("#")[2].strip()[:100])
