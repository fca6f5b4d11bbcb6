"""RFC 7386, JSON Merge Patch: the examples of its appendix, and what holds for all patches."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client.merging import merge_patch
from tests.support import examples

# Appendix A: original, patch, result.
APPENDIX_A = [
    ('{"a":"b"}', '{"a":"c"}', '{"a":"c"}'),
    ('{"a":"b"}', '{"b":"c"}', '{"a":"b","b":"c"}'),
    ('{"a":"b"}', '{"a":null}', "{}"),
    ('{"a":"b","b":"c"}', '{"a":null}', '{"b":"c"}'),
    ('{"a":["b"]}', '{"a":"c"}', '{"a":"c"}'),
    ('{"a":"c"}', '{"a":["b"]}', '{"a":["b"]}'),
    ('{"a":{"b":"c"}}', '{"a":{"b":"d","c":null}}', '{"a":{"b":"d"}}'),
    ('{"a":[{"b":"c"}]}', '{"a":[1]}', '{"a":[1]}'),
    ('["a","b"]', '["c","d"]', '["c","d"]'),
    ('{"a":"b"}', '["c"]', '["c"]'),
    ('{"a":"foo"}', "null", "null"),
    ('{"a":"foo"}', '"bar"', '"bar"'),
    ('{"e":null}', '{"a":1}', '{"e":null,"a":1}'),
    ("[1,2]", '{"a":"b","c":null}', '{"a":"b"}'),
    ("{}", '{"a":{"bb":{"ccc":null}}}', '{"a":{"bb":{}}}'),
]


@pytest.mark.parametrize(("original", "patch", "result"), APPENDIX_A)
def test_the_examples_of_the_rfc(original: str, patch: str, result: str) -> None:
    assert merge_patch(json.loads(original), json.loads(patch)) == json.loads(result)


def test_the_example_of_section_three() -> None:
    original = {
        "title": "Goodbye!",
        "author": {"givenName": "John", "familyName": "Doe"},
        "tags": ["example", "sample"],
        "content": "This will be unchanged",
    }
    patch = {"title": "Hello!", "phoneNumber": "+01-123-456-7890", "author": {"familyName": None}, "tags": ["example"]}
    assert merge_patch(original, patch) == {
        "title": "Hello!",
        "author": {"givenName": "John"},
        "tags": ["example"],
        "content": "This will be unchanged",
        "phoneNumber": "+01-123-456-7890",
    }


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "ü"])
NAMES = st.sampled_from(["a", "b", "c", ""])
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=12
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=4)


def by_the_book(target: Any, patch: Any) -> Any:
    """The RFC's own algorithm, section 2, which changes its target."""
    if isinstance(patch, dict):
        if not isinstance(target, dict):
            target = {}
        for name, value in patch.items():
            if value is None:
                target.pop(name, None)
            else:
                target[name] = by_the_book(target.get(name), value)
        return target
    return patch


@examples(300)
@given(VALUES, VALUES)
def test_it_is_what_the_rfc_describes_and_changes_nothing_it_was_given(target: Any, patch: Any) -> None:
    kept = copy.deepcopy((target, patch))
    merged = merge_patch(target, patch)
    assert (target, patch) == kept
    assert merged == by_the_book(copy.deepcopy(target), copy.deepcopy(patch))


@examples(200)
@given(VALUES, VALUES)
def test_the_same_patch_again_changes_nothing(target: Any, patch: Any) -> None:
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once


@examples(200)
@given(OBJECTS)
def test_an_empty_patch_changes_nothing(target: Any) -> None:
    assert merge_patch(target, {}) == target


@examples(200)
@given(OBJECTS, OBJECTS, OBJECTS)
def test_patches_of_different_members_may_come_in_any_order(target: Any, one: Any, other: Any) -> None:
    one = {name: value for name, value in one.items() if name in ("a", "b")}
    other = {name: value for name, value in other.items() if name in ("c", "")}
    assert merge_patch(merge_patch(target, one), other) == merge_patch(merge_patch(target, other), one)


@examples(200)
@given(OBJECTS)
def test_what_is_null_in_a_patch_is_nowhere_in_what_it_makes_of_nothing(patch: Any) -> None:
    def members(value: Any) -> list[Any]:
        return [x for item in value.values() for x in [item, *members(item)]] if isinstance(value, dict) else []

    assert None not in members(merge_patch({}, patch))
