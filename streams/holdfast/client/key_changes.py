"""What each change of a named context makes of the present version: pure decisions, for ``key_writer`` to carry out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from holdfast.client.key_arguments import Ttl, check_expected_version, check_tags, check_ttl_ms
from holdfast.client.key_writer import Decide, Draft, State, absent
from holdfast.client.lineage import scope as current_scope
from holdfast.client.lineage_context import from_dict
from holdfast.client.merging import merge_patch
from holdfast.schemas import limits
from holdfast.schemas.bodies import Body, check_nesting, check_size, encode_body, encode_json
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, TooLargeError, VersionConflictError
from holdfast.schemas.names import check_agent, check_key
from holdfast.schemas.refs import JSON
from holdfast.streams.events import check_id_text
from holdfast.streams.hot import NewContext

if TYPE_CHECKING:
    from holdfast.client.model import Context
    from holdfast.schemas.policies import KeyPolicy, Policies
    from holdfast.schemas.rows import KeyVersionRow, Op


class _Unchanged:
    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = _Unchanged()
"""What the function given to ``update`` returns to write nothing."""


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller says of a change.  None: as it is, or as the prefix's policy says."""

    tags: tuple[str, ...] | None = None
    session_id: str | None = None
    agent_id: str | None = None
    changed_by: str | None = None
    change_type: str | None = None
    ttl_ms: float | None = None


def meta_of(
    agent: str,
    tags: Iterable[str] | None,
    session: str | None,
    ttl: Ttl,
    changed_by: str | None,
    change_type: str | None,
    named_agent: str | None,
    lineage: Mapping[str, Any] | None,
    *,
    is_whole: bool = False,
) -> Meta:
    """Returns what a caller says of a change, checked; an agent that is not named is that of the lineage.

    The lineage is ``lineage``, else that of the current event; ``agent`` signs where nobody is named.  Of a change that
    says all of a version (``is_whole``) the session comes from there as well.
    """
    scope = current_scope()
    context = from_dict(lineage) if lineage is not None else {} if scope is None else scope.context
    if session is None and is_whole:
        session = context.get("session_id")
    named_agent = context.get("agent_id", agent) if named_agent is None else named_agent
    return Meta(
        tags=None if tags is None else check_tags(tags),
        session_id=None if session is None else check_id_text(session, "session"),
        agent_id=check_agent(named_agent),
        changed_by=None if changed_by is None else check_id_text(changed_by, "changed_by"),
        change_type=None if change_type is None else check_id_text(change_type, "change_type"),
        ttl_ms=check_ttl_ms(ttl),
    )


def put(
    key: str, context: NewContext, meta: Meta, expected: int | None, policy: KeyPolicy, *, encrypt: bool = False
) -> Decide:
    """A body in the place of whatever was there."""
    check_expected_version(expected)

    def decide(state: State) -> Draft:
        check_expected(key, state, expected)
        return _draft(meta, op="put", body=context, encrypt=encrypt, expires_at_ms=_expiry(meta, state, policy))

    return decide


def update(
    key: str,
    change: Callable[[Any], Any],
    meta: Meta,
    expected: int | None,
    policy: KeyPolicy,
    *,
    namespace: str,
    op: Op,
    default: Any,
    kind: str,
    encrypt: bool | None = None,
) -> Decide:
    """A body made from the one before; tags, session, kind, expiry and encryption stay unless they are given."""
    check_expected_version(expected)

    def decide(state: State) -> Draft | None:
        check_expected(key, state, expected)
        is_sealed = bool(policy.encrypt) if encrypt is None else encrypt
        old = state.row if state.is_live else None
        if old is None or state.context is None:
            body, own_kind = copy.deepcopy(default), kind
        else:
            body, own_kind = json_body(key, state.context), state.context.kind
            is_sealed = state.context.encrypted if encrypt is None else encrypt
        changed = change(body)
        if changed is UNCHANGED:
            return None
        raw = encode_json(changed)
        check_nesting(raw)
        check_size(raw)
        context = NewContext(namespace=namespace, kind=own_kind, body=raw)
        return _draft(
            meta,
            op=op,
            body=context,
            encrypt=is_sealed,
            tags=meta.tags if meta.tags is not None or old is None else old.tags,
            session_id=meta.session_id if meta.session_id is not None or old is None else old.session_id,
            expires_at_ms=_expiry(meta, state, policy, keep=True),
        )

    return decide


def merged(merge: Mapping[str, Any]) -> Callable[[Any], Any]:
    """An object with another one merged into it."""
    # As JSON holds it, so that a struct is merged as the object it is; and what no body may be is told now.
    raw = encode_json(dict(merge), field="merge")
    check_nesting(raw, field="merge")
    patch = msgspec.json.decode(raw)
    return lambda body: merge_patch(body, patch)


