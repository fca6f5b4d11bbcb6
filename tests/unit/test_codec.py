"""The stored form: what is sealed unseals to the same bytes, and nothing else unseals at all."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.schemas import limits
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import (
    DigestMismatchError,
    HoldfastError,
    InvalidBodyError,
    InvalidFieldError,
    TooLargeError,
)
from holdfast.schemas.ids import MAX_MS
from holdfast.schemas.refs import JSON, Digest, compute_digest, format_ref
from holdfast.streams.codec import (
    Manifest,
    StoredForm,
    decode_manifest,
    inflate,
    join,
    reseal,
    seal,
    seal_shared,
    unseal,
)
from holdfast.streams.sharing import Part, Piece, Shape, plan_parts
from tests.support import examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.schemas.rows import ContextRow

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GOLDEN = Path(__file__).parent / "golden"
NS = "ns"


def unsealed(form: StoredForm, namespace: str = NS, **changes: str | None) -> ContextRow:
    headers = {
        **form.headers,
        **{name.replace("_", "-"): value for name, value in changes.items() if value is not None},
    }
    for name, value in changes.items():
        if value is None:
            headers.pop(name.replace("_", "-"), None)
    return unseal(namespace, form.digest, headers, form.payload, stored_at_ms=5, epoch="e", seq=7)


def whole(forms: Sequence[StoredForm], namespace: str = NS) -> ContextRow:
    rows = [unsealed(form, namespace) for form in forms]
    if rows[-1].form != "manifest":
        return rows[-1]
    return join(rows[-1], {row.digest: row.body for row in rows[:-1]})


BODIES = st.one_of(
    st.binary(max_size=50),
    st.builds(lambda unit, count: unit * count, st.binary(min_size=1, max_size=20), st.integers(0, 400)),
    st.builds(lambda seed: seed * 700, st.binary(min_size=1, max_size=3)),
)


@examples(150)
@given(
    st.text(min_size=1, max_size=8),
    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    BODIES,
    st.sampled_from([JSON, BINARY, "text/plain; charset=utf-8"]),
    st.none() | st.integers(0, MAX_MS),
)
def test_what_is_sealed_unseals_to_the_same(
    namespace: str, kind: str, body: bytes, content_type: str, expires_at_ms: int | None
) -> None:
    forms = seal(namespace, kind, body, content_type=content_type, expires_at_ms=expires_at_ms)
    row = whole(forms, namespace)
    assert (row.body, row.size, row.kind, row.content_type) == (body, len(body), kind, content_type)
    assert (row.expires_at_ms, row.form) == (expires_at_ms, "plain")
    assert (row.stored_at_ms, row.epoch, row.seq) == (5, "e", 7)
    digest = compute_digest(namespace, kind, body, content_type=content_type, expires_at_ms=expires_at_ms)
    assert row.ref == format_ref(kind, digest)
    assert seal(namespace, kind, body, content_type=content_type, expires_at_ms=expires_at_ms) == forms
    headers, payload = reseal(unsealed(forms[-1], namespace))
    assert (headers, payload) == (forms[-1].headers, forms[-1].payload)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_compression_begins_over_a_kibibyte_and_where_it_helps(more: int) -> None:
    (form,) = seal(NS, "k", b"x" * (limits.COMPRESS_OVER_BYTES + more))
    assert ("Hf-Enc" in form.headers) == (more > 0)
    (random_form,) = seal(NS, "k", os.urandom(2_000))
    assert "Hf-Enc" not in random_form.headers


@pytest.mark.parametrize("size", [limits.CHUNK_BYTES + 1, 2 * limits.CHUNK_BYTES, 2 * limits.CHUNK_BYTES + 1])
def test_large_bodies_are_chunked_under_a_manifest(size: int) -> None:
    body = os.urandom(size)
    forms = seal(NS, "k", body, expires_at_ms=9)
    assert len(forms) == -(-size // limits.CHUNK_BYTES) + 1
    rows = [unsealed(form) for form in forms]
    assert {row.form for row in rows[:-1]} == {"chunk"}
    assert (rows[-1].form, rows[-1].size, rows[-1].expires_at_ms) == ("manifest", size, 9)
    assert {row.expires_at_ms for row in rows[:-1]} == {None}
    assert whole(forms).body == body
    assert reseal(rows[-1]) == (forms[-1].headers, forms[-1].payload)
    assert reseal(rows[0]) == (forms[0].headers, forms[0].payload)


def test_a_body_of_a_chunk_is_not_chunked() -> None:
    assert len(seal(NS, "k", bytes(limits.CHUNK_BYTES))) == 1


class TestDamage:
    def test_a_flipped_bit_is_never_served(self) -> None:
        (form,) = seal(NS, "k", b"some body")
        for position in range(len(form.payload)):
            damaged = bytearray(form.payload)
            damaged[position] ^= 1
            with pytest.raises(DigestMismatchError):
                unsealed(msgspec.structs.replace(form, payload=bytes(damaged)))

    @examples(100)
    @given(st.data())
    def test_a_damaged_frame_is_never_served(self, data: st.DataObject) -> None:
        body = b"a body that compresses " * 100
        (form,) = seal(NS, "k", body)
        damaged = bytearray(form.payload)
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] ^= data.draw(st.integers(1, 255))
        try:
            row = unsealed(msgspec.structs.replace(form, payload=bytes(damaged)))
        except HoldfastError:
            return
        assert row.body == body  # a bit of the frame that says nothing about its content

    @pytest.mark.parametrize("cut", [0, 1, 4, 10, -1])
    def test_a_truncated_frame_is_refused(self, cut: int) -> None:
        (form,) = seal(NS, "k", b"x" * 5_000)
        with pytest.raises(InvalidBodyError):
            unsealed(msgspec.structs.replace(form, payload=form.payload[:cut]))

    @pytest.mark.parametrize("tail", [b"\x00", b"x" * 100])
    def test_bytes_after_the_frame_are_refused(self, tail: bytes) -> None:
        (form,) = seal(NS, "k", b"x" * 5_000)
        with pytest.raises(InvalidBodyError):
            unsealed(msgspec.structs.replace(form, payload=form.payload + tail))

    def test_a_second_frame_is_refused(self) -> None:
        (form,) = seal(NS, "k", b"x" * 5_000)
        with pytest.raises(InvalidBodyError):
            unsealed(msgspec.structs.replace(form, payload=form.payload * 2))

    @pytest.mark.parametrize("size", [limits.CHUNK_BYTES + 1, 100 * limits.MIB])
    def test_a_bomb_is_refused_before_it_inflates(self, size: int) -> None:
        form = StoredForm(Digest("a" * 32), {"Hf-Kind": "k", "Hf-Enc": "zstd"}, zstd.compress(bytes(size)))
        with pytest.raises(TooLargeError) as caught:
            unsealed(form)
        assert caught.value.limit == limits.CHUNK_BYTES

    def test_a_frame_that_does_not_say_its_size_is_read_also_after_a_damaged_one(self) -> None:
        (form,) = seal(NS, "k", b"x" * 5_000)
        with pytest.raises(InvalidBodyError):
            unsealed(msgspec.structs.replace(form, payload=form.payload[:-3]))
        assert unsealed(form).body == b"x" * 5_000
        compressor = zstd.ZstdCompressor()
        streamed = compressor.compress(b"x" * 4_000) + compressor.compress(b"x" * 1_000) + compressor.flush()
        assert unsealed(msgspec.structs.replace(form, payload=streamed)).body == b"x" * 5_000

    @pytest.mark.parametrize("payload", [b"", b"\x28\xb5\x2f\xfd", b"not zstd", b"\x50\x2a\x4d\x18" + b"\xff" * 4])
    def test_what_is_no_frame_is_refused(self, payload: bytes) -> None:
        with pytest.raises(InvalidBodyError):
            unsealed(StoredForm(Digest("a" * 32), {"Hf-Kind": "k", "Hf-Enc": "zstd"}, payload))

    @pytest.mark.parametrize(
        "changes",
        [
            {"Hf_Kind": None},
            {"Hf_Kind": ""},
            {"Hf_Kind": "a b"},
            {"Hf_Kind": "other"},
            {"Hf_V": "2"},
            {"Hf_V": ""},
            {"Hf_V": "1.0"},
            {"Hf_Type": "text/plain"},
            {"Hf_Exp": ""},
            {"Hf_Exp": "-1"},
            {"Hf_Exp": "5"},
            {"Hf_Exp": "²"},
            {"Hf_Exp": "٣"},
            {"Hf_Exp": "1e3"},
            {"Hf_Exp": "9" * 15},
            {"Hf_Exp": "9" * 5_000},
            {"Hf_Enc": "gzip"},
            {"Hf_Enc": ""},
            {"Hf_Form": "plain"},
            {"Hf_Form": "touch"},
            {"Hf_Form": ""},
            {"Hf_Form": "manifest"},
        ],
        ids=str,
    )
    def test_wrong_headers_are_refused(self, changes: dict[str, Any]) -> None:
        (form,) = seal(NS, "k", b"{}")
        assert unsealed(form).body == b"{}"
        with pytest.raises(HoldfastError):
            unsealed(form, **changes)

    def test_another_namespace_or_key_is_refused(self) -> None:
        (form,) = seal(NS, "k", b"{}")
        with pytest.raises(DigestMismatchError):
            unsealed(form, namespace="other")
        with pytest.raises(DigestMismatchError):
            unsealed(msgspec.structs.replace(form, digest=Digest("a" * 32)))
        for key in ("", "short", "A" * 32, "a" * 33):
            with pytest.raises(InvalidFieldError):
                unsealed(msgspec.structs.replace(form, digest=Digest(key)))

    def test_unknown_headers_are_no_matter(self) -> None:
        (form,) = seal(NS, "k", b"{}")
        assert unsealed(form, Hf_Future="x", Other="y").body == b"{}"

    @examples(200)
    @given(
        st.dictionaries(
            st.sampled_from(["Hf-Kind", "Hf-Type", "Hf-Exp", "Hf-Enc", "Hf-Form", "Hf-V", "X"]),
            st.one_of(st.text(max_size=10), st.sampled_from(["k", "zstd", "manifest", "chunk", "1"])),
        ),
        st.binary(max_size=60),
    )
    def test_any_message_unseals_or_is_a_typed_error(self, headers: dict[str, str], payload: bytes) -> None:
        with pytest.raises(HoldfastError):
            unseal(NS, "a" * 32, headers, payload, stored_at_ms=0)


def manifest_of(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"size": limits.CHUNK_BYTES + 1, "chunks": ["a" * 32, "b" * 32], "v": 1}
    return msgspec.json.encode(fields | changes)


class TestManifests:
    def test_a_manifest_decodes(self) -> None:
        assert decode_manifest(manifest_of()) == Manifest(
            size=limits.CHUNK_BYTES + 1, chunks=[Digest("a" * 32), Digest("b" * 32)]
        )

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b"[]",
            b"null",
            b"\xff",
            b"[" * 10_000,
            manifest_of(v=3),
            manifest_of(v=2, chunks=[]),
            manifest_of(v=2, chunks=["a" * 32] * (limits.MANIFEST_CHUNKS + 1)),
            manifest_of(v=2, tail="x" * (limits.TAIL_CHARS + 1)),
            manifest_of(v=2, tail=5),
            manifest_of(v=2, size=-1),
            manifest_of(size=-1, chunks=[]),
            manifest_of(v=2).replace(b'"v"', b'"tail":"\\ud800","v"'),
            manifest_of(tail="x"),
            manifest_of(v="1"),
            manifest_of(size=-1),
            manifest_of(size=1.5),
            manifest_of(size="5"),
            manifest_of(size=limits.CHUNK_BYTES),
            manifest_of(size=2 * limits.CHUNK_BYTES + 1),
            manifest_of(size=limits.BODY_BYTES + 1, chunks=["a" * 32] * 129),
            manifest_of(size=2**80),
            manifest_of(chunks=[]),
            manifest_of(chunks=["a" * 32]),
            manifest_of(chunks=["a" * 32, "short"]),
            manifest_of(chunks=["a" * 32, 5]),
            manifest_of(chunks=None),
            manifest_of(chunks={"a": 1}),
        ],
        ids=lambda body: body[:40].decode("latin-1"),
    )
    def test_what_is_no_manifest_is_refused(self, body: bytes) -> None:
        with pytest.raises(HoldfastError):
            decode_manifest(body)
        with pytest.raises(HoldfastError):
            unsealed(StoredForm(Digest("a" * 32), {"Hf-Kind": "k", "Hf-Form": "manifest"}, body))

    def test_a_forged_manifest_does_not_join(self) -> None:
        """It decodes, its chunks are sound, but together they are not what its key names."""
        forms = seal(NS, "k", os.urandom(limits.CHUNK_BYTES + 5))
        others = seal(NS, "k", os.urandom(limits.CHUNK_BYTES + 5))
        forged = msgspec.structs.replace(others[-1], digest=forms[-1].digest)
        with pytest.raises(DigestMismatchError):
            whole([*others[:-1], forged])

    def test_chunks_in_another_order_do_not_join(self) -> None:
        body = os.urandom(2 * limits.CHUNK_BYTES)
        *chunks, head = seal(NS, "k", body)
        manifest = decode_manifest(head.payload)
        swapped = msgspec.structs.replace(manifest, chunks=list(reversed(manifest.chunks)))
        with pytest.raises(DigestMismatchError):
            whole([*chunks, msgspec.structs.replace(head, payload=msgspec.json.encode(swapped))])

    def test_a_chunk_that_is_not_what_its_key_says_is_refused(self) -> None:
        chunk, *_ = seal(NS, "k", os.urandom(limits.CHUNK_BYTES + 5))
        with pytest.raises(DigestMismatchError):
            unsealed(msgspec.structs.replace(chunk, payload=chunk.payload[:-1] + b"?"))


def shared(body: bytes, old: bytes = b"", shape: Shape | None = None) -> tuple[list[StoredForm], StoredForm, Shape]:
    return seal_shared((NS, "k", JSON, None), body, plan_parts(body, old, shape))


def grown(bodies: Sequence[bytes]) -> tuple[dict[Digest, StoredForm], StoredForm]:
    """Every chunk that was stored for a body that grew, and the manifest of its last version."""
    chunks: dict[Digest, StoredForm] = {}
    old, shape, head = b"", Shape(), None
    for body in bodies:
        forms, head, shape = shared(body, old, shape)
        chunks |= {form.digest: form for form in forms}
        old = body
    assert head is not None
    return chunks, head


def conversation(turns: int) -> bytes:
    return msgspec.json.encode([{"turn": turn, "says": f"ü {turn * 7919} " * 30} for turn in range(turns)])


class TestSharedParts:
    @examples(60)
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.booleans())
    def test_what_is_sealed_in_parts_joins_to_the_same(self, turns: list[int], has_counter: bool) -> None:
        bodies = [
            conversation(count) + b" " * 600 + (b'{"n":%d}' % place if has_counter else b"")
            for place, count in enumerate(turns)
        ]
        chunks, head = grown(bodies)
        row = unsealed(head)
        assert (row.form, row.size) == ("manifest", len(bodies[-1]))
        manifest = decode_manifest(row.body)
        assert manifest.v == 2
        joined = join(row, {digest: unsealed(chunks[digest]).body for digest in manifest.chunks})
        assert (joined.body, joined.size, joined.form) == (bodies[-1], len(bodies[-1]), "plain")
        assert joined.digest == compute_digest(NS, "k", bodies[-1])
        assert {unsealed(form).form for form in chunks.values()} == {"chunk"}

    def test_the_reference_does_not_depend_on_how_a_body_is_stored(self) -> None:
        body = conversation(60)
        assert shared(body)[1].digest == seal(NS, "k", body)[-1].digest
        assert grown([conversation(50), body])[1].digest == shared(body)[1].digest

    def test_only_what_is_new_is_to_be_stored(self) -> None:
        old, new = conversation(40), conversation(41)
        _, _, shape = shared(old)
        forms, head, grown_shape = shared(new, old, shape)
        assert sum(len(unsealed(form).body) for form in forms) < 1_000
        assert grown_shape.parts[: len(shape.parts)] == shape.parts
        assert len(head.payload) < 300

    def test_a_part_that_was_put_together_names_what_it_begins_with(self) -> None:
        chunks, _ = grown([conversation(turns) for turns in range(20, 60)])
        named = [unsealed(form) for form in chunks.values() if "Hf-Parts" in form.headers]
        assert named
        for row in named:
            beginning = b"".join(unsealed(chunks[digest]).body for digest, _ in row.parts)
            assert row.body.startswith(beginning)
            assert [size for _, size in row.parts] == [len(unsealed(chunks[digest]).body) for digest, _ in row.parts]

    @pytest.mark.parametrize(
        "parts",
        ["", "x", "a:1", "a" * 32, "a" * 32 + ":", "a" * 32 + ":-1", "a" * 32 + ":1e3", "a" * 32 + ":99999999", ","],
    )
    def test_a_list_of_parts_that_does_not_read_is_no_matter(self, parts: str) -> None:
        """The chunk is what its digest says, whatever it is said to begin with."""
        (form, *_), _, _ = shared(conversation(30))
        row = unsealed(form, Hf_Parts=parts)
        assert (row.parts, row.form) == ((), "chunk")

    @pytest.mark.parametrize(
        "change", ["a byte more", "a byte less", "another tail", "no tail", "swapped", "repeated", "dropped"]
    )
    def test_a_manifest_that_was_altered_does_not_join(self, change: str) -> None:
        chunks, head = grown([conversation(turns) for turns in (20, 24, 28)])
        row = unsealed(head)
        manifest = decode_manifest(row.body)
        first, *others = manifest.chunks
        alterations: dict[str, dict[str, Any]] = {
            "a byte more": {"size": manifest.size + 1},
            "a byte less": {"size": manifest.size - 1},
            "another tail": {"tail": "}" * len(manifest.tail or "")},
            "no tail": {"tail": ""},
            "swapped": {"chunks": [*others, first]},
            "repeated": {"chunks": [first, *manifest.chunks]},
            "dropped": {"chunks": others},
        }
        body = msgspec.json.encode(msgspec.structs.replace(manifest, **alterations[change]))
        bodies = {digest: unsealed(form).body for digest, form in chunks.items()}
        assert join(row, bodies).body == conversation(28)
        with pytest.raises(DigestMismatchError):
            join(msgspec.structs.replace(row, body=body), bodies)

    def test_a_manifest_that_names_one_chunk_thousands_of_times_takes_no_memory(self) -> None:
        chunk = bytes(limits.CHUNK_BYTES)
        digest = compute_digest(NS, "chunk", chunk, content_type=BINARY)
        manifest = Manifest(size=limits.BODY_BYTES, chunks=[digest] * limits.MANIFEST_CHUNKS, tail="", v=2)
        row = unsealed(
            StoredForm(Digest("a" * 32), {"Hf-Kind": "k", "Hf-Form": "manifest"}, msgspec.json.encode(manifest))
        )
        tracemalloc.start()
        try:
            with pytest.raises(DigestMismatchError):
                join(row, {digest: chunk})
            assert tracemalloc.get_traced_memory()[1] < limits.MIB
        finally:
            tracemalloc.stop()

    def test_what_is_said_to_be_text_and_is_not_has_no_tail_of_text(self) -> None:
        body = b"a" * 3_000 + b"\xff" * 5
        with pytest.raises(UnicodeDecodeError):
            seal_shared((NS, "k", "text/plain", None), body, [Piece(0, 3_000)])


class GoldenForm(msgspec.Struct, forbid_unknown_fields=True):
    """One context as a version of the format stores it."""

    namespace: str
    kind: str
    content_type: str
    expires_at_ms: int | None
    body_hex: str
    body_repeats: int
    forms: list[StoredForm]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("stored-form-v*.json")), ids=lambda path: path.stem)
def test_every_version_of_the_format_is_still_read(path: Path) -> None:
    contexts = msgspec.json.decode(path.read_bytes(), type=list[GoldenForm])
    assert len(contexts) >= 5
    for context in contexts:
        body = bytes.fromhex(context.body_hex) * context.body_repeats
        row = whole(context.forms, context.namespace)
        assert (row.body, row.kind, row.content_type) == (body, context.kind, context.content_type)
        assert row.expires_at_ms == context.expires_at_ms


def test_shared_parts_are_written_as_the_golden_ones_are() -> None:
    """All but zstd's frames; which parts a body has may be planned otherwise, how they are stored may not."""
    contexts = msgspec.json.decode((GOLDEN / "stored-form-v2.json").read_bytes(), type=list[GoldenForm])
    for context in contexts:
        golden = {form.digest: form for form in context.forms}
        head = context.forms[-1]
        pieces: list[Piece] = []
        for digest in decode_manifest(inflate(head.headers, head.payload)).chunks:
            row = unsealed(golden[digest], context.namespace)
            start = pieces[-1].end if pieces else 0
            pieces.append(Piece(start, start + row.size, of=tuple(Part(*part) for part in row.parts)))
        body = bytes.fromhex(context.body_hex)
        identity = (context.namespace, context.kind, context.content_type, context.expires_at_ms)
        chunks, written, _ = seal_shared(identity, body, pieces)
        for form in (*chunks, written):
            assert form.headers == golden[form.digest].headers
            assert inflate(form.headers, form.payload) == inflate(form.headers, golden[form.digest].payload)
        assert {form.digest for form in (*chunks, written)} == set(golden)


def test_the_format_that_is_written_is_the_newest_golden_one() -> None:
    """All but zstd's frames, which a newer zstd may write otherwise."""
    contexts = msgspec.json.decode((GOLDEN / "stored-form-v1.json").read_bytes(), type=list[GoldenForm])
    for context in contexts:
        body = bytes.fromhex(context.body_hex) * context.body_repeats
        forms = seal(
            context.namespace,
            context.kind,
            body,
            content_type=context.content_type,
            expires_at_ms=context.expires_at_ms,
        )
        assert [(form.digest, form.headers) for form in forms] == [
            (form.digest, form.headers) for form in context.forms
        ]
        for form, golden in zip(forms, context.forms, strict=True):
            if "Hf-Enc" not in form.headers:
                assert form.payload == golden.payload
