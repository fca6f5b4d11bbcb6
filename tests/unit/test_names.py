"""Names and subject tokens: any name goes through a subject and comes back; nothing else decodes."""

from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.schemas.errors import InvalidNameError
from holdfast.schemas.names import (
    MARKER,
    check_agent,
    check_event_name,
    check_key,
    check_kind,
    check_namespace,
    decode_token,
    encode_token,
    is_token,
)
from holdfast.streams.wire import (
    dead_subject,
    event_subject,
    hot_subject,
    key_filter,
    key_subject,
    namespace_token,
    parse_event_subject,
    parse_hot_subject,
    parse_key_subject,
    service_subject,
)
from tests.support import examples

if TYPE_CHECKING:
    from collections.abc import Callable

SAFE = re.compile(r"[A-Za-z0-9_-]+\Z")

# What goes wrong in subjects, mixed with anything at all; the marker and pieces of escapes come often.
PIECE_LIST = [
    *(".", "*", ">", "$", " ", "\x00", "\r\n", "\t", "x--", "x-", "_", "-", "_2e", "_2E", "x--_2e"),
    *("ü", "𝄞", "é", "e\u0301", "a", "Z", "0"),
]
PIECES = st.sampled_from(PIECE_LIST)
_PLANES: list[Callable[[Random], int]] = [
    lambda random: random.randrange(0, 0x80),
    lambda random: random.randrange(0x80, 0xD800),
    lambda random: random.randrange(0xE000, 0x11_0000),
]
NAMES = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=12).map("".join))
LEGAL = NAMES.filter(lambda name: 0 < len(name.encode()) <= 64)


@examples(500)
@given(NAMES)
@example("")
@example(MARKER)
@example(MARKER * 2)
@example("x--_41")
@example("$SYS.>")
@example("\x00")
@example("a" * 10_000)
@example("." * 10_000)
def test_every_name_comes_back(name: str) -> None:
    token = encode_token(name)
    assert SAFE.match(token)
    assert is_token(token)
    assert decode_token(token) == name


def test_twenty_thousand_names_have_as_many_tokens() -> None:
    """More than hypothesis makes in good time: mixed from the same pieces and from all of Unicode."""
    random = Random(2026)
    names: set[str] = set()
    while len(names) < 20_000:
        parts = [
            random.choice(PIECE_LIST) if random.random() < 0.6 else chr(random.choice(_PLANES)(random))
            for _ in range(random.randrange(0, 12))
        ]
        names.add("".join(parts))
    tokens = {encode_token(name) for name in names}
    assert len(tokens) == len(names)
    assert all(SAFE.match(token) for token in tokens)
    assert {decode_token(token) for token in tokens} == names


@examples(300)
@given(NAMES, NAMES)
def test_two_names_have_two_tokens(one: str, other: str) -> None:
    assert (encode_token(one) == encode_token(other)) == (one == other)


@examples(500)
@given(st.one_of(NAMES, st.from_regex(r"x--([A-Za-z0-9]|_[0-9a-fA-F]{2}|_|-){0,12}", fullmatch=True)))
@example("x--_41")  # A, escaped without need
@example("x--abc")  # safe, escaped without need
@example("x--_2E")  # capital digits
@example("x--_ff")  # not UTF-8
@example("x--_ed_a0_80")  # a surrogate
@example("x--_c0_ae")  # overlong
@example("x--_2")
@example("x--é")
@example("x--\n")
@example("a\n")
@example("a.b")
def test_a_token_decodes_to_a_name_of_its_own_or_not_at_all(token: str) -> None:
    try:
        name = decode_token(token)
    except InvalidNameError:
        return
    assert encode_token(name) == token


@pytest.mark.parametrize("name", ["planner", "agent-7", "A_b-9", "0"])
def test_ordinary_names_stand_for_themselves(name: str) -> None:
    assert encode_token(name) == name


def test_a_lone_surrogate_is_no_name() -> None:
    with pytest.raises(InvalidNameError):
        encode_token("a\ud800")


