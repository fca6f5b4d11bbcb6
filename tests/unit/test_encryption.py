"""Client-side encryption: the envelope, the key ring, the key file."""

from __future__ import annotations

import base64
import hmac
import json
import logging
import os
import random
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client import encryption
from holdfast.client.encryption import MAGIC, SEALED, key_id_of, open_sealed, seal, seal_contexts
from holdfast.client.key_file import create_key_file, read_key_file, rotate_key_file
from holdfast.client.key_ring import KeyRing, encryption_by_default, key_file_path, parse_key_list
from holdfast.client.model import Context
from holdfast.schemas import limits
from holdfast.schemas.errors import (
    ConfigurationError,
    EncryptionKeyError,
    HoldfastError,
    IntegrityError,
    InvalidBodyError,
    InvalidFieldError,
    TooLargeError,
)
from holdfast.schemas.refs import JSON, compute_digest
from holdfast.schemas.rows import ContextRow
from holdfast.streams.hot import NewContext
from tests.support import examples

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
RING = KeyRing.of({"k1": KEY}, "k1")
GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "sealed-v1.json").read_text("utf-8"))

kinds = st.text("abcXYZ019_-", min_size=1, max_size=64)
namespaces = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=16)
expiries = st.none() | st.integers(0, 10**13)


def encoded(secret: bytes) -> str:
    return base64.b64encode(secret).decode()


def row_of(envelope: bytes, *, content_type: str = SEALED) -> ContextRow:
    return ContextRow(
        namespace="n",
        kind="k",
        digest=compute_digest("n", "k", envelope, content_type=content_type),
        content_type=content_type,
        body=envelope,
        size=len(envelope),
        stored_at_ms=0,
        epoch="",
        seq=1,
    )


# The envelope.


@examples(200)
@given(
    body=st.binary(max_size=200) | st.binary(min_size=1, max_size=64).map(lambda part: part * 100),
    namespace=namespaces,
    kind=kinds,
    content_type=st.sampled_from((JSON, "text/plain; charset=utf-8", "x" * limits.CONTENT_TYPE_CHARS)),
    expires_at_ms=expiries,
)
def test_E12_what_is_sealed_opens_to_the_same(
    body: bytes, namespace: str, kind: str, content_type: str, expires_at_ms: int | None
) -> None:
    envelope = seal(RING, namespace, kind, body, content_type, expires_at_ms)
    assert open_sealed(RING, namespace, kind, envelope, expires_at_ms) == (body, content_type)
    assert key_id_of(envelope) == "k1"


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda vector: vector["name"])
def test_E12_envelopes_of_version_1_open_for_ever(vector: dict[str, Any]) -> None:
    """The vectors were computed apart from this code: HKDF by plain HMAC, as the module describes the format."""
    key_id = vector["key_id"]
    ring = KeyRing.of({key_id: bytes.fromhex(vector["master_key_hex"])}, key_id)
    envelope, body = bytes.fromhex(vector["envelope_hex"]), bytes.fromhex(vector["body_hex"])
    namespace, kind, expires_at_ms = vector["namespace"], vector["kind"], vector["expires_at_ms"]
    assert open_sealed(ring, namespace, kind, envelope, expires_at_ms) == (body, vector["content_type"])
    if not vector["compressed"]:  # how zstd compresses may change with its version, and what it made stays readable
        salt = bytes.fromhex(vector["salt_hex"])
        sealed = encryption._seal(ring.active_key(), salt, namespace, kind, body, vector["content_type"], expires_at_ms)
        assert sealed == envelope


def test_equal_bodies_do_not_show_as_equal() -> None:
    envelopes = {seal(RING, "n", "k", b"same", JSON) for _ in range(100)}
    assert len(envelopes) == 100
    assert len({envelope[7:23] for envelope in envelopes}) == 100  # the salts
    assert len({envelope[23:] for envelope in envelopes}) == 100


def test_nothing_of_the_plaintext_is_in_an_envelope() -> None:
    body = random.Random(1).randbytes(600)
    envelope = seal(RING, "n", "k", body, "text/x-canary")
    assert b"canary" not in envelope
    assert not any(body[i : i + 4] in envelope for i in range(len(body) - 3))


