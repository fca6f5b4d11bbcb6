"""Hostile inputs for the fuzz campaign: text, JSON, headers and frames, made by grammars and by mutation.

Everything is drawn from one ``random.Random``, so that a seed names its inputs.  Large inputs are made once and drawn
seldom: a million inputs shall take minutes.  Holds no tests itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from holdfast.schemas import limits
from holdfast.schemas.names import encode_token

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

T = TypeVar("T")

MILLION: Final = 1_000_000

_LIMITS: Final = (
    limits.KIND_CHARS, limits.NAMESPACE_BYTES, limits.NAME_BYTES, limits.EVENT_NAME_BYTES, limits.KEY_BYTES,
    limits.ID_CHARS, limits.CONTENT_TYPE_CHARS,
)  # fmt: skip

TEXTS: Final[tuple[str, ...]] = (
    *("", " ", ".", "..", "...", "*", ">", "a.b", "a.", ".a", "a..b", "*.b", "a:b", ":", "::", "a:", ":a", "a*b"),
    *("$JS.API.INFO", "$KV.ctx-hot.a.b", "_INBOX.a.b", "$SYS", "ctx.default.event.a.b", "$"),
    *("\x00", "a\x00b", "\r\n", "a\nb", "a\n", "\ta", "a\x0b", "\x0c", "a b", "\x1c", "\x7f", "\x85", "\xa0", "\u2028"),
    *("\ufeff", "\xe9", "e\u0301", "\u0130", "\xdf", "\u212a", "\ud800", "\udfffx", "\U0001f600", "\u202e", "\uff0e"),
    *("x--", "x--_00", "x--a_2", "x--abc", "x--_c3_a9", "X--", "x-", "x--_e9", "x--_C3_A9"),
    *("../../etc/passwd", "..\\..\\x", "%2e%2e%2f", "/etc/passwd", "CON", "a/b", "~root", "file:///x", "${HOME}"),
    *("A", "a", "agent", "AGENT", "default", "chunk", "note", "completion", "0", "-1", "1e400", "NaN", "null", "true"),
    *("' OR 1=1 --", "'; DROP TABLE events; --", "%s%n", "{0}", "\\", '"', "\\ud800", "<script>"),
    *("ctx_note_" + "a" * 32, "ctx_note_" + "a" * 31, "ctx_note_" + "A" * 32, "ctx__" + "a" * 32, "ctx_a_" + "1" * 32),
    *("ctx_" + "k" * 64 + "_" + "a" * 32, "ctx_" + "k" * 65 + "_" + "a" * 32, "ctx_note_" + "a" * 32 + "\n"),
    *("01970000-0000-7000-8000-000000000000", "01970000-0000-8000-8000-00000000000A"),
    *("1d1d4665-7674-85f0-8000-000000abc123",),
    *("evt_abc123", "ffffffff-ffff-7fff-bfff-ffffffffffff", "2026-01-31T09:30:00Z", "0001-01-01T00:00:00+23:59"),
    *("9999-12-31T23:59:59.999999-23:59", "2026-02-30", "2026-01-31T09:30:00.1234567Z"),
    *("20260131T093000Z", "2026-W05-6"),
    *("00-" + "a" * 32 + "-" + "b" * 16 + "-01", "00-" + "A" * 32 + "-" + "b" * 16 + "-01", "ff-" + "0" * 49),
    *(":".join("s" * count) for count in (limits.NAME_SEGMENTS, limits.NAME_SEGMENTS + 1)),
    *(".".join("s" * count) for count in (limits.KEY_SEGMENTS, limits.KEY_SEGMENTS + 1)),
    *("a" * (limit + change) for limit in _LIMITS for change in (-1, 0, 1)),
    *("\xe9" * ((limit + change) // 2) for limit in _LIMITS for change in (-1, 0, 2)),
    *("." * limit for limit in (64, 256)), "a" * 5_000, "\xe9" * 5_000, "_" * 64, "-" * 768,
)  # fmt: skip

NUMBERS: Final[tuple[bytes, ...]] = (
    *(b"0", b"-0", b"1", b"-1", b"1.5", b"1e5", b"1E+5", b"1e400", b"-1e400", b"5e-324"),
    *(b"1e-400", b"0x1", b"01", b"1."),
    *(b".5", b"+1", b"1e", b"NaN", b"Infinity", b"-Infinity", b"nan", b"1_000", b"2147483647", b"2147483648", b"-0.0"),
    *(b"9007199254740993", b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"1e308", b"1e11"),
    *(b"253402300799999", b"253402300800000", b"99999999999", b"100000000001", b"1" * 400),
    *(b"1" * 4_301, b"-" + b"9" * 25),
)  # fmt: skip

STRINGS: Final[tuple[bytes, ...]] = (
    *(b'""', b'"a"', b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"'),
    *(b'"\\x"', b'"\\"', b'"', b"'a'"),
    *(b'"\xff"', b'"\xc3\x28"', b'"\xed\xa0\x80"', b'"\xf5\x80\x80\x80"', b'"\n"', b'"\x00"'),
    *(b'"\x7f"', b'"\\u00e"', b'"\\/"'),
    *(b'"a\\', b'"\xc3\xa9"', b'"e\xcc\x81"', b'"\xe2\x80\xa8"', b'"\xef\xbb\xbf"', b'"\\u2028"', b'"\\uD800\\u0041"'),
)  # fmt: skip

_WORDS: Final = (b"true", b"false", b"null", b"tru", b"nul", b"True", b"undefined", b"")
_SPACES: Final = (b"", b"", b"", b"", b" ", b"\n", b"\t\r\n", b"\x0b", b"\xa0", b"\xef\xbb\xbf", b"/**/")
_PIECES: Final = (
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\x00", b"\r\n", b"\xff", b"\xc0\x80", b"e", b"-", b"9" * 30),
    *(b"[" * 70, b"]" * 70, b'{"a":' * 70, b"null", b"1e999", b"\\ud800", b" " * 100, b"A" * 300, b"\xf0\x9f\x98\x80"),
)  # fmt: skip

DEEP: Final = b"[" * MILLION + b"]" * MILLION
DEEP_OPEN: Final = b'{"a":' * (MILLION // 2)
DEEP_STRINGS: Final = b'"' * MILLION
LONG_NUMBER: Final = b"7" * MILLION
LONG_TEXT: Final = b'"' + b"\\u0041" * 150_000 + b'"'
LARGE: Final[tuple[bytes, ...]] = (DEEP, DEEP_OPEN, DEEP_STRINGS, LONG_NUMBER, b"-" + LONG_NUMBER, LONG_TEXT)

_SELDOM: Final = 4_000
"""One in so many is a large one: each takes some milliseconds."""


def bombs() -> tuple[bytes, ...]:
    """Frames of zstd that inflate to far more than they are, or that ask for far more memory than they need."""
    zeros = bytes(64 * limits.MIB)
    compressed = zstd.compress(zeros)
    parameter = zstd.CompressionParameter.window_log
    wide = [zstd.compress(zeros[:2_000_000], options={parameter: log}) for log in (24, 27)]
    # The window's size stands in the frame's second header byte, as exponent and mantissa: up to 3.75 TiB.
    forged = [b"\x28\xb5\x2f\xfd\x00" + bytes([log << 3]) + b"\x01\x00\x00" for log in (10, 17, 18, 21, 31)]
    edge = [zstd.compress(b"1" * (limits.CHUNK_BYTES + change)) for change in (-1, 0, 1)]
    return (compressed, compressed * 3, *wide, *forged, *edge, compressed[:-3], zstd.compress(compressed))


def text(rng: random.Random) -> str:
    """Text as nobody should send it, or as anybody may."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(TEXTS)
    if kind < 0.65:
        return "".join(rng.choices("abcXYZ019_-.:*> $", k=rng.randrange(1, 12)))
    if kind < 0.8:
        return "".join(chr(rng.randrange(0x20, 0x3000)) for _ in range(rng.randrange(1, 8)))
    if kind < 0.9:
        return rng.choice(TEXTS) + rng.choice(TEXTS)
    return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 5)))


