"""Growing bodies in the lake: parts put together are lists of others there, and every reader sees the bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.lake import Lake, LakeIndex, Lookup, compact, connect, verify_lake
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import IntegrityError
from holdfast.schemas.refs import compute_digest
from holdfast.schemas.rows import ContextRow
from holdfast.streams.codec import decode_manifest, seal, seal_shared, unseal
from holdfast.streams.sharing import SHARE_OVER_BYTES, Shape, plan_parts
from holdfast.workers.archive_plan import deduplicate_contexts, join_contexts
from tests.test_lake_samples import EPOCH, T0_MS, MemoryTail

if TYPE_CHECKING:
    from holdfast.schemas.refs import Digest

LATER_MS = 2_000_000_000_000


class Session:
    """A conversation whose steps are random hexadecimal digits, stored whole after each."""

    def __init__(self, number: int) -> None:
        self._random = random.Random(number)
        self._steps: list[bytes] = []
        self._body = b""
        self._shape = Shape()

    def turn(self, first_seq: int) -> tuple[list[ContextRow], bytes]:
        """The rows that a turn stores, and the body after it."""
        step = self._random.randbytes(self._random.randrange(20, 700)).hex()
        self._steps.append(msgspec.json.encode({"n": len(self._steps), "text": f"{step} ä\n"}))
        body = b"[" + b",".join(self._steps) + b"]"
        if len(body) > SHARE_OVER_BYTES:
            pieces = plan_parts(body, self._body if self._shape.parts else b"", self._shape)
            chunks, head, self._shape = seal_shared(("default", "talk", "application/json", None), body, pieces)
            forms = [*chunks, head]
        else:
            forms = seal("default", "talk", body)
        self._body = body
        rows = [
            unseal("default", form.digest, form.headers, form.payload, stored_at_ms=T0_MS + seq, epoch=EPOCH, seq=seq)
            for seq, form in enumerate(forms, first_seq)
        ]
        return rows, body


def grown(turns: int, sessions: int = 1) -> tuple[list[ContextRow], dict[Digest, bytes]]:
    """Sessions under way at the same time: rows in the order of storing, and the body of each version."""
    rows: list[ContextRow] = []
    bodies: dict[Digest, bytes] = {}
    under_way = [Session(number) for number in range(sessions)]
    for _ in range(turns):
        for session in under_way:
            more, body = session.turn(len(rows) + 1)
            rows += more
            bodies[more[-1].digest] = body
    return rows, bodies


def joined(rows: Sequence[ContextRow], archived: set[Digest]) -> list[ContextRow]:
    kept = join_contexts(deduplicate_contexts(rows, archived), archived)
    return [row for row in kept if isinstance(row, ContextRow)]


def archive(lake: Lake, rows: Sequence[ContextRow], run: int = 150) -> list[ContextRow]:
    """Appends rows as the archiver does, in runs; returns them as the lake holds them."""
    archived: set[Digest] = set()
    kept: list[ContextRow] = []
    for start in range(0, len(rows), run):
        some = rows[start : start + run]
        more = joined(some, archived)
        lake.append("contexts", more, epoch=EPOCH, first_seq=some[0].seq, last_seq=some[-1].seq)
        archived |= {row.digest for row in some}
        kept += more
    return kept


def check_all(lake: Lake, index: Path, bodies: dict[Digest, bytes], chunks: Sequence[ContextRow]) -> None:
    with LakeIndex.open(index) as opened, Lookup(lake, opened) as lookup:
        for digest, body in bodies.items():
            found = lookup.get_body(digest)
            assert found is not None
            assert found[1] == body
        read = lookup.get_contexts([chunk.digest for chunk in chunks])
        assert all((read[row.digest].body, read[row.digest].form) == (row.body, "chunk") for row in chunks)
    with connect(lake.path) as sql:
        found_bodies = sql.execute("SELECT right(ref, 32), body_bytes, body, size FROM contexts").fetchall()
        assert {digest: raw for digest, raw, _, _ in found_bodies} == bodies
        assert all((text.encode(), size) == (raw, len(raw)) for _, raw, text, size in found_bodies)


def test_every_version_reads_the_same_before_and_after_compaction(lake: Lake, tmp_path: Path) -> None:
    rows, bodies = grown(300)
    kept = archive(lake, rows)
    joints = [row for row in kept if row.form == "joint"]
    assert len(joints) == sum(bool(row.parts) for row in rows) > 30
    assert max(row.size for row in joints) > 32 * 1024
    chunks = [row for row in rows if row.form == "chunk"]
    for _ in range(2):
        check_all(lake, tmp_path / "index", bodies, chunks)
        report = verify_lake(lake.path)
        assert report.violations == []
        assert (report.checked["joints"], report.checked["manifests"]) == (
            len(joints),
            sum(r.form == "manifest" for r in rows),
        )
        assert (lake.statistics("contexts").rows, lake.statistics("contexts").contexts) == (len(rows), len(bodies))
        with connect(lake.path) as sql:
            stored = sql.execute("SELECT form, count(*) FROM contexts_stored GROUP BY ALL").fetchall()
            assert dict(stored)["joint"] == len(joints)
        compact(lake, at_ms=LATER_MS)
        lake.refresh()
    assert len(lake.files("contexts")) == 1


def test_however_a_stream_is_cut_into_runs_the_rows_are_the_same(tmp_path: Path) -> None:
    """An archiver that begins again after a crash reads other runs than the one before."""
    rows, _ = grown(60, sessions=3)
    rows += [msgspec.structs.replace(row, seq=row.seq + 20) for row in rows[-20:]]  # stored again
    whole, *others = (archive(Lake.open(tmp_path / str(run), create=True), rows, run) for run in (1_000, 97, 11))
    assert {row.form for row in whole} == {"plain", "manifest", "chunk", "joint", "touch"}
    assert others == [whole, whole]


def test_the_view_puts_versions_together_of_lake_and_tail(lake: Lake) -> None:
    """What is not archived has chunks as bytes, and manifests over chunks and joints of the lake."""
    rows, bodies = grown(120, sessions=2)
    split = len(rows) * 2 // 3
    archive(lake, rows[:split])
    tail = MemoryTail()
    for row in rows:
        tail.streams["contexts"].publish(row)
    with connect(lake.path, tail=tail) as sql:
        forms = dict(
            sql.execute("SELECT form, count(*) FROM contexts_stored WHERE size > 4096 GROUP BY ALL").fetchall()
        )
        assert forms["joint"] > 0
        assert forms["chunk"] > 0
        assert dict(sql.execute("SELECT right(ref, 32), body_bytes FROM contexts").fetchall()) == bodies


def test_the_view_takes_one_of_the_rows_of_a_chunk_that_is_in_the_lake_more_than_once(lake: Lake) -> None:
    """As chunks and as joints, among them some that are joints and chunks, and some that follow upon themselves."""
    rows, bodies = grown(120)
    part = next(row for row in rows if row.form == "chunk")
    twice = part.body * 3
    digest = compute_digest("default", "note", twice, content_type=BINARY)
    manifest = msgspec.json.encode({"v": 1, "size": len(twice), "chunks": [part.digest] * 3})
    rows.append(
        msgspec.structs.replace(
            part, kind="note", digest=digest, body=manifest, size=len(twice), form="manifest", seq=len(rows) + 1
        )
    )
    bodies[digest] = twice
    kept = archive(lake, rows)
    again = [row for row in rows if row.form == "chunk"] + [row for row in kept if row.form == "joint"]
    assert {row.form for row in kept} >= {"chunk", "joint"}
    seqs = range(len(rows) + 1, len(rows) + len(again) + 1)
    doubled = [msgspec.structs.replace(row, seq=seq) for row, seq in zip(again, seqs, strict=True)]
    lake.append("contexts", doubled, epoch=EPOCH, first_seq=seqs[0], last_seq=seqs[-1])
    with connect(lake.path) as sql:
        assert dict(sql.execute("SELECT right(ref, 32), body_bytes FROM contexts").fetchall()) == bodies
        refs = sql.execute("SELECT ref, body_bytes FROM contexts_of((SELECT list(ref) FROM contexts))").fetchall()
        assert {ref[-32:]: raw for ref, raw in refs} == bodies


def leaves_of(kept: Sequence[ContextRow]) -> dict[Digest, set[Digest]]:
    """The chunks with bytes of their own that each stored row needs."""
    leaves: dict[Digest, set[Digest]] = {}
    for row in kept:
        if row.form == "joint":
            line: dict[str, Any] = msgspec.json.decode(row.body.partition(b"\n")[0])
            leaves[row.digest] = {row.digest}.union(*(leaves[part] for part in line["chunks"]))
        elif row.form == "manifest":
            leaves[row.digest] = set().union(*(leaves[part] for part in decode_manifest(row.body).chunks))
        else:
            leaves[row.digest] = {row.digest}
    return leaves


@pytest.mark.parametrize("what", ["lost", "damaged"])
def test_a_chunk_gone_wrong_is_told_of_every_version_it_is_in_and_of_no_other(
    lake: Lake, tmp_path: Path, what: str
) -> None:
    rows, bodies = grown(80, sessions=2)
    kept = joined(rows, set())
    leaves = leaves_of(kept)
    first = next(row for row in kept if row.form == "chunk")
    hit = {digest for digest, of in leaves.items() if first.digest in of} - {first.digest}
    touched = hit & bodies.keys()
    assert 60 < len(touched) < len(bodies) - 60
    if what == "lost":
        kept.remove(first)
    else:
        kept[kept.index(first)] = msgspec.structs.replace(first, body=first.body[::-1])
    lake.append("contexts", kept, epoch=EPOCH, first_seq=1, last_seq=len(rows))
    with LakeIndex.open(tmp_path / "index") as index, Lookup(lake, index) as lookup:
        for digest, body in bodies.items():
            if digest in touched:
                with pytest.raises(IntegrityError, match=first.digest):
                    lookup.get_body(digest)
            else:
                assert lookup.get_body(digest) == (lookup.get_contexts([digest])[digest], body)
    report = verify_lake(lake.path)
    if what == "damaged":
        [violation] = report.violations
        assert first.ref in violation.what
        return
    assert {violation.object[-32:] for violation in report.violations} == hit
    assert {violation.invariant for violation in report.violations} == {"I4"}
    with connect(lake.path) as sql:
        found = dict(sql.execute("SELECT right(ref, 32), body_bytes FROM contexts").fetchall())
    assert found == {digest: None if digest in touched else body for digest, body in bodies.items()}


def stored_bytes(lake: Lake) -> int:
    with connect(lake.path) as sql:
        found = sql.execute("SELECT sum(octet_length(body_binary)) FROM contexts_stored").fetchone()
        return int(found[0])


def test_no_byte_is_in_the_lake_twice_however_sessions_interleave(tmp_path: Path) -> None:
    """Random digits repeat nothing: what is there more than once can only be the same text, stored again."""
    sizes: list[int] = []
    for turns in (60, 120):
        rows, bodies = grown(turns, sessions=8)
        newest = sum(sorted(map(len, bodies.values()))[-8:])
        lake, plain = (Lake.open(tmp_path / f"{turns}-{name}", create=True) for name in ("joints", "plain"))
        archive(lake, rows)
        archive(plain, [msgspec.structs.replace(row, parts=()) for row in rows])
        assert stored_bytes(lake) < 1.1 * newest
        assert stored_bytes(plain) > 1.8 * newest
        compact(lake, at_ms=LATER_MS)
        lake.refresh()
        sizes.append(lake.statistics("contexts").bytes)
    assert sizes[1] < 2.1 * sizes[0]