def test_the_key_of_an_envelope_is_derived_for_it_alone() -> None:
    # The master key itself opens nothing, and so do the derived keys of another namespace, kind or salt.
    salt = bytes(16)

    def derive(salt: bytes, namespace: bytes, kind: bytes) -> bytes:
        info = b"holdfast-enc-1" + b"".join(len(part).to_bytes(8, "little") + part for part in (namespace, kind))
        return hmac.digest(hmac.digest(salt, KEY, "sha256"), info + b"\x01", "sha256")

    ring_key = RING.active_key()
    ciphers = {
        encryption._cipher(ring_key, *place).encrypt(bytes(12), bytes(32), b"")
        for place in ((salt, "n", "k"), (salt, "m", "k"), (salt, "n", "l"), (bytes(15) + b"1", "n", "k"))
    }
    assert len(ciphers) == 4
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    expected = AESGCM(derive(salt, b"n", b"k")).encrypt(bytes(12), bytes(32), b"")
    assert encryption._cipher(ring_key, salt, "n", "k").encrypt(bytes(12), bytes(32), b"") == expected


REGIONS = {
    "magic": (0, 3),
    "version": (3, 4),
    "length of the key id": (4, 5),
    "key id": (5, 7),
    "salt": (7, 23),
    "ciphertext": (23, -16),
    "tag": (-16, None),
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("size", [0, 40, 5_000])
def test_E12_any_byte_that_was_altered_is_refused(region: str, size: int) -> None:
    envelope = seal(RING, "n", "k", b"x" * size, JSON, 5)
    start, end, _ = slice(*REGIONS[region]).indices(len(envelope))
    assert end > start
    for place in range(start, end):
        for flip in (0x01, 0x80):
            altered = bytearray(envelope)
            altered[place] ^= flip
            with pytest.raises((IntegrityError, InvalidBodyError, EncryptionKeyError)) as caught:
                open_sealed(RING, "n", "k", bytes(altered), 5)
            if region in ("salt", "ciphertext", "tag"):
                assert type(caught.value) is IntegrityError
                assert "'k1'" in str(caught.value)


@examples(100)
@given(data=st.data())
def test_an_envelope_that_was_cut_or_grew_is_refused(data: st.DataObject) -> None:
    envelope = seal(RING, "n", "k", data.draw(st.binary(max_size=50)), JSON)
    cut = envelope[: data.draw(st.integers(0, len(envelope) - 1))]
    for damaged in (cut, envelope + data.draw(st.binary(min_size=1, max_size=5))):
        with pytest.raises((IntegrityError, InvalidBodyError)):
            open_sealed(RING, "n", "k", damaged)


@examples(200)
@given(junk=st.binary(max_size=100) | st.binary(max_size=100).map(lambda rest: MAGIC + rest))
def test_any_bytes_give_a_typed_error(junk: bytes) -> None:
    with pytest.raises(HoldfastError):
        open_sealed(RING, "n", "k", junk)


@pytest.mark.parametrize("place", [("m", "k", 5), ("n", "l", 5), ("n", "k", 6), ("n", "k", None), ("nk", "", 5)])
def test_E12_an_envelope_opens_only_where_it_was_sealed_for(place: tuple[str, str, int | None]) -> None:
    envelope = seal(RING, "n", "k", b"secret", JSON, 5)
    namespace, kind, expires_at_ms = place
    with pytest.raises(IntegrityError):
        open_sealed(RING, namespace, kind, envelope, expires_at_ms)


def test_a_lost_key_is_told_by_its_id() -> None:
    envelope = seal(KeyRing.of({"k-lost": OTHER}, "k-lost"), "n", "k", b"secret", JSON)
    with pytest.raises(EncryptionKeyError) as caught:
        open_sealed(RING, "n", "k", envelope, what="ctx_k_abc")
    assert caught.value.key_id == "k-lost"
    assert "k-lost" in str(caught.value)
    assert "ctx_k_abc" in str(caught.value)


def test_another_key_of_the_same_id_does_not_open() -> None:
    envelope = seal(KeyRing.of({"k1": OTHER}, "k1"), "n", "k", b"secret", JSON)
    with pytest.raises(IntegrityError, match="another key of that id"):
        open_sealed(RING, "n", "k", envelope)


def test_a_version_to_come_is_told_as_that() -> None:
    with pytest.raises(InvalidBodyError, match="upgrade holdfast"):
        open_sealed(RING, "n", "k", b"HFE2" + bytes(100))


def test_E12_bodies_over_a_kilobyte_are_compressed_first() -> None:
    body = b"all work and no play " * 10_000
    assert len(seal(RING, "n", "k", body, JSON)) < len(body) / 50
    incompressible = random.Random(2).randbytes(100_000)
    envelope = seal(RING, "n", "k", incompressible, JSON)
    assert len(incompressible) < len(envelope) < len(incompressible) + 100
    assert open_sealed(RING, "n", "k", envelope) == (incompressible, JSON)
    short = b"a" * limits.COMPRESS_OVER_BYTES
    assert len(seal(RING, "n", "k", short, JSON)) > len(short)


def test_limits_hold_before_and_after_sealing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_BYTES", 10_000)
    incompressible = random.Random(3).randbytes(9_990)
    with pytest.raises(TooLargeError) as caught:
        seal(RING, "n", "k", incompressible, JSON)
    assert caught.value.limit == 10_000
    with pytest.raises(TooLargeError):
        seal(RING, "n", "k", b"a" * 10_001, JSON)
    assert open_sealed(RING, "n", "k", seal(RING, "n", "k", b"a" * 10_000, JSON)) == (b"a" * 10_000, JSON)
    with pytest.raises(TooLargeError):
        open_sealed(RING, "n", "k", MAGIC + bytes(10_001))


def sealed_plaintext(plaintext: bytes) -> bytes:
    """An envelope as a faulty writer that has the key would make it."""
    header = MAGIC + b"\x02k1" + bytes(16)
    cipher = encryption._cipher(RING.active_key(), bytes(16), "n", "k")
    return header + cipher.encrypt(bytes(12), plaintext, encryption._associated(header, "n", "k", None))


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        b"\x00\x00body",
        b"\xff" + b"x" * 10,
        b"\x04text",
        b"\x04text\x02body",
        b"\x04te\xffx\x00body",
        b"\x04text\x01no frame",
        b"\x04text\x01" + zstd.compress(b"body")[:-1],
        b"\x04text\x01" + zstd.compress(b"body") + b"more",
    ],
)
def test_what_a_faulty_writer_sealed_is_refused(plaintext: bytes) -> None:
    with pytest.raises(InvalidBodyError):
        open_sealed(RING, "n", "k", sealed_plaintext(plaintext))