@pytest.mark.parametrize(
    ("check", "limit", "field"),
    [(check_namespace, 64, "namespace"), (check_agent, 256, "agent_id"), (check_event_name, 512, "name")],
)
def test_names_are_bounded_in_utf8_bytes(check: Callable[[object], str], limit: int, field: str) -> None:
    for legal in ("x", "x" * limit, "ü" * (limit // 2), " ", "\x00"):
        assert check(legal) == legal
    bad: list[Any] = ["", "x" * (limit + 1), "ü" * (limit // 2) + "x", "x" * 10_000, "\ud800", None, 5, b"x", ["x"]]
    for value in bad:
        with pytest.raises(InvalidNameError) as caught:
            check(value)
        assert caught.value.field == field
        assert len(str(caught.value)) < 300


def test_a_key_is_bounded_in_bytes_and_in_segments() -> None:
    for legal in ("x", "x" * 768, "ü" * 384, " ", "\x00", ".", "..", ".a.", "a*>$b", ".".join("a" * 32), "." * 31):
        assert check_key(legal) == legal
    bad: list[Any] = ["", "x" * 769, "ü" * 384 + "x", "x" * 100_000, "\ud800", None, 5, b"x", ["x"]]
    for value in bad:
        with pytest.raises(InvalidNameError) as caught:
            check_key(value)
        assert caught.value.field == "key"
        assert len(str(caught.value)) < 300
    for value in (".".join("a" * 33), "." * 32, "." * 768):
        with pytest.raises(InvalidNameError) as caught:
            check_key(value)
        assert (caught.value.field, caught.value.limit) == ("key", 32)


def test_an_event_name_has_sixteen_segments_at_most() -> None:
    assert check_event_name(":".join("a" * 16)) == ":".join("a" * 16)
    with pytest.raises(InvalidNameError) as caught:
        check_event_name(":".join("a" * 17))
    assert caught.value.limit == 16


@pytest.mark.parametrize("kind", ["a", "A_z-9", "x" * 64])
def test_a_kind_is_readable(kind: str) -> None:
    assert check_kind(kind) == kind


@pytest.mark.parametrize("kind", ["", "x" * 65, "a b", "a.b", "ü", "a\n", "a:b", None, 5, b"a"])
def test_other_kinds_are_refused(kind: object) -> None:
    with pytest.raises(InvalidNameError) as caught:
        check_kind(kind)
    assert (caught.value.field, caught.value.limit) == ("kind", 64)


@examples(200)
@given(LEGAL, LEGAL, LEGAL.filter(lambda name: name.count(":") < 16))
def test_an_event_subject_comes_apart_again(namespace: str, agent: str, name: str) -> None:
    subject = event_subject(namespace, agent, name)
    assert all(SAFE.match(token) for token in subject.split("."))
    assert parse_event_subject(subject) == (namespace, agent, name)
    assert service_subject(namespace, "put").split(".")[1] == subject.split(".")[1]


KEYS = st.one_of(LEGAL, st.lists(PIECES | st.sampled_from(["a", "b"]), min_size=1, max_size=20).map("".join)).filter(
    lambda key: len(key.encode()) <= 768 and key.count(".") < 32
)


@examples(300)
@given(LEGAL, KEYS)
@example("ns", ".")
@example("ns", "..a")
@example("ns", "x--")
@example("*", ">")
def test_the_subject_of_a_key_comes_apart_again(namespace: str, key: str) -> None:
    subject = key_subject(namespace, key)
    assert subject.startswith("$KV.ctx-keys.")
    tokens = subject.removeprefix("$KV.ctx-keys.").split(".")
    assert all(SAFE.match(token) for token in tokens)
    assert len(tokens) == key.count(".") + 2
    assert parse_key_subject(subject) == (namespace, key)


def test_ten_thousand_keys_have_as_many_subjects() -> None:
    random = Random(2027)
    keys: set[str] = set()
    while len(keys) < 10_000:
        parts = [
            random.choice(PIECE_LIST) if random.random() < 0.7 else chr(random.choice(_PLANES)(random))
            for _ in range(random.randrange(1, 14))
        ]
        keys.add("".join(parts))
    subjects = {key_subject("a.b", key) for key in keys}
    assert len(subjects) == len(keys)
    assert {parse_key_subject(subject) for subject in subjects} == {("a.b", key) for key in keys}


@examples(300)
@given(LEGAL, KEYS, st.integers(0, 40), LEGAL)
def test_the_filter_of_a_prefix_takes_in_every_key_that_begins_with_it(
    namespace: str, key: str, length: int, other: str
) -> None:
    """As the server matches; and none of another namespace, whatever its name."""
    prefix = key[:length]
    wanted = key_filter(namespace, prefix).split(".")
    assert wanted.pop() == ">"
    tokens = key_subject(namespace, key).split(".")
    assert tokens[: len(wanted)] == wanted
    assert len(tokens) > len(wanted)
    assert (key_subject(other, key).split(".")[2] == wanted[2]) == (other == namespace)


def test_the_longest_subject_of_a_key_fits_the_servers_control_line() -> None:
    for key in (".".join(["*" * 23] * 32), "*" * 768):
        assert check_key(key) == key
        # Asked for by a direct get: beside it stand the verb, the reply subject and the sizes.
        assert len(f"$JS.API.DIRECT.GET.KV_ctx-keys.{key_subject('.' * 64, key)}") < 4096 - 200
    assert len(key_filter("." * 64, "*" * 700 + ".")) < 4096 - 200


@given(LEGAL, st.text(alphabet="abc234567", min_size=32, max_size=32))
def test_a_hot_subject_comes_apart_again(namespace: str, digest: str) -> None:
    assert parse_hot_subject(hot_subject(namespace, digest)) == (namespace, digest)


def test_the_longest_event_subject_fits_the_servers_control_line() -> None:
    subject = event_subject("." * 64, "." * 256, ":".join(["." * 31] * 16))
    assert len(subject) < 4096 - 200  # beside the verb, the reply subject and the sizes


SUBJECTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.one_of(st.sampled_from(["ctx", "event", "$KV", "ctx-hot", "ctx-keys", "x--zz", ""]), PIECES), max_size=8
    ).map(".".join),
)


@examples(200)
@given(SUBJECTS)
def test_a_foreign_subject_is_an_error_or_parses(subject: str) -> None:
    for parse in (parse_event_subject, parse_hot_subject, parse_key_subject):
        try:
            parse(subject)
        except InvalidNameError:
            pass


@examples(100)
@given(st.one_of(SUBJECTS, st.text(min_size=1_000).map(lambda text: f"ctx.{text}.event.a.b")))
def test_any_subject_has_a_place_among_the_dead_letters(subject: str) -> None:
    dead = dead_subject(namespace_token(subject), "CTX_EVENTS", "0123456789abcdef", 2**63)
    assert len(dead) < 300
    assert [bool(SAFE.match(token)) for token in dead.split(".")] == [True] * 6


def test_the_kind_of_chunks_is_reserved() -> None:
    """Otherwise a context of that kind could be taken for a part of a large body, and be shown nowhere."""
    with pytest.raises(InvalidNameError, match="reserved"):
        check_kind("chunk")