def appended(key: str, item: Any) -> Callable[[Any], Any]:
    """A list with one more item."""

    def change(body: Any) -> Any:
        if not isinstance(body, list):
            raise InvalidBodyError(
                f"the body of {key!r} is {type(body).__name__}, not a list", field="body", hint="use patch or put"
            )
        items = cast("list[object]", body)
        return [*items, item]

    return change


def commit(
    namespace: str,
    bodies: Mapping[str, Body],
    deletes: Iterable[str],
    expected: Mapping[str, int],
    meta: Meta,
    policies: Policies,
    *,
    kind: str,
    encrypt: bool | None = None,
) -> dict[str, Decide]:
    """The changes of one commit, by key; raises a typed error for one that cannot be."""
    if isinstance(deletes, str):
        raise InvalidFieldError("deletes is not a list of keys", field="deletes", hint='such as deletes=["plan.old"]')
    removed = list(dict.fromkeys(deletes))
    keys = [*bodies, *removed]
    if len(keys) > limits.COMMIT_KEYS:
        raise TooLargeError(f"a commit of {len(keys)} keys", field="bodies", limit=limits.COMMIT_KEYS)
    for key in removed:
        if key in bodies:
            raise InvalidFieldError(f"the key {key!r} is to be written and deleted", field="deletes")
    for key in expected:
        if key not in keys:
            raise InvalidFieldError(f"the key {key!r} is expected, and neither written nor deleted", field="expected")
    decisions: dict[str, Decide] = {}
    for key, body in bodies.items():
        raw, content_type = encode_body(body)
        policy = policies.policy_for(check_key(key))
        context = NewContext(namespace=namespace, kind=kind, body=raw, content_type=content_type)
        is_sealed = bool(policy.encrypt) if encrypt is None else encrypt
        decisions[key] = put(key, context, meta, expected.get(key), policy, encrypt=is_sealed)
    for key in removed:
        decisions[check_key(key)] = delete(key, meta, expected.get(key))
    return decisions


def delete(key: str, meta: Meta, expected: int | None) -> Decide:
    """A tombstone; the session and the tags of what was there stay with it."""
    check_expected_version(expected)

    def decide(state: State) -> Draft:
        check_expected(key, state, expected)
        if state.row is None or not state.is_live:
            raise absent(key)
        return _draft(meta, op="delete", tags=state.row.tags, session_id=state.row.session_id)

    return decide


def rollback(key: str, old: KeyVersionRow, meta: Meta, expected: int | None, policy: KeyPolicy) -> Decide:
    """What an old version was: its body, tags and session; the expiry stays as it is, unless one is given."""
    check_expected_version(expected)

    def decide(state: State) -> Draft:
        check_expected(key, state, expected)
        return _draft(
            meta,
            op="rollback",
            ref=old.ref,
            tags=old.tags,
            session_id=old.session_id,
            expires_at_ms=_expiry(meta, state, policy, keep=True),
        )

    return decide


def check_expected(key: str, state: State, expected: int | None) -> None:
    """Raises VersionConflictError unless the newest version is the one expected, 0 standing for "there is none"."""
    if expected is None:
        return
    if expected == state.version or (state.row is not None and expected == state.row.version):
        return
    raise VersionConflictError(
        f"the key {key!r} has version {state.version or 'none'}, not {expected}",
        key=key,
        expected=expected,
        actual=state.version,
        hint="read it again and decide anew",
    )


def json_body(key: str, context: Context) -> Any:
    """Returns a body decoded anew; raises InvalidBodyError when it is not JSON."""
    if context.content_type != JSON:
        raise InvalidBodyError(
            f"the body of {key!r} is {context.content_type}, not JSON", field="body", hint="replace it with put"
        )
    return context.decode()


def _expiry(meta: Meta, state: State, policy: KeyPolicy, *, keep: bool = False) -> int | None:
    if meta.ttl_ms is not None:
        return None if meta.ttl_ms == math.inf else state.at_ms + round(meta.ttl_ms)
    if keep and state.is_live and state.row is not None:
        return state.row.expires_at_ms
    return None if policy.ttl_s is None else state.at_ms + round(policy.ttl_s * 1000)


def _draft(meta: Meta, **fields: Any) -> Draft:
    fields.setdefault("tags", meta.tags)
    fields.setdefault("session_id", meta.session_id)
    fields["tags"] = fields["tags"] or ()
    return Draft(agent_id=meta.agent_id, changed_by=meta.changed_by, change_type=meta.change_type, **fields)