def test_a_sealed_bomb_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_BYTES", 100_000)
    with pytest.raises(TooLargeError):
        open_sealed(RING, "n", "k", sealed_plaintext(b"\x04text\x01" + zstd.compress(bytes(50_000_000))))


def test_what_is_sealed_is_not_sealed_again() -> None:
    with pytest.raises(InvalidFieldError):
        seal(RING, "n", "k", seal(RING, "n", "k", b"x", JSON), SEALED)


# What a reader sees.


def test_E60_a_context_opens_when_it_is_asked_and_not_before() -> None:
    [sealed] = seal_contexts(RING, [NewContext(namespace="n", kind="k", body=b'{"a":1}')])
    assert sealed.content_type == SEALED
    context = Context(row_of(sealed.body), "hot", RING)
    assert (context.encrypted, context.key_id) == (True, "k1")
    assert (context.raw, context.body, context.content_type, context.size) == (b'{"a":1}', {"a": 1}, JSON, 7)
    assert context.stored == (sealed.body, SEALED)

    keyless = Context(row_of(sealed.body), "hot", KeyRing.of({"k2": OTHER}, "k2"))
    assert (keyless.encrypted, keyless.key_id, keyless.kind) == (True, "k1", "k")
    assert "k1" in repr(keyless)
    for attribute in ("raw", "body", "content_type", "size"):
        with pytest.raises(EncryptionKeyError) as caught:
            getattr(keyless, attribute)
        assert caught.value.key_id == "k1"
        assert keyless.ref in str(caught.value)
    with pytest.raises(EncryptionKeyError):
        _ = Context(row_of(sealed.body), "hot").raw


def test_a_plain_context_says_that_it_is_plain() -> None:
    context = Context(row_of(b"{}", content_type=JSON), "hot")
    assert (context.encrypted, context.key_id, context.stored) == (False, None, (b"{}", JSON))


def test_a_context_that_only_claims_to_be_sealed_says_so_when_it_is_opened() -> None:
    context = Context(row_of(b"not an envelope"), "hot", RING)
    assert (context.encrypted, context.key_id) == (True, None)
    assert context.ref in repr(context)
    with pytest.raises(InvalidBodyError, match="no sealed body"):
        _ = context.raw


# The ring.


