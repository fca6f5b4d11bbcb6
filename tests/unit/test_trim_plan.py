"""Which revisions may leave the hot tier: plans run on a stream in memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.workers.trim_plan import (
    Revision,
    SubjectPurge,
    oldest_kept,
    plan_heads,
    plan_limited,
    plan_superseded,
)
from tests.test_lake_samples import key_version


def chain(ops: str, *, subject: str = "a", first_seq: int = 1, step: int = 1) -> list[Revision]:
    names = {"p": "put", "d": "delete", "e": "expire"}
    return [
        Revision(subject, key_version(first_seq + n * step, key=subject, version=n + 1, op=names[op]))
        for n, op in enumerate(ops)
    ]


def after(stream: list[Revision], purges: list[SubjectPurge]) -> list[Revision]:
    """What a stream holds when the purges have been made."""
    below = {purge.subject: purge.below_seq for purge in purges}
    return [revision for revision in stream if revision.row.seq >= below.get(revision.subject, 0)]


def test_what_old_revisions_have_superseded_goes() -> None:
    stream = chain("ppppp")
    assert after(stream, plan_superseded(stream[:3])) == stream[2:]
    assert plan_superseded(stream[:1]) == []
    assert plan_superseded([]) == []


def test_the_oldest_version_that_stays() -> None:
    [revision] = chain("ppppp")[-1:]
    assert [oldest_kept(revision, most) for most in (1, 3, 4, 5, 9, None)] == [5, 3, 2, None, None, None]


def test_a_limit_leaves_what_is_young() -> None:
    assert plan_limited({"a": 7, "b": 3}, first_young_seq=5) == [SubjectPurge("a", 5), SubjectPurge("b", 3)]
    assert plan_limited({"a": 7}) == [SubjectPurge("a", 7)]


def test_a_head_goes_only_as_a_tombstone() -> None:
    for ops, left in (("p", 1), ("pp", 2), ("pd", 0), ("pe", 0), ("pdp", 3)):
        stream = chain(ops)
        assert len(after(stream, plan_heads(stream))) == left


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("ppde")), max_size=40),
    st.integers(0, 40),
)
def test_no_plan_takes_more_than_it_may(written: list[tuple[str, str]], old: int) -> None:
    """``old`` revisions have grown old; the rest was written since."""
    names = {"p": "put", "d": "delete", "e": "expire"}
    versions: dict[str, int] = {}
    stream: list[Revision] = []
    for seq, (subject, op) in enumerate(written, start=1):
        versions[subject] = versions.get(subject, 0) + 1
        stream.append(Revision(subject, key_version(seq, key=subject, version=versions[subject], op=names[op])))
    heads = {revision.subject: revision for revision in stream}
    left = after(stream, plan_superseded(stream[:old]))
    assert set(heads.values()) <= set(left)
    assert set(stream[old:]) <= set(left)
    # Of what is old, one stays of each key.
    assert len([revision for revision in left if revision.row.seq <= old]) == len({r.subject for r in stream[:old]})
    left = after(stream, plan_heads(stream[:old]))
    assert set(stream[old:]) <= set(left)
    for subject, head in heads.items():
        is_gone = head not in left
        assert is_gone == (head.row.op != "put" and head.row.seq <= old)
        kept = [revision.row.version for revision in left if revision.subject == subject]
        # Whatever went, the hot tier holds the end of the chain.
        assert kept == list(range(versions[subject] - len(kept) + 1, versions[subject] + 1))
