"""What each change makes of the present version: decided without a server, a clock or a key ring."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client import key_changes
from holdfast.client.growing import row_of_context
from holdfast.client.key_changes import UNCHANGED, Meta
from holdfast.client.key_writer import Decide, Draft, State
from holdfast.client.model import Context
from holdfast.schemas import limits
from holdfast.schemas.bodies import TEXT, encode_json
from holdfast.schemas.errors import (
    HoldfastError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
    NotFoundError,
    TooLargeError,
    VersionConflictError,
)
from holdfast.schemas.policies import KeyPolicy, Policies
from holdfast.schemas.refs import JSON, Digest, format_ref
from holdfast.schemas.rows import KeyVersionRow, Op
from holdfast.streams.hot import NewContext
from tests.support import examples

AT_MS = 1_800_000_000_000
NS = "ns"
KEY = "plan.trip"
NOTHING = Meta(agent_id="a")
NO_POLICY = KeyPolicy()
REF = format_ref("plan", Digest("a" * 32))


def row(version: int = 3, op: Op = "put", **fields: Any) -> KeyVersionRow:
    values: dict[str, Any] = {"ref": None if op in ("delete", "expire") else REF, **fields}
    return KeyVersionRow(
        namespace=NS,
        key=KEY,
        version=version,
        op=op,
        timestamp_ms=AT_MS - 5_000,
        stored_at_ms=AT_MS - 5_000,
        epoch="e",
        seq=9,
        **values,
    )


def state(body: Any = UNCHANGED, *, kind: str = "plan", content_type: str = JSON, **fields: Any) -> State:
    """The present version, alive, with a body when one is given."""
    context = None
    if body is not UNCHANGED:
        raw = body if isinstance(body, bytes) else encode_json(body)
        new = NewContext(namespace=NS, kind=kind, body=raw, content_type=content_type)
        context = Context(row_of_context(new), "cache")
    return State(row(**fields), True, AT_MS, context)


ABSENT = State(None, False, AT_MS)
DELETED = State(row(4, "delete", tags=("old",), session_id="s0"), False, AT_MS)
EXPIRED = State(row(5, expires_at_ms=AT_MS - 1, tags=("old",), session_id="s0"), False, AT_MS)


def body_of(draft: Draft | None) -> Any:
    assert draft is not None
    assert draft.body is not None
    return Context(row_of_context(draft.body), "cache").body


def put(expected: int | None = None, meta: Meta = NOTHING, policy: KeyPolicy = NO_POLICY) -> Decide:
    return key_changes.put(KEY, NewContext(namespace=NS, kind="plan", body=b"{}"), meta, expected, policy)


def update(change: Any, meta: Meta = NOTHING, policy: KeyPolicy = NO_POLICY, **options: Any) -> Decide:
    values: dict[str, Any] = {"namespace": NS, "op": "patch", "default": {}, "kind": "context", **options}
    return key_changes.update(KEY, change, meta, values.pop("expected", None), policy, **values)


def rollback(expected: int | None = None, meta: Meta = NOTHING, policy: KeyPolicy = NO_POLICY) -> Decide:
    return key_changes.rollback(KEY, row(1, tags=("t1",), session_id="s1"), meta, expected, policy)


def changes(expected: int | None) -> list[Decide]:
    return [
        put(expected),
        update(lambda body: body, expected=expected),
        key_changes.delete(KEY, NOTHING, expected),
        rollback(expected),
    ]


# Expected versions.


@pytest.mark.parametrize("expected", [None, 3])
def test_the_newest_version_may_be_expected_or_anything(expected: int | None) -> None:
    for decide in changes(expected):
        assert decide(state({})) is not None


@pytest.mark.parametrize("expected", [0, 1, 2, 4, 99])
def test_another_version_is_a_conflict_that_carries_both(expected: int) -> None:
    for decide in changes(expected):
        with pytest.raises(VersionConflictError) as caught:
            decide(state({}))
        assert (caught.value.key, caught.value.expected, caught.value.actual) == (KEY, expected, 3)


@pytest.mark.parametrize(("gone", "last"), [(ABSENT, None), (DELETED, 4), (EXPIRED, 5)])
def test_nothing_is_expected_as_version_zero_and_a_tombstone_also_by_its_number(gone: State, last: int | None) -> None:
    for decide in (put(0), update(lambda body: body, expected=0), rollback(0)):
        assert decide(gone) is not None
    if last is not None:
        assert put(last)(gone) is not None
    with pytest.raises(VersionConflictError) as caught:
        put(3)(gone)
    assert (caught.value.expected, caught.value.actual) == (3, 0)


@pytest.mark.parametrize("expected", [-1, True, "3", 3.0])
def test_what_is_no_version_is_never_expected(expected: Any) -> None:
    for make in (put, rollback, lambda wrong: key_changes.delete(KEY, NOTHING, wrong)):
        with pytest.raises(InvalidFieldError) as caught:
            make(expected)
        assert caught.value.field == "expected_version"


# Time to live.

WITH_EXPIRY: dict[str, Any] = {"expires_at_ms": AT_MS + 77_000}


@pytest.mark.parametrize(
    ("ttl_ms", "policy_s", "after_put", "after_update"),
    [
        (None, None, None, 77_000),
        (None, 60.0, 60_000, 77_000),
        (5_000.0, None, 5_000, 5_000),
        (5_000.0, 60.0, 5_000, 5_000),
        (math.inf, 60.0, None, None),
    ],
)
def test_E31_a_put_takes_its_own_ttl_or_the_policys_and_a_change_keeps_what_was(
    ttl_ms: float | None, policy_s: float | None, after_put: int | None, after_update: int | None
) -> None:
    meta, policy = Meta(ttl_ms=ttl_ms), KeyPolicy(ttl_s=policy_s)
    now = state({}, **WITH_EXPIRY)
    for decide, after in (
        (put(None, meta, policy), after_put),
        (rollback(None, meta, policy), after_update),
        (update(lambda body: body, meta, policy), after_update),
    ):
        draft = decide(now)
        assert draft is not None
        assert draft.expires_at_ms == (None if after is None else AT_MS + after)


@pytest.mark.parametrize("gone", [ABSENT, DELETED, EXPIRED])
def test_E31_a_key_that_begins_anew_has_the_policys_ttl(gone: State) -> None:
    draft = update(lambda body: body, policy=KeyPolicy(ttl_s=60.0))(gone)
    assert draft is not None
    assert draft.expires_at_ms == AT_MS + 60_000


# Tags and sessions.


def test_E34_a_put_has_the_tags_it_was_given_and_no_others() -> None:
    draft = put(meta=Meta(tags=("new",), session_id="s2"))(state({}, tags=("old",), session_id="s0"))
    assert draft is not None
    assert (draft.tags, draft.session_id) == (("new",), "s2")
    bare = put()(state({}, tags=("old",), session_id="s0"))
    assert bare is not None
    assert (bare.tags, bare.session_id) == ((), None)


def test_E34_an_update_keeps_tags_and_session_unless_given_others() -> None:
    now = state({}, tags=("old",), session_id="s0")
    kept = update(lambda body: body)(now)
    assert kept is not None
    assert (kept.tags, kept.session_id) == (("old",), "s0")
    given_others = update(lambda body: body, Meta(tags=(), session_id="s2"))(now)
    assert given_others is not None
    assert (given_others.tags, given_others.session_id) == ((), "s2")
    anew = update(lambda body: body)(DELETED)
    assert anew is not None
    assert (anew.tags, anew.session_id) == ((), None)


def test_a_tombstone_keeps_the_tags_and_a_rollback_brings_back_the_old_ones() -> None:
    tombstone = key_changes.delete(KEY, NOTHING, None)(state({}, tags=("t3",), session_id="s3"))
    assert tombstone is not None
    assert (tombstone.op, tombstone.body, tombstone.ref) == ("delete", None, None)
    assert (tombstone.tags, tombstone.session_id) == (("t3",), "s3")
    back = rollback()(DELETED)
    assert back is not None
    assert (back.op, back.ref, back.tags, back.session_id) == ("rollback", REF, ("t1",), "s1")


def test_E37_E38_who_changed_what_how_is_said_as_given() -> None:
    meta = Meta(agent_id="a1", changed_by="ann", change_type="append")
    for decide in (put(meta=meta), update(lambda body: body, meta), rollback(meta=meta)):
        draft = decide(state({}))
        assert draft is not None
        assert (draft.agent_id, draft.changed_by, draft.change_type) == ("a1", "ann", "append")


# Updates.


@pytest.mark.parametrize("gone", [ABSENT, DELETED, EXPIRED])
def test_an_absent_key_begins_with_a_copy_of_the_default(gone: State) -> None:
    default: dict[str, Any] = {"list": []}
    decide = update(lambda body: body["list"].append(1) or body, default=default)
    assert [body_of(decide(gone)) for _ in range(2)] == [{"list": [1]}] * 2
    assert default == {"list": []}


def test_every_call_of_a_change_has_a_body_of_its_own() -> None:
    decide = update(lambda body: body.append(1) or body)
    now = state([0])
    assert [body_of(decide(now)) for _ in range(3)] == [[0, 1]] * 3


def test_an_update_keeps_the_kind_whatever_was_written_last() -> None:
    """Also that of a version which is not stored yet, and so has no reference."""
    for now in (state({}), state({}, ref=None)):
        draft = update(lambda body: body)(now)
        assert draft is not None
        assert draft.body is not None
        assert draft.body.kind == "plan"
    anew = update(lambda body: body, kind="note")(DELETED)
    assert anew is not None
    assert anew.body is not None
    assert anew.body.kind == "note"


def test_unchanged_writes_nothing() -> None:
    assert update(lambda _: UNCHANGED)(state({})) is None
    assert update(lambda _: UNCHANGED)(ABSENT) is None
    assert repr(UNCHANGED) == "UNCHANGED"


@pytest.mark.parametrize(
    ("policy", "given_encrypt", "expected"),
    [(None, None, False), (True, None, True), (True, False, False), (None, True, True), (False, True, True)],
)
def test_E32_a_new_key_is_encrypted_as_said_or_as_its_prefix_says(
    policy: bool | None, given_encrypt: bool | None, expected: bool
) -> None:
    draft = update(lambda body: body, policy=KeyPolicy(encrypt=policy), encrypt=given_encrypt)(ABSENT)
    assert draft is not None
    assert draft.encrypt is expected


def test_E32_what_is_not_encrypted_stays_so_unless_said() -> None:
    kept = update(lambda body: body, policy=KeyPolicy(encrypt=True))(state({}))
    assert kept is not None
    assert kept.encrypt is False


def test_a_body_that_is_not_json_is_not_patched() -> None:
    with pytest.raises(InvalidBodyError, match="not JSON") as caught:
        update(lambda body: body)(state(b"plain words", content_type=TEXT))
    assert caught.value.field == "body"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (nested(limits.NESTING + 1), InvalidFieldError),
        (object(), InvalidBodyError),
        (math.nan, InvalidBodyError),
        ("x" * (limits.BODY_BYTES + 1), TooLargeError),
    ],
    ids=["nesting", "object", "nan", "size"],
)
def test_a_body_that_cannot_be_stored_is_refused(made: Any, error: type[HoldfastError]) -> None:
    with pytest.raises(error) as caught:
        update(lambda _: made)(state({}))
    assert caught.value.field == "body"


def test_what_a_change_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        update(lambda body: body["n"] / 0)(state({"n": 1}))


def test_appending_takes_a_list_and_leaves_it_as_it_was() -> None:
    items = [1]
    assert key_changes.appended(KEY, 2)(items) == [1, 2]
    assert items == [1]
    others: list[Any] = [{}, "text", None, 5]
    for other in others:
        with pytest.raises(InvalidBodyError, match="not a list"):
            key_changes.appended(KEY, 2)(other)


def test_a_patch_is_checked_before_anything_is_read() -> None:
    deep: Any = 1
    for _ in range(5_000):
        deep = {"a": deep}
    for wrong in ({"a": nested(limits.NESTING)}, {"a": object()}, {"a": math.inf}, {"a": deep}):
        with pytest.raises(InvalidFieldError) as caught:
            key_changes.merged(wrong)
        assert caught.value.field == "merge"


class Note(msgspec.Struct):
    text: str


def test_a_patch_is_what_json_makes_of_it() -> None:
    patched = key_changes.merged({"t": (1, 2), "n": Note("hi")})({"n": {"by": "ann"}, "x": 0})
    assert patched == {"t": [1, 2], "n": {"by": "ann", "text": "hi"}, "x": 0}
    not_text: Any = {1: "new"}
    with pytest.raises(InvalidBodyError):
        key_changes.merged(not_text)


@examples(100)
@given(
    st.dictionaries(st.sampled_from("abc"), st.integers()),
    st.lists(st.dictionaries(st.sampled_from("abc"), st.none() | st.integers(), max_size=2), max_size=6),
)
def test_changes_one_after_the_other_are_as_on_a_plain_dict(
    body: dict[str, int], patches: list[dict[str, Any]]
) -> None:
    now, model = state(body), dict(body)
    for patch in patches:
        draft = update(key_changes.merged(patch))(now)
        for name, value in patch.items():
            if value is None:
                model.pop(name, None)
            else:
                model[name] = value
        assert body_of(draft) == model
        now = state(body_of(draft))


# Commits.


def commit(bodies: Any, deletes: Any = (), expected: Any = None, policies: Policies | None = None) -> dict[str, Decide]:
    return key_changes.commit(NS, bodies, deletes, expected or {}, NOTHING, policies or Policies(), kind="plan")


def test_E14_a_commit_is_a_change_for_each_key() -> None:
    decisions = commit({"a": {"x": 1}, "b": "text"}, ["c", "c"], {"a": 3})
    assert list(decisions) == ["a", "b", "c"]
    assert body_of(decisions["a"](state({}))) == {"x": 1}
    assert body_of(decisions["b"](ABSENT)) == "text"
    tombstone = decisions["c"](state({}))
    assert tombstone is not None
    assert tombstone.op == "delete"
    with pytest.raises(NotFoundError):
        decisions["c"](ABSENT)
    with pytest.raises(VersionConflictError):
        decisions["a"](state({}, version=4))


def test_E31_E32_the_policy_of_each_key_holds_in_a_commit() -> None:
    policies = Policies(prefixes={"s.": KeyPolicy(ttl_s=5.0, encrypt=True)})
    decisions = commit({"s.a": 1, "t.a": 1}, policies=policies)
    drafts = [decide(ABSENT) for decide in decisions.values()]
    assert [(draft.encrypt, draft.expires_at_ms) for draft in drafts if draft is not None] == [
        (True, AT_MS + 5_000),
        (False, None),
    ]


@pytest.mark.parametrize(
    ("bodies", "deletes", "expected", "error", "field"),
    [
        ({str(n): 1 for n in range(limits.COMMIT_KEYS + 1)}, (), {}, TooLargeError, "bodies"),
        ({"a": 1}, [str(n) for n in range(limits.COMMIT_KEYS)], {}, TooLargeError, "bodies"),
        ({"a": 1}, ["a"], {}, InvalidFieldError, "deletes"),
        ({"a": 1}, "bc", {}, InvalidFieldError, "deletes"),
        ({"a": 1}, (), {"b": 1}, InvalidFieldError, "expected"),
        ({"a": 1}, (), {"a": "1"}, InvalidFieldError, "expected_version"),
        ({"": 1}, (), {}, InvalidNameError, "key"),
        ({"a": 1}, ["x" * 769], {}, InvalidNameError, "key"),
        ({"a": object()}, (), {}, InvalidBodyError, "body"),
    ],
)
def test_E14_a_commit_that_cannot_be_is_refused_as_a_whole(
    bodies: Any, deletes: Any, expected: Any, error: type[HoldfastError], field: str
) -> None:
    with pytest.raises(error) as caught:
        commit(bodies, deletes, expected)
    assert caught.value.field == field
