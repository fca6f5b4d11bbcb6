"""The file of an export: written as the golden file has it, read back as it was, refused when it is not whole."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.ops import export_format
from holdfast.ops.export_files import compressed, is_export, open_export
from holdfast.ops.export_format import LINE_BYTES, End, ExportWriter, Header, MissingLine, read_export
from holdfast.ops.export_import import check_export, is_same_state, is_same_version, on_top, plan_batch
from holdfast.schemas.bodies import BINARY, TEXT
from holdfast.schemas.errors import DigestMismatchError, HoldfastError, IntegrityError, InvalidFieldError, NotFoundError
from holdfast.schemas.limits import COMMIT_KEYS
from holdfast.schemas.refs import JSON, Digest, Ref, compute_digest, digest_from_bytes
from holdfast.schemas.rows import ContextRow, KeyVersionRow
from holdfast.streams.codec import Manifest, seal
from tests.support import examples

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN: Final = Path(__file__).parent / "golden" / "export-v1.jsonl"
AT_MS: Final = 1_764_000_000_125


def context(
    body: bytes, content_type: str = JSON, kind: str = "context", expires_at_ms: int | None = None
) -> ContextRow:
    digest = compute_digest("golden", kind, body, content_type=content_type, expires_at_ms=expires_at_ms)
    return ContextRow(
        namespace="golden",
        kind=kind,
        digest=digest,
        content_type=content_type,
        body=body,
        size=len(body),
        stored_at_ms=0,
        epoch="",
        seq=0,
        form="chunk" if kind == "chunk" else "plain",
        expires_at_ms=expires_at_ms,
    )


def manifest(parts: list[ContextRow], tail: str) -> ContextRow:
    whole = b"".join(part.body for part in parts) + tail.encode()
    row = context(whole)
    described = Manifest(size=len(whole), chunks=[part.digest for part in parts], tail=tail, v=2)
    return msgspec.structs.replace(row, form="manifest", body=msgspec.json.encode(described))


def version(number: int, **fields: Any) -> KeyVersionRow:
    values: dict[str, Any] = {
        "namespace": "golden",
        "key": "store.plan",
        "version": number,
        "op": "put",
        "timestamp_ms": AT_MS,
        "stored_at_ms": AT_MS + 7,
        "epoch": "",
        "seq": 0,
        "event_id": f"019ab4d5-0000-7000-8000-{number:012}",
    }
    return KeyVersionRow(**(values | fields))


PLAIN: Final = context(b'{"goal":"book a flight","price":1.10}')
SPACED: Final = context(b'{\n  "a": 1\n}')
TEXTUAL: Final = context('said "ünïcödé"\n'.encode(), TEXT, kind="note")
BYTES: Final = context(b"\x00\xff", BINARY, kind="blob", expires_at_ms=AT_MS)
PARTS: Final = [context(b'[{"n":1},{"n":', BINARY, kind="chunk"), context(b"\xc3", BINARY, kind="chunk")]
GROWN: Final = manifest([PARTS[0], PARTS[0]], "2}]")
RECORDS: Final[list[ContextRow | KeyVersionRow | tuple[str, HoldfastError]]] = [
    PLAIN,
    SPACED,
    TEXTUAL,
    BYTES,
    *PARTS,
    GROWN,
    version(1, ref=PLAIN.ref),
    version(2, ref=SPACED.ref, op="patch", tags=("a", "b"), session_id="s", agent_id="planner", changed_by="me"),
    version(3, ref=TEXTUAL.ref, change_type="note", expires_at_ms=AT_MS + 1, source="web", confidence=0.5),
    version(4, op="delete", event_id=None),
    version(5, ref=BYTES.ref, op="rollback", proposed_by="p", approved_by="q", approved_at_ms=AT_MS),
    (Ref(f"ctx_context_{'a' * 32}"), NotFoundError("it is stored nowhere")),
    version(1, key="ünï.cödé", ref=GROWN.ref),
    version(2, key="ünï.cödé", op="expire"),
]


def write(file: Any, records: list[Any]) -> End:
    writer = ExportWriter(file, "golden", prefix="", created_at_ms=AT_MS)
    for record in records:
        if isinstance(record, ContextRow):
            writer.write_context(record)
        elif isinstance(record, KeyVersionRow):
            writer.write_version(record)
        else:
            writer.write_missing(*record)
    return writer.finish()


def written(records: list[Any] | None = None) -> bytes:
    file = io.BytesIO()
    write(file, RECORDS if records is None else records)
    return file.getvalue()


def read(raw: bytes) -> list[Any]:
    return [line.record for line in read_export(io.BytesIO(raw), "the file")]


def test_the_writer_writes_the_golden_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_format, "installed_version", lambda _: "0.1.0")
    assert written() == GOLDEN.read_bytes()


def test_the_reader_reads_the_golden_file() -> None:
    header, *records, end = read(GOLDEN.read_bytes())
    assert header == Header(v=1, namespace="golden", created_at="2025-11-24T16:00:00.125Z", holdfast="0.1.0")
    expected = [
        MissingLine(ref=record[0], code="not_found", reason="it is stored nowhere")
        if isinstance(record, tuple)
        else record
        for record in RECORDS
    ]
    assert records == expected
    assert isinstance(end, End)
    assert (end.keys, end.versions, end.contexts, end.missing) == (2, 7, 7, 1)


def test_every_line_is_json_with_a_type() -> None:
    lines = [json.loads(line) for line in written().splitlines()]
    assert {line["type"] for line in lines} == {"holdfast-export", "context", "version", "missing", "end"}
    by_digest = {line["digest"]: line for line in lines if line["type"] == "context"}
    assert by_digest[PLAIN.digest]["body"] == {"goal": "book a flight", "price": 1.1}
    assert by_digest[SPACED.digest]["body_text"] == '{\n  "a": 1\n}', "JSON with line breaks is kept as it was"
    assert by_digest[TEXTUAL.digest]["body_text"] == 'said "ünïcödé"\n'
    assert by_digest[BYTES.digest]["body_base64"] == "AP8="
    assert by_digest[GROWN.digest]["form"] == "manifest"
    assert by_digest[GROWN.digest]["body"]["chunks"] == [PARTS[0].digest] * 2
    assert by_digest[PARTS[0].digest]["form"] == "chunk"


@examples(100)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | st.sampled_from([b"", b" 1", b"1 ", b"[" * 80, b"NaN"]),
    st.sampled_from([JSON, TEXT, BINARY, "application/x-y; z=1"]),
)
def test_any_bytes_come_back_as_they_were(body: bytes, content_type: str) -> None:
    row = context(body, content_type)
    assert read(written([row]))[1] == row


def test_the_largest_stored_form_fits_into_a_line() -> None:
    (largest,) = seal("golden", "k", b"\x01" * 512 * 1024, content_type=TEXT)
    row = msgspec.structs.replace(context(b"\x01" * 512 * 1024, TEXT, "k"), digest=largest.digest)
    raw = written([row])
    assert max(map(len, raw.splitlines())) <= LINE_BYTES
    assert read(raw)[1] == row


def changed(number: int, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with one line changed, its closing line made anew to fit."""
    lines = written().splitlines(keepends=True)
    line = json.loads(lines[number])
    line = change(line) or line
    lines[number] = json.dumps(line).encode() + b"\n"
    end = json.loads(lines[-1])
    hasher = export_format._hasher()
    hasher.update(b"".join(lines[:-1]))
    end["digest"] = digest_from_bytes(hasher.digest())
    return b"".join(lines[:-1]) + json.dumps(end).encode() + b"\n"


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (1, lambda line: line.update(body={"other": 1})),
        (1, lambda line: line.update(kind="another")),
        (1, lambda line: line.update(content_type="text/plain\r\nHf-Enc: zstd")),
        (1, lambda line: line.update(expires_at_ms=-1)),
        (1, lambda line: line.update(digest="short")),
        (1, lambda line: line.update(body_text="two bodies")),
        (1, lambda line: line.pop("body") and None),
        (1, lambda line: line.update(form="touch")),
        (4, lambda line: line.update(body_text="ÿ", body_base64=None)),
        (5, lambda line: line.update(form="plain")),
        (7, lambda line: line.update(body={"v": 2, "size": 1, "chunks": ["x"]})),
        (8, lambda line: line.update(version=0)),
        (8, lambda line: line.update(op="invent")),
        (8, lambda line: line.update(ref="ctx_x")),
        (8, lambda line: line.update(key="")),
        (8, lambda line: line.update(key="k" * 800)),
        (8, lambda line: line.update(tags=["t"] * 65)),
        (8, lambda line: line.update(timestamp_ms="now")),
        (8, lambda line: line.update(type="verse")),
        (8, lambda line: {"type": "holdfast-export", "v": 1, "namespace": "golden"}),
        (14, lambda line: line.update(ref="nothing")),
    ],
)
def test_a_line_that_is_wrong_is_named(number: int, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(IntegrityError, match="the file") as raised:
        read(changed(number, change))
    assert raised.value.field == f"line {number + 1}"


def test_a_change_that_no_line_shows_is_found_by_the_closing_line() -> None:
    raw = written()
    with pytest.raises(DigestMismatchError) as raised:
        read(raw.replace(b'"planner"', b'"plotter"'))
    assert raised.value.field == f"line {raw.count(bytes([10]))}"


def test_counts_that_do_not_agree_are_found() -> None:
    lines = written().splitlines(keepends=True)
    end = json.loads(lines[-1]) | {"keys": 3}
    with pytest.raises(IntegrityError, match="counts"):
        read(b"".join(lines[:-1]) + json.dumps(end).encode())


def test_lines_after_the_end_are_refused() -> None:
    with pytest.raises(IntegrityError, match="has ended before it"):
        read(written() + b"\n")


def test_a_line_that_never_ends_is_not_read_whole() -> None:
    raw = written().splitlines(keepends=True)[0] + b"[" * (LINE_BYTES + 10)
    with pytest.raises(IntegrityError, match="over"):
        read(raw)


@pytest.mark.parametrize(
    "value", [b"[" * 100_000, b'{"type":"context","body":' + b"[" * 100_000, b'"' + b"\xff" * 10 + b'"']
)
def test_hostile_lines_are_damage(value: bytes) -> None:
    with pytest.raises(IntegrityError):
        read(written().splitlines(keepends=True)[0] + value + b"\n")


def test_members_of_a_later_release_are_passed_over() -> None:
    assert len(read(changed(8, lambda line: line.update(later={"x": 1})))) == len(RECORDS) + 2


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_are_read_as_plain_ones(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"all.jsonl{suffix}"
    with path.open("wb") as file:
        inner = compressed(file, path.name)
        write(inner, RECORDS)
        inner.close()
    raw = path.read_bytes()
    plain = {"": lambda: raw, ".gz": lambda: gzip.decompress(raw), ".zst": lambda: zstd.decompress(raw)}[suffix]()
    assert plain == written()
    assert is_export(path)
    with open_export(path) as opened:
        assert check_export(opened, "it").namespace == "golden"
    if suffix:
        path.write_bytes(raw[:-10])
        with open_export(path) as opened, pytest.raises(IntegrityError, match="line"):
            check_export(opened, "it")
        # Named otherwise, it is what it is.
        (tmp_path / "renamed").write_bytes(raw)
        assert is_export(tmp_path / "renamed")


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b'{"type":"context"}\n', b'{"session_id":"s"}\n', b"\x1f\x8bxx", b"\x28\xb5\x2f\xfdxx"]
)
def test_other_files_are_no_exports(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(raw)
    assert not is_export(path)
    with open_export(path) as file, pytest.raises((InvalidFieldError, IntegrityError)):
        check_export(file, "it")
    assert not is_export(tmp_path / "nowhere")


# What an import decides


def test_a_batch_ends_where_nothing_has_expired() -> None:
    def chain(*expired: int, count: int = COMMIT_KEYS + 50) -> list[KeyVersionRow]:
        return [version(n, expires_at_ms=AT_MS - 1 if n in expired else None) for n in range(1, count + 1)]

    assert plan_batch(chain(count=10), AT_MS, is_whole=False) == 0, "more are to come"
    assert plan_batch(chain(count=10), AT_MS, is_whole=True) == 10
    assert plan_batch(chain(1, 2, 3, count=3), AT_MS, is_whole=True) == 3, "the last is as it is"
    assert plan_batch(chain(), AT_MS, is_whole=True) == COMMIT_KEYS
    last = range(COMMIT_KEYS - 9, COMMIT_KEYS + 1)
    assert plan_batch(chain(*last), AT_MS, is_whole=True) == COMMIT_KEYS - 10
    assert plan_batch(chain(*range(1, 1000)), AT_MS, is_whole=True) == COMMIT_KEYS, "there is no better place"


def test_versions_are_the_same_by_their_event() -> None:
    one = version(3, ref=PLAIN.ref)
    assert is_same_version(one, msgspec.structs.replace(one, stored_at_ms=1, seq=9, epoch="e"))
    assert not is_same_version(one, msgspec.structs.replace(one, event_id="another"))
    assert not is_same_version(one, msgspec.structs.replace(one, ref=SPACED.ref))
    foreign = msgspec.structs.replace(one, event_id=None)
    assert is_same_version(foreign, foreign)
    assert not is_same_version(foreign, msgspec.structs.replace(foreign, timestamp_ms=1))


def test_a_state_on_top_is_a_change_of_its_own() -> None:
    newest, head = version(3, ref=PLAIN.ref, op="patch", tags=("t",)), version(9, ref=SPACED.ref)
    made = on_top(newest, head)
    assert (made.version, made.op, made.ref, made.tags, made.change_type) == (10, "put", PLAIN.ref, ("t",), "import")
    assert made.event_id not in (newest.event_id, head.event_id)
    assert not is_same_state(head, newest)
    assert is_same_state(made, newest)
    gone = on_top(version(4, op="expire"), head)
    assert (gone.op, gone.ref) == ("delete", None)
    assert is_same_state(gone, version(4, op="expire"))
    assert not is_same_state(gone, newest)


def test_digests_remembered_are_bounded() -> None:
    from holdfast.ops.exporting import SeenDigests

    def digest(number: int) -> Digest:
        return compute_digest("n", "k", b"%d" % number)

    seen = SeenDigests(most=3)
    assert [seen.add(digest(number)) for number in (1, 2, 3, 1, 4)] == [True, True, True, False, True]
    assert digest(1) in seen, "used last but one"
    assert digest(2) not in seen