def good_name(rng: random.Random) -> str:
    """A name that every check lets pass."""
    return "".join(rng.choices("abcdefgh_-019", k=rng.randrange(1, 10)))


def token(rng: random.Random) -> str:
    """A token of a subject: mostly one that decodes."""
    if rng.random() < 0.6:
        return good_name(rng)
    given = text(rng)
    try:
        return encode_token(given) if rng.random() < 0.7 else given
    except ValueError:
        return "a"
    except Exception:  # noqa: BLE001  a name that cannot be encoded is a token like another
        return given


def string(rng: random.Random) -> bytes:
    """A JSON string, or what looks like one."""
    if rng.random() < 0.5:
        return rng.choice(STRINGS)
    return b'"' + text(rng).encode("utf-8", "surrogatepass").replace(b'"', b"") + b'"'


def json_text(rng: random.Random, depth: int = 3) -> bytes:
    """JSON by its grammar, with every rule broken now and then."""
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return string(rng)
    if kind < 0.7:
        return rng.choice(_WORDS)
    space = rng.choice(_SPACES)
    count = rng.randrange(4)
    if kind < 0.85:
        items = [json_text(rng, depth - 1) for _ in range(count)]
        return b"[" + space + (b"," + space).join(items) + b"]"
    names = [string(rng) if rng.random() < 0.5 else b'"a"' for _ in range(count)]
    return b"{" + b",".join(name + space + b":" + json_text(rng, depth - 1) for name in names) + space + b"}"


