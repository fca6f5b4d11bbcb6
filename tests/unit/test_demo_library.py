"""What the demo's agents can do, on sources small enough to know the answer."""

from __future__ import annotations

from holdfast.ops.demo.library import RULES, list_modules, measure, review

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
