"""Chunks that become joints, and back: values in, values out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.lake.columns import to_batch, to_rows
from holdfast.lake.joints import CLASS_BYTES, DEPTH, assemble, decode_joint, size_class, to_joint
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import DigestMismatchError, HoldfastError, IntegrityError
from holdfast.schemas.refs import Digest, compute_digest
from holdfast.schemas.rows import ContextRow
from holdfast.workers.archive_plan import deduplicate_contexts, join_contexts
from tests.support import examples
from tests.test_lake_samples import context

NOWHERE = Digest("a" * 32)


def join(rows: list[ContextRow], archived: set[Digest]) -> list[ContextRow]:
    joined = join_contexts(deduplicate_contexts(rows, archived), archived)
    return [row for row in joined if isinstance(row, ContextRow)]


class Everything:
    """Holds any digest."""

    def __contains__(self, digest: object) -> bool:
        return True


def chunk(seq: int, body: bytes, *parts: ContextRow, **changes: Any) -> ContextRow:
    return context(
        seq,
        body,
        kind="chunk",
        content_type=BINARY,
        form="chunk",
        parts=tuple((part.digest, part.size) for part in parts),
        **changes,
    )


def text(number: int, size: int) -> bytes:
    return (b"%d said that; " % number * size)[:size]


def pair() -> tuple[ContextRow, ContextRow, ContextRow]:
    one, two = chunk(1, text(1, 600)), chunk(2, text(2, 700))
    return one, two, chunk(3, one.body + two.body + b'"rest\n\xff"', one, two)


def read_from(*rows: ContextRow) -> Any:
    stored = {row.digest: row for row in rows}
    return lambda digests: {digest: stored[digest] for digest in digests if digest in stored}


def test_a_chunk_put_together_of_archived_ones_is_a_list_of_them_and_what_follows() -> None:
    one, two, whole = pair()
    joint = to_joint(whole, {one.digest, two.digest})
    assert (joint.form, joint.digest, joint.kind, joint.size) == ("joint", whole.digest, "chunk", whole.size)
    line, rest = decode_joint(joint)
    assert (line.chunks, line.size, rest) == ([one.digest, two.digest], whole.size, b'"rest\n\xff"')
    made, failed = assemble([joint], read_from(one, two))
    assert (made, failed) == ({whole.digest: whole}, {})


def test_the_columns_of_a_file_give_a_joint_back_as_it_was() -> None:
    one, two, whole = pair()
    rows = [
        msgspec.structs.replace(to_joint(row, Everything()), parts=())
        for row in (one, whole, chunk(4, one.body + two.body, one, two))
    ]
    assert [row.form for row in rows] == ["chunk", "joint", "joint"]
    batch = to_batch("contexts", rows)
    assert batch.column("body_binary").to_pylist() == [one.body, b'"rest\n\xff"', b""]
    assert batch.column("created_at").null_count == 3
    assert to_rows("contexts", batch) == rows


def test_only_parts_that_are_archived_or_come_along_are_named() -> None:
    one, two, whole = pair()
    assert [row.form for row in join([one, two, whole], set())] == ["chunk", "chunk", "joint"]
    assert [row.form for row in join([whole, one, two], set())] == ["joint", "chunk", "chunk"]
    assert [row.form for row in join([whole], {one.digest, two.digest})] == ["joint"]
    # Stored again, a part is a touch: then the lake holds it.
    assert [row.form for row in join([one, two, whole], {one.digest})] == ["touch", "chunk", "joint"]
    assert join([two, whole], set()) == [two, whole]
    no_chunk = context(9, two.body, digest=two.digest)
    assert join([one, no_chunk, whole], set()) == [one, no_chunk, whole]


def forgeries() -> dict[str, ContextRow]:
    one, two, whole = pair()
    sizes = {"too small": 599, "nothing": 0, "negative": -600, "over the end": 10_000, "beyond": 1_301}
    forged = {
        name: msgspec.structs.replace(whole, parts=((one.digest, size), (two.digest, 700)))
        for name, size in sizes.items()
    }
    return forged | {
        "another's digest": msgspec.structs.replace(whole, parts=((NOWHERE, 600), (two.digest, 700))),
        "swapped": msgspec.structs.replace(whole, parts=((two.digest, 700), (one.digest, 600))),
        "twice": msgspec.structs.replace(whole, parts=((one.digest, 600), (one.digest, 600))),
        "itself": msgspec.structs.replace(whole, parts=((whole.digest, whole.size),)),
        "of its own class": chunk(5, text(5, 1_100) + b"more", chunk(6, text(5, 1_100))),
        "of many parts": msgspec.structs.replace(whole, parts=((one.digest, 1),) * 100_000),
        "of another namespace": msgspec.structs.replace(whole, namespace="other"),
        "no chunk": context(7, whole.body, parts=whole.parts),
    }


@pytest.mark.parametrize("name", forgeries())
def test_a_claim_that_is_not_so_leaves_the_chunk_as_it_is(name: str) -> None:
    row = forgeries()[name]
    assert to_joint(row, Everything()) is row


def test_a_list_that_is_longer_than_the_bytes_is_not_made() -> None:
    small = [chunk(n, text(n, 36)) for n in range(30)]
    whole = chunk(40, b"".join(row.body for row in small), *small)
    assert to_joint(whole, Everything()) is whole


@examples(200)
@given(
    st.binary(min_size=1, max_size=3_000),
    st.lists(st.tuples(st.integers(-5, 1_200), st.booleans()), max_size=6),
    st.integers(0, 40),
)
def test_whatever_is_claimed_the_bytes_come_back(body: bytes, claims: list[tuple[int, bool]], repeat: int) -> None:
    body += body[:64] * repeat
    at = 0
    rows: dict[Digest, ContextRow] = {}
    parts: list[tuple[Digest, int]] = []
    for size, honest in claims:
        part = chunk(len(rows) + 1, body[at : at + max(size, 0)])
        rows[part.digest] = part
        parts.append((part.digest, part.size if honest else size))
        at += part.size
    whole = msgspec.structs.replace(chunk(99, body), parts=tuple(parts))
    joint = to_joint(whole, rows)
    assert joint.digest == whole.digest
    if joint.form == "joint":
        assert len(joint.body) < whole.size
        [stored] = to_rows("contexts", to_batch("contexts", [joint]))
        assert isinstance(stored, ContextRow)
        made, failed = assemble([stored], read_from(*rows.values()))
        assert not failed
        assert made[whole.digest].body == body
    else:
        assert joint is whole


def tower() -> tuple[list[ContextRow], ContextRow]:
    """Joints over joints, one of each class: the rows as the lake holds them, and the topmost chunk."""
    rows = [chunk(1, text(1, 500))]
    top = rows[0]
    for level, size in enumerate(CLASS_BYTES, 2):
        top = chunk(level, top.body + text(level, size), top)
        rows.append(to_joint(top, Everything()))
    return rows, top


def test_joints_are_nested_as_deep_as_there_are_classes() -> None:
    rows, top = tower()
    assert [row.form for row in rows] == ["chunk", *["joint"] * DEPTH]
    asked: list[list[Digest]] = []

    def read(digests: list[Digest]) -> dict[Digest, ContextRow]:
        asked.append(digests)
        found: dict[Digest, ContextRow] = read_from(*rows)(digests)
        return found

    made, failed = assemble([rows[-1]], read)
    assert (made, failed) == ({top.digest: top}, {})
    assert len(asked) == DEPTH
    made, _ = assemble(rows[1:], read_from(*rows))
    assert sorted(made) == sorted(row.digest for row in rows[1:])


def test_a_part_that_is_missing_is_named_by_all_above_it_and_by_no_other() -> None:
    rows, _ = tower()
    one, two, whole = pair()
    sound = to_joint(whole, Everything())
    made, failed = assemble([*rows[1:], sound], read_from(*rows[1:], one, two))
    assert list(made) == [whole.digest]
    assert failed.keys() == {row.digest for row in rows[1:]}
    assert all(rows[0].digest in error.message for error in failed.values())
    assert all(isinstance(error, IntegrityError) for error in failed.values())


def damaged_joints() -> dict[str, tuple[ContextRow, type[HoldfastError]]]:
    one, two, whole = pair()
    joint = to_joint(whole, Everything())

    def with_line(line: bytes, **changes: Any) -> ContextRow:
        return msgspec.structs.replace(joint, body=line + b"\nrest", **changes)

    names = b'"%s"' % one.digest.encode()
    return {
        "no list": (with_line(b"[]"), IntegrityError),
        "not text": (with_line(b"\xff"), IntegrityError),
        "another size": (with_line(b'{"size":5,"chunks":[%s]}' % names), IntegrityError),
        "a later version": (with_line(b'{"size":%d,"chunks":[%s],"v":2}' % (whole.size, names)), IntegrityError),
        "no digests": (with_line(b'{"size":%d,"chunks":["x"]}' % whole.size), IntegrityError),
        "itself": (with_line(b'{"size":%d,"chunks":["%s"]}' % (whole.size, whole.digest.encode())), IntegrityError),
        "too much": (with_line(b'{"size":%d,"chunks":[%s]}' % (whole.size, b",".join([names] * 30))), IntegrityError),
        "other bytes": (msgspec.structs.replace(joint, body=joint.body[:-1] + b"!"), DigestMismatchError),
        "huge": (with_line(b'{"size":9999999,"chunks":[]}', size=9_999_999), IntegrityError),
        "two is gone": (
            msgspec.structs.replace(joint, body=joint.body.replace(two.digest.encode(), NOWHERE.encode())),
            IntegrityError,
        ),
    }


@pytest.mark.parametrize("name", damaged_joints())
def test_a_damaged_joint_is_an_error_that_names_it(name: str) -> None:
    one, two, _ = pair()
    row, error = damaged_joints()[name]
    made, failed = assemble([row], read_from(one, two, row))
    assert made == {}
    assert isinstance(failed[row.digest], error)
    assert row.ref in failed[row.digest].message


def test_a_chain_of_joints_that_nobody_writes_ends() -> None:
    """Each names the next, all of them larger than they say: reading stops after as many levels as there may be."""
    rows: list[ContextRow] = [context(1, b"x" * 200, kind="chunk", content_type=BINARY, form="chunk")]
    for seq in range(2, 40):
        line = b'{"size":200,"chunks":["%s"]}\n' % rows[-1].digest.encode()
        digest = compute_digest("default", "chunk", b"%d" % seq, content_type=BINARY)
        rows.append(msgspec.structs.replace(rows[0], seq=seq, form="joint", body=line, digest=digest))
    asked: list[Digest] = []

    def read(digests: list[Digest]) -> dict[Digest, ContextRow]:
        asked.extend(digests)
        found: dict[Digest, ContextRow] = read_from(*rows)(digests)
        return found

    made, failed = assemble([rows[-1]], read)
    assert (made, list(failed)) == ({}, [rows[-1].digest])
    assert len(asked) == DEPTH


def test_size_classes_begin_where_the_format_says() -> None:
    assert [size_class(size) for size in (0, 1_023, 1_024, 4_096, 16_384, 65_536, 131_071, 131_072, 524_288)] == [
        *(0, 0, 1, 2, 3, 4, 4, 5, 5)
    ]