def good_json(rng: random.Random, depth: int = 3) -> bytes:
    """JSON that every check lets pass."""
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice((b"0", b"1.5", b"-3", b"1e5", b"true", b"null", b'"x"', b'"\\u00e9"', b'"\xc3\xa9"'))
    items = [good_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind < 0.6:
        return b"[" + b", ".join(items) + b"]"
    return b"{" + b",".join(b'"k%d":' % number + item for number, item in enumerate(items)) + b"}"


def members(rng: random.Random, names: Sequence[str], values: Callable[[random.Random, str], bytes]) -> bytes:
    """A JSON object with some of these members; at times one twice, or one that nobody knows."""
    chosen = rng.sample(names, min(len(names), rng.randrange(5)))
    if chosen and rng.random() < 0.05:
        chosen.append(chosen[0])
    parts = [b'"' + name.encode() + b'":' + values(rng, name) for name in chosen]
    if rng.random() < 0.1:
        parts.append(string(rng) + b":" + json_text(rng))
    return b"{" + b",".join(parts) + b"}"


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """The bytes with some of them changed, left out, doubled or put in."""
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.choice(_PIECES)
            case 2:
                del changed[at : at + rng.randrange(1, 9)]
            case 3:
                changed[at:at] = changed[at : at + rng.randrange(1, 9)]
            case 4:
                del changed[at:]
            case _:
                changed[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(changed)


def payload(rng: random.Random, good: Callable[[random.Random], bytes]) -> bytes:
    """A payload: as ``good`` makes it, mutated, by the broken grammar, or seldom one of the large ones."""
    if rng.randrange(_SELDOM) == 0:
        return rng.choice(LARGE)
    kind = rng.random()
    if kind < 0.55:
        return good(rng)
    if kind < 0.85:
        return mutated(rng, good(rng))
    return json_text(rng)


def headers(rng: random.Random, names: Sequence[str]) -> dict[str, str]:
    """Headers: known names and forged ones with any value that could come over the wire."""
    return {rng.choice(names): header_value(rng) for _ in range(rng.randrange(4))}


def header_value(rng: random.Random) -> str:
    """A value as it arrives: decoded with replacement, without CR and LF."""
    given = text(rng).encode("utf-8", "replace").decode()
    return given.replace("\r", "").replace("\n", "").strip()


def python_value(rng: random.Random, depth: int = 3) -> Any:
    """Anything that a caller of the SDK may hand in as a body."""
    kind = rng.randrange(12 if depth else 9)
    match kind:
        case 0:
            return rng.choice((0, -1, 2**63, -(2**63) - 1, 2**64, 10**400, True, None))
        case 1:
            return rng.choice((0.0, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), 5e-324))
        case 2 | 3 | 4:
            return text(rng)
        case 5:
            return rng.choice(((), (1, 2), frozenset({1}), 1 + 2j, object, range(3), b"\xff", bytearray(b"x")))
        case 6 | 7 | 8:
            return rng.randrange(-1_000, 1_000)
        case 9 | 10:
            return {
                text(rng) if rng.random() < 0.9 else rng.choice((1, None, 1.5, (1,), b"x")): python_value(
                    rng, depth - 1
                )
                for _ in range(rng.randrange(4))
            }
        case _:
            return [python_value(rng, depth - 1) for _ in range(rng.randrange(4))]


def nested(depth: int) -> list[Any]:
    """A list in a list in a list …"""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value