def test_no_repr_and_no_error_shows_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key_file(path)
    ring = KeyRing.from_file(path)
    key = ring.active_key()
    shown = f"{ring!r} {key!r} {ring.current()!r} {RING.current()!r}"
    for secret in (key.secret, KEY):
        for form in (secret.hex(), encoded(secret), repr(secret)[2:-1]):
            assert form not in shown
    assert key.id in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "entry 1"),
        (encoded(KEY)[:-1], "entry 1"),
        (f"k1={encoded(KEY)},", "entry 2"),
        (f"k1={encoded(KEY)},{encoded(OTHER)}", "entry 2"),
        (f"={encoded(KEY)}", "entry 1"),
        (f"k 1={encoded(KEY)}", "entry 1"),
        (f"{'k' * 65}={encoded(KEY)}", "entry 1"),
        (f"k1={encoded(KEY)},k1={encoded(OTHER)}", "entry 2 .* earlier"),
        (f"k1={encoded(KEY[:31])}", "31 bytes"),
        (f"k1={encoded(KEY + KEY)}", "64 bytes"),
        ("k1=", "0 bytes"),
        (f"k1={encoded(KEY)[:-1]}", "not base64"),
        (f"k1=!{encoded(KEY)[1:]}", "not base64"),
        (f"k1={KEY.hex()}", "48 bytes"),
    ],
)
def test_a_list_of_keys_that_is_wrong_is_told_without_a_key(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        parse_key_list(text)
    for part in text.split(","):
        for shown in part.replace("=", " ").split():
            assert len(shown) < 4 or shown not in str(caught.value)


def test_the_first_key_of_a_list_seals_and_all_of_them_open() -> None:
    environ = {"HOLDFAST_KEYS": f"k2={encoded(OTHER)}, k1={encoded(KEY)}"}
    ring = KeyRing.from_environment(environ)
    assert key_id_of(seal(ring, "n", "k", b"x", JSON)) == "k2"
    assert open_sealed(ring, "n", "k", seal(RING, "n", "k", b"x", JSON)) == (b"x", JSON)
    assert ring.origin == "HOLDFAST_KEYS"


def test_keys_in_hand_are_checked() -> None:
    for keys, active in (({"k1": KEY}, "k2"), ({"k1": KEY[1:]}, "k1"), ({"k.1": KEY}, "k.1")):
        with pytest.raises(ConfigurationError):
            KeyRing.of(keys, active)


def test_variables_name_a_file_or_the_default_one_is_taken(tmp_path: Path) -> None:
    home = {"HOME": "/home/me"}
    assert key_file_path(home) == Path("/home/me/.config/holdfast/keys.json")
    assert key_file_path({**home, "XDG_CONFIG_HOME": "/xdg"}) == Path("/xdg/holdfast/keys.json")
    assert key_file_path({**home, "XDG_CONFIG_HOME": "rel"}) == Path("/home/me/.config/holdfast/keys.json")
    assert key_file_path({**home, "HOLDFAST_KEYS_FILE": "/a/b=c"}) == Path("/a/b=c")
    assert key_file_path({**home, "HOLDFAST_KEYS": "/a/b=c"}) == Path("/a/b=c")
    assert key_file_path({**home, "HOLDFAST_KEYS": "./b"}) == Path.cwd() / "b"
    assert key_file_path({**home, "HOLDFAST_KEYS": "", "HOLDFAST_KEYS_FILE": ""}).name == "keys.json"
    for wrong in ({"HOLDFAST_KEYS": f"k1={encoded(KEY)}"}, {"HOLDFAST_KEYS": "/a", "HOLDFAST_KEYS_FILE": "/b"}):
        with pytest.raises(ConfigurationError):
            key_file_path(wrong)
    with pytest.raises(ConfigurationError, match="both set"):
        KeyRing.from_environment({"HOLDFAST_KEYS": f"k1={encoded(KEY)}", "HOLDFAST_KEYS_FILE": "/b"}).active_key()
    named = KeyRing.from_environment({"HOLDFAST_KEYS_FILE": str(tmp_path / "none")})
    with pytest.raises(ConfigurationError, match="there is no key file"):
        named.active_key()


def test_without_any_key_sealing_and_opening_say_what_to_do(tmp_path: Path) -> None:
    ring = KeyRing.from_environment({"HOME": str(tmp_path)})
    with pytest.raises(EncryptionKeyError, match="holdfast encryption init") as caught:
        seal(ring, "n", "k", b"x", JSON)
    assert caught.value.key_id is None
    with pytest.raises(EncryptionKeyError) as caught:
        open_sealed(ring, "n", "k", seal(RING, "n", "k", b"x", JSON))
    assert caught.value.key_id == "k1"
    # A key that comes later is seen without a new ring.
    create_key_file(key_file_path({"HOME": str(tmp_path)}))
    assert open_sealed(ring, "n", "k", seal(ring, "n", "k", b"x", JSON)) == (b"x", JSON)


# The source document's variables.

PHRASE = "an example of thirty-two letters"


def test_E21_a_key_of_32_characters_encrypts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environ = {"HOME": str(tmp_path), "CONTEXT_ENCRYPTION_ENABLED": "true", "CONTEXT_ENCRYPTION_KEY": PHRASE}
    with caplog.at_level(logging.WARNING):
        ring = KeyRing.from_environment(environ)
        envelope = seal(ring, "n", "k", b"secret", JSON)
        again = KeyRing.from_environment(dict(environ))
        assert open_sealed(again, "n", "k", envelope) == (b"secret", JSON)
    assert encryption_by_default(environ) is True
    assert key_id_of(envelope) == "phrase-9aa43261"  # other processes come to the same one
    assert [record.getMessage() for record in caplog.records] == ["a key from a passphrase is weaker than a random one"]
    assert PHRASE not in caplog.text
    other = KeyRing.from_environment({**environ, "CONTEXT_ENCRYPTION_KEY": PHRASE[::-1]})
    with pytest.raises(EncryptionKeyError):
        open_sealed(other, "n", "k", envelope)


@pytest.mark.parametrize("phrase", [PHRASE[1:], PHRASE + "x", "your_32_character_secret_key"])
def test_E21_a_key_of_another_length_is_refused(tmp_path: Path, phrase: str) -> None:
    ring = KeyRing.from_environment({"HOME": str(tmp_path), "CONTEXT_ENCRYPTION_KEY": phrase})
    with pytest.raises(ConfigurationError, match=f"{len(phrase)} characters, not 32") as caught:
        ring.active_key()
    assert phrase not in str(caught.value)
    assert repr(ring)  # tells where it reads, whatever it finds there


def test_E21_random_keys_come_before_the_phrase_which_still_opens(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "CONTEXT_ENCRYPTION_KEY": PHRASE}
    before = seal(KeyRing.from_environment(environ), "n", "k", b"old", JSON)
    created = create_key_file(key_file_path(environ))
    ring = KeyRing.from_environment(environ)
    assert key_id_of(seal(ring, "n", "k", b"new", JSON)) == created
    assert open_sealed(ring, "n", "k", before) == (b"old", JSON)


@pytest.mark.parametrize(
    ("value", "meant"), [("true", True), ("TRUE", True), ("1", True), ("false", False), ("", False), (" no ", False)]
)
def test_E21_enabled_is_the_default_of_writers_that_do_not_say(value: str, meant: bool) -> None:
    assert encryption_by_default({"CONTEXT_ENCRYPTION_ENABLED": value}) is meant
    assert encryption_by_default({}) is False
    with pytest.raises(ConfigurationError):
        encryption_by_default({"CONTEXT_ENCRYPTION_ENABLED": "maybe"})


# The key file.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "conf" / "keys.json"


def write(path: Path, content: object, mode: int = 0o600) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    path.chmod(mode)


def content(**changes: Any) -> dict[str, Any]:
    keys = {"k1": {"key": encoded(KEY), "created_at": "2026-01-31T09:30:00Z"}, "k2": {"key": encoded(OTHER)}}
    return {"v": 1, "active": "k2", "keys": keys, **changes}


def test_a_key_file_is_read(path: Path) -> None:
    write(path, content())
    ring = KeyRing.from_file(path)
    assert ring.active_key().secret == OTHER
    first = ring.key("k1")
    assert (first.secret, first.created_at) == (KEY, datetime(2026, 1, 31, 9, 30, tzinfo=UTC))
    assert first.origin == str(path)


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b" " * (1024 * 1024 + 1),
        [],
        content(v=2),
        content(v="1"),
        content(active="k3"),
        content(active=None),
        content(more=1),
        content(keys={}),
        content(keys={"k2": {}}),
        content(keys={"k2": encoded(KEY)}),
        content(keys={"k2": {"key": encoded(KEY[1:])}}),
        content(keys={"k2": {"key": "?" + encoded(KEY)}}),
        content(keys={"k2": {"key": encoded(KEY), "created_at": "yesterday"}}),
        content(keys={"k2": {"key": encoded(KEY), "created_at": "2026-01-31T09:30:00"}}),
        content(keys={"k2": {"key": encoded(KEY), "secret": encoded(KEY)}}),
        content(keys={"k2": {"key": encoded(KEY)}, "k/1": {"key": encoded(KEY)}}),
        content(keys={"k2": {"key": encoded(KEY)}, encoded(KEY): {"key": encoded(KEY)}}),
    ],
    ids=repr,
)
def test_a_key_file_that_is_wrong_is_told_without_a_key(path: Path, wrong: object) -> None:
    write(path, wrong)
    for attempt in (lambda: KeyRing.from_file(path).active_key(), lambda: rotate_key_file(path)):
        with pytest.raises(ConfigurationError) as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert encoded(KEY)[:20] not in str(caught.value)
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o644])
def test_a_key_file_that_others_may_use_is_refused(path: Path, mode: int) -> None:
    write(path, content(), mode)
    for attempt in (lambda: KeyRing.from_file(path).active_key(), lambda: rotate_key_file(path)):
        with pytest.raises(ConfigurationError, match=f"chmod 600 {path}"):
            attempt()
    path.chmod(0o400)
    assert KeyRing.from_file(path).active_key().id == "k2"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "keys")
    with pytest.raises(ConfigurationError):
        KeyRing.from_file(tmp_path / "keys").active_key()


