from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.schemas.errors import InvalidFieldError, TooLargeError
from holdfast.schemas.policies import (
    DEFAULT_POLICIES,
    POLICIES_BYTES,
    KeyPolicy,
    Policies,
    decode_policies,
)


def test_E25_E26_the_documented_body_decodes() -> None:
    body = b'{"v":1,"prefixes":{"store.":{"ttl_s":86400,"max_versions":10,"encrypt":false}}}'
    policy = decode_policies(body).policy_for("store.plan")
    assert policy == KeyPolicy(ttl_s=86_400, max_versions=10, encrypt=False)


def test_E26_stores_keep_ten_versions_hot_unless_a_policy_says_otherwise() -> None:
    assert DEFAULT_POLICIES.policy_for("store.plan").max_versions == 10
    assert DEFAULT_POLICIES.policy_for("store").max_versions is None
    assert DEFAULT_POLICIES.policy_for("plan.store.x") == KeyPolicy()
    for written, kept in ((3, 3), (0, None)):
        policies = Policies(prefixes={"store.": KeyPolicy(max_versions=written)})
        assert policies.policy_for("store.plan").max_versions == kept
    only_ttl = Policies(prefixes={"store.": KeyPolicy(ttl_s=5)})
    assert only_ttl.policy_for("store.plan") == KeyPolicy(ttl_s=5, max_versions=10)


def test_each_member_is_taken_from_the_longest_prefix_that_sets_it() -> None:
    policies = Policies(
        prefixes={
            "": KeyPolicy(ttl_s=60, encrypt=True),
            "a.": KeyPolicy(max_versions=5),
            "a.b": KeyPolicy(ttl_s=0),
            "a.b.": KeyPolicy(max_versions=2, encrypt=False),
        }
    )
    assert policies.policy_for("z") == KeyPolicy(ttl_s=60, encrypt=True)
    assert policies.policy_for("a.c") == KeyPolicy(ttl_s=60, max_versions=5, encrypt=True)
    assert policies.policy_for("a.bc") == KeyPolicy(ttl_s=None, max_versions=5, encrypt=True)
    assert policies.policy_for("a.b.c") == KeyPolicy(ttl_s=None, max_versions=2, encrypt=False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"v":2}',
        b'{"prefixes":{"a":{"ttl":5}}}',
        b'{"prefixes":{"a":{"ttl_s":-1}}}',
        b'{"prefixes":{"a":{"ttl_s":1e300}}}',
        b'{"prefixes":{"a":{"max_versions":1.5}}}',
        b'{"prefixes":{"a":{"max_versions":-1}}}',
        b'{"prefixes":{"a":5}}',
        b'{"rules":{}}',
        b'\xff{"v":1}',
        b'{"prefixes":' + b'{"a":' * 100_000,
        b'{"prefixes":{"' + b"a" * 769 + b'":{}}}',
    ],
)
def test_what_is_no_policy_is_refused_by_name(body: bytes) -> None:
    with pytest.raises((InvalidFieldError, TooLargeError)) as caught:
        decode_policies(body)
    assert caught.value.field == "policies"
    assert len(str(caught.value)) < 500


def test_policies_over_their_limit_are_refused_unread() -> None:
    with pytest.raises(TooLargeError):
        decode_policies(b" " * (POLICIES_BYTES + 1))


_POLICY = st.builds(
    KeyPolicy,
    ttl_s=st.none() | st.integers(0, 1000).map(float),
    max_versions=st.none() | st.integers(0, 50),
    encrypt=st.none() | st.booleans(),
)


@given(st.dictionaries(st.text("ab.", max_size=4), _POLICY), st.text("ab.", min_size=1, max_size=6))
def test_what_is_written_is_read_and_limits_are_limits(prefixes: dict[str, KeyPolicy], key: str) -> None:
    policies = Policies(prefixes=prefixes)
    assert decode_policies(msgspec.json.encode(policies)) == policies
    found = policies.policy_for(key)
    assert found.ttl_s is None or found.ttl_s > 0
    assert found.max_versions is None or found.max_versions > 0
