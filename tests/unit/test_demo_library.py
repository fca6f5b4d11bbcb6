"""What the demo's agents can do, on sources small enough to know the answer."""

from __future__ import annotations

import ast
import gc
import sys
import threading
from pathlib import Path

from holdfast.ops.demo.library import RULES, list_modules, measure, parse_module, review

SOURCE = '''"""A module."""
import json
from os import path

def documented():
    """Has one."""

def undocumented(a, b=[]):  # TODO mend
    try:
        pass
    except:
        pass

class Thing:
    def _private(self): ...
'''


def test_measures_count_what_is_there() -> None:
    measures = measure("sample", SOURCE, "ctx_source_x")
    assert (measures.functions, measures.classes, measures.public, measures.documented) == (3, 1, 3, 1)
    assert measures.coverage == 0.333
    assert measures.longest_function == "undocumented"
    assert measures.imports == ["json", "os"]
    assert measures.source == "ctx_source_x"


def test_a_review_finds_what_breaks_the_rules() -> None:
    found = review(measure("sample", SOURCE, "ctx_source_x"), SOURCE, "ctx_measures_x")
    assert found.by_rule == {"bare-except": 1, "mutable-default": 1, "note-to-self": 1, "undocumented": 2}
    assert found.findings == 5
    assert set(found.by_rule) <= set(RULES)
    assert [finding.line for finding in found.listed] == sorted(finding.line for finding in found.listed)


def test_a_source_that_does_not_parse_is_measured_by_its_lines() -> None:
    measures = measure("broken", "def (:\n\n", "ctx_source_x")
    assert (measures.lines, measures.functions, measures.coverage) == (2, 0, 1.0)


def test_the_library_of_this_machine_is_listed_by_name() -> None:
    names = [module.name for module in list_modules()]
    assert {"ast", "asyncio", "asyncio.tasks", "json.decoder"} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("test.", "site-packages"))]


class _Finalized:
    """Garbage whose collection runs Python code, and so may let another thread in."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        sum(range(200))


def test_two_agents_may_parse_at_once() -> None:
    """On CPython 3.11 without a lock some of these end in a SystemError: a finalizer runs while a tree is built."""
    sources = [path.read_text(errors="ignore") for path in sorted(Path(ast.__file__).parent.glob("*.py"))[:30]]
    errors: list[SystemError] = []

    def parse_all() -> None:
        for source in sources:
            _Finalized()
            try:
                parse_module(source)
            except SystemError as error:
                errors.append(error)

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    threads = [threading.Thread(target=parse_all) for _ in range(4)]
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(50, 2, 2)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)

    assert errors == []