def test_a_new_key_file_is_its_owners_alone_and_not_overwritten(path: Path) -> None:
    previous = os.umask(0)
    try:
        key_id = create_key_file(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="encryption rotate"):
        create_key_file(path)
    assert path.read_bytes() == before
    keys, _ = read_key_file(path)
    assert keys.active == key_id
    assert len(keys.keys[key_id].secret) == 32


def test_E12_rotation_rewrites_nothing_and_old_bodies_stay_readable(path: Path) -> None:
    first = create_key_file(path, datetime(2026, 1, 31, tzinfo=UTC))
    assert first.startswith("k20260131-")
    writer, reader = KeyRing.from_file(path), KeyRing.from_file(path)
    old = seal(writer, "n", "k", b"old", JSON)
    assert open_sealed(reader, "n", "k", old) == (b"old", JSON)
    before, after = rotate_key_file(path)
    assert before == first != after
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # Rings that were open see it: the writer at its next sealing, the reader at the first key it does not know.
    new = seal(writer, "n", "k", b"new", JSON)
    assert key_id_of(new) == after
    assert open_sealed(reader, "n", "k", new) == (b"new", JSON)
    assert open_sealed(reader, "n", "k", old) == (b"old", JSON)
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.json"]


def test_a_key_that_is_gone_from_its_file_seals_no_more(path: Path) -> None:
    create_key_file(path)
    ring = KeyRing.from_file(path)
    envelope = seal(ring, "n", "k", b"x", JSON)
    path.unlink()
    # What is known still opens, but nothing new is sealed with a key that nobody may have kept.
    assert open_sealed(ring, "n", "k", envelope) == (b"x", JSON)
    with pytest.raises(ConfigurationError):
        seal(ring, "n", "k", b"x", JSON)


