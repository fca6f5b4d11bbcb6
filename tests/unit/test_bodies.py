"""Bodies: equal values give equal bytes, and what JSON cannot hold never gets in."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.schemas import limits
from holdfast.schemas.bodies import (
    BINARY,
    TEXT,
    check_content_type,
    check_json,
    check_nesting,
    decode_body,
    encode_body,
)
from holdfast.schemas.errors import HoldfastError, InvalidBodyError, InvalidFieldError, TooLargeError
from holdfast.schemas.refs import JSON
from tests.support import examples, stable_id

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def reordered(value: Any) -> Any:
    """The same value with every dict built the other way round."""
    if isinstance(value, dict):
        return {key: reordered(inner) for key, inner in reversed(value.items())}
    if isinstance(value, list):
        return [reordered(inner) for inner in value]
    return value


@examples(200)
@given(st.dictionaries(st.text(), VALUES, max_size=6) | st.lists(VALUES, max_size=6))
def test_equal_values_give_equal_bytes_that_decode_to_them(value: Any) -> None:
    raw, content_type = encode_body(value)
    assert content_type == JSON
    assert encode_body(reordered(value))[0] == raw
    assert decode_body(raw, content_type) == value
    assert json.loads(raw) == value


@given(st.text())
def test_text_is_kept_as_utf8(text: str) -> None:
    raw, content_type = encode_body(text)
    assert (raw, content_type) == (text.encode(), TEXT)
    assert decode_body(raw, content_type) == text


@given(st.binary())
def test_bytes_are_kept_as_they_are(data: bytes) -> None:
    for form in (data, bytearray(data), memoryview(data)):
        raw, content_type = encode_body(form)
        assert (raw, content_type) == (data, BINARY)
    assert decode_body(data, BINARY) == data


class Colour(Enum):
    RED = "red"


class Point(msgspec.Struct):
    y: int
    x: int


@dataclass
class Plain:
    b: int
    a: int


@pytest.mark.parametrize(
    ("body", "raw"),
    [
        (None, b"null"),
        (True, b"true"),
        (5, b"5"),
        (-0.0, b"-0.0"),
        ({}, b"{}"),
        ([], b"[]"),
        ({"b": 1, "a": {"d": 1, "c": None}}, b'{"a":{"c":null,"d":1},"b":1}'),
        ({"a": 2**70}, b'{"a":1180591620717411303424}'),
        (Point(1, 2), b'{"x":2,"y":1}'),
        (Plain(1, 2), b'{"a":2,"b":1}'),
        ([{"z", "a", "m"}, (1, 2)], b'[["a","m","z"],[1,2]]'),
        ([Colour.RED, Decimal("1.50"), datetime(2026, 1, 1, tzinfo=UTC)], b'["red","1.50","2026-01-01T00:00:00Z"]'),
        ({"k": "\u2028 ü \U0001d11e \x00"}, '{"k":"\u2028 ü \U0001d11e \\u0000"}'.encode()),
    ],
    ids=stable_id,
)
def test_json_has_one_form(body: Any, raw: bytes) -> None:
    assert encode_body(body) == (raw, JSON)


@pytest.mark.parametrize(
    "body",
    [
        math.nan,
        math.inf,
        [None, -math.inf],
        {"a": {"b": [1, math.nan]}},
        Point(math.nan, 1),  # type: ignore[arg-type]
        [Plain(1, math.inf)],  # type: ignore[arg-type]
        {"a": (math.nan,)},
        {math.nan: 1},
        {math.inf: None},
        {"a": {math.nan}},
        object(),
        {"a": object()},
        {(1, 2): 3},
        {1: "a"},
        {"a": 1, 2: "b"},
        1j,
        "\ud800",
        ["\udfff"],
        {"\ud800": 1},
        {"k": {"\udc00": None}},
        lambda: None,
    ],
    ids=stable_id,
)
def test_what_json_has_no_form_for_is_refused(body: Any) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        encode_body(body)
    assert caught.value.field == "body"


def test_a_null_beside_finite_numbers_is_fine() -> None:
    assert encode_body({"a": None, "b": "null", "c": 1.5})[0] == b'{"a":null,"b":"null","c":1.5}'


def test_a_value_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(HoldfastError):
        encode_body(endless)


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * depth + closing * depth


class TestNesting:
    @pytest.mark.parametrize("depth", [1, 63, 64])
    def test_up_to_64_is_accepted(self, depth: int) -> None:
        raw = nested(depth)
        check_nesting(raw)
        check_json(raw)
        assert encode_body(json.loads(raw))[0] == raw

    @pytest.mark.parametrize("depth", [65, 100, 100_000])
    def test_more_is_refused(self, depth: int) -> None:
        for raw in (nested(depth), b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth):
            with pytest.raises(InvalidFieldError) as caught:
                check_json(raw)
            assert caught.value.limit == 64

    def test_a_python_value_nested_deeper_is_refused(self) -> None:
        value: Any = 1
        for _ in range(65):
            value = {"a": value}
        with pytest.raises(InvalidFieldError) as caught:
            encode_body(value)
        assert caught.value.limit == 64
        for _ in range(100_000):
            value = [value]
        with pytest.raises(HoldfastError):
            encode_body(value)

    @pytest.mark.parametrize(
        "text",
        ["[" * 500, "{" * 500, "]" * 500, '"' * 200 + "[" * 500, "\\" * 99 + "[" * 500, '\\"[' * 200, "\\", '"\\'],
        ids=lambda text: text[:6],
    )
    def test_brackets_in_strings_do_not_count(self, text: str) -> None:
        value: Any = [text] * 3
        for _ in range(63):
            value = {text: value}
        raw = json.dumps(value).encode()
        check_nesting(raw)
        assert json.loads(encode_body(value)[0]) == value
        with pytest.raises(InvalidFieldError):
            check_nesting(json.dumps([value]).encode())

    def test_many_siblings_are_not_deep(self) -> None:
        check_json(b"[" + b",".join([b"[{}]"] * 10_000) + b"]")

    @examples(300)
    @given(VALUES)
    def test_the_depth_is_the_real_one(self, value: Any) -> None:
        def depth(part: Any) -> int:
            if isinstance(part, dict):
                return 1 + max(map(depth, part.values()), default=0)
            return 1 + max(map(depth, part), default=0) if isinstance(part, list) else 0

        base = depth(value)
        for more in (64 - base, 65 - base):
            wrapped = value
            for _ in range(more):
                wrapped = [wrapped]
            raw = json.dumps(wrapped).encode()
            if base + more > 64:
                with pytest.raises(InvalidFieldError):
                    check_nesting(raw)
            else:
                check_nesting(raw)

    @pytest.mark.parametrize("tail", [b"", b"\\", b'"', b"\n", b"[" * 100])
    @pytest.mark.parametrize("unit", [b'\\"', b'"', b"\\", b"[", b'"[', b'"\\'])
    def test_hostile_text_is_judged_in_linear_time(self, unit: bytes, tail: bytes) -> None:
        """In quadratic time this would run into the time limit of a test."""
        raw = b"[" * 65 + b'"' + unit * (limits.EVENT_BYTES // len(unit)) + tail
        with pytest.raises(HoldfastError):
            check_json(raw)

    @examples(300)
    @given(
        st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b'"', b"\\", b"a", b"\xff", b"\n"]), max_size=400).map(
            b"".join
        )
    )
    def test_any_bytes_are_judged(self, raw: bytes) -> None:
        for check in (check_nesting, check_json):
            try:
                check(raw)
            except HoldfastError:
                pass


class TestCheckedJson:
    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"NaN",
            b"[Infinity]",
            b'{"a":-Infinity}',
            b"{",
            b"[1,]",
            b"{'a':1}",
            b"\xff",
            b'"\xc0\xae"',
            b'"\xed\xa0\x80"',
            b'"\\ud800"',
            b'{"\\udfff":1}',
            b"\xef\xbb\xbf{}",
            b"[1] 2",
            b'"\x01"',
            b"01",
            b"tru",
            b"\x00",
        ],
        ids=repr,
    )
    def test_what_is_no_json_is_refused(self, raw: bytes) -> None:
        with pytest.raises(InvalidBodyError) as caught:
            check_json(raw, field="event")
        assert caught.value.field == "event"
        with pytest.raises(InvalidBodyError):
            encode_body(raw, JSON)

    @pytest.mark.parametrize("raw", [b" {} ", b'{"b":1,"a":2}', b"1e5", b'"\\ud834\\udd1e"', b'{"a":1,"a":2}'])
    def test_json_given_as_bytes_is_kept_to_the_byte(self, raw: bytes) -> None:
        assert encode_body(raw, JSON) == (raw, JSON)
        assert encode_body(raw.decode(), JSON) == (raw, JSON)

    @examples(500)
    @given(st.binary(max_size=100))
    @example(b'{"a":' + b"9" * 5_000 + b"}")
    @example(b"1e99999")
    def test_any_bytes_are_json_or_refused(self, raw: bytes) -> None:
        try:
            check_json(raw)
        except HoldfastError:
            return
        decode_body(raw, JSON)


class TestSize:
    def test_the_limit_is_exact(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "BODY_BYTES", 1_000)
        bodies: list[tuple[Any, Any]] = [
            (b"x" * 1_000, b"x" * 1_001),
            ("x" * 1_000, "x" * 1_001),
            ("ü" * 500, "ü" * 500 + "x"),
            (["x" * 996], ["x" * 997]),
        ]
        for legal, over in bodies:
            encode_body(legal)
            with pytest.raises(TooLargeError) as caught:
                encode_body(over)
            assert (caught.value.field, caught.value.limit) == ("body", 1_000)

    def test_the_limit_is_64_mib(self) -> None:
        assert limits.BODY_BYTES == 64 * 1024 * 1024
        encode_body(bytes(limits.BODY_BYTES))
        with pytest.raises(TooLargeError):
            encode_body(bytes(limits.BODY_BYTES + 1))


class TestContentTypes:
    @pytest.mark.parametrize("given_type", ["text/markdown", "application/json; charset=utf-8", "x", "x" * 128])
    def test_a_content_type_given_is_kept(self, given_type: str) -> None:
        assert encode_body("x", given_type) == (b"x", given_type)

    @pytest.mark.parametrize(
        "given_type", ["", " x", "x" * 129, "ü", "a\nb", "a\r\nb: c", "a\x00", "a\x7f", "a\n", 5, b"x"]
    )
    def test_a_content_type_that_fits_no_header_is_refused(self, given_type: Any) -> None:
        with pytest.raises(InvalidFieldError) as caught:
            check_content_type(given_type)
        assert caught.value.field == "content_type"
        with pytest.raises(InvalidFieldError):
            encode_body("x", given_type)

    @pytest.mark.parametrize(("raw", "kind"), [(b"\xff", TEXT), (b"{", JSON), (b"[" * 100_000, JSON), (b"", JSON)])
    def test_bytes_that_are_not_of_their_type_do_not_decode(self, raw: bytes, kind: str) -> None:
        with pytest.raises(InvalidBodyError):
            decode_body(raw, kind)