def test_rotations_at_the_same_moment_lose_no_key(path: Path) -> None:
    ids = [create_key_file(path)]
    rotations: list[tuple[str, str]] = []
    threads = [threading.Thread(target=lambda: rotations.append(rotate_key_file(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys, _ = read_key_file(path)
    assert set(keys.keys) == {*ids, *(after for _, after in rotations)}
    assert len(keys.keys) == 9


def test_a_rotation_that_cannot_be_written_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_key_file(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="no space left"):
        rotate_key_file(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.json"]


def test_a_key_file_behind_a_link_stays_behind_it(path: Path, tmp_path: Path) -> None:
    create_key_file(path)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    _, active = rotate_key_file(link)
    assert link.is_symlink()
    assert KeyRing.from_file(path).active_key().id == active


def test_rotating_where_there_is_no_file_says_how_to_make_one(path: Path) -> None:
    with pytest.raises(EncryptionKeyError, match="holdfast encryption init"):
        rotate_key_file(path)
    assert not path.parent.exists()


# The package.


def test_the_sdk_alone_needs_no_cryptography_and_says_how_to_get_it() -> None:
    code = """
import sys
import holdfast.client
from holdfast.client.encryption import seal
from holdfast.client.key_ring import KeyRing
assert not [name for name in sys.modules if name.split(".")[0] == "cryptography"]
sys.modules["cryptography"] = None
try:
    seal(KeyRing.of({"k": bytes(32)}, "k"), "n", "k", b"x", "text/plain")
except holdfast.client.ConfigurationError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'holdfast[encryption]'" in done.stdout
