"""The judge of a torture run: each kind of violation, made by hand, is found, and named with its history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from holdfast.ops.torture.check import MOST_OF_A_KIND, Sample, Violation, check
from holdfast.ops.torture.history import UNTYPED, Attempt, History, HistoryWriter, Kind, read_history
from holdfast.ops.torture.load import body_of, data_of, event_id_of
from holdfast.ops.torture.plain import UnreadableError, body_of_message, canonical, digest_text, ref_of
from holdfast.ops.torture.seen import MISSING, Mark, Observation, Placed, SeenEvent, SeenVersion, View
from holdfast.schemas.bodies import encode_json
from holdfast.schemas.refs import Digest
from holdfast.streams.codec import seal

REF = "ctx_torture_" + "a" * 32
OTHER = "ctx_torture_" + "b" * 32


def attempt(op: str, kind: Kind, identity: str, content: str = "x", **more: object) -> Attempt:
    values: dict[str, object] = {"via": "sdk", "producer": "p", "number": 1, "size": 1, **more}
    return msgspec.convert({"op": op, "kind": kind, "id": identity, "sha256": content, **values}, Attempt)


class Recorded:
    """A history by hand: two contexts, two events one after the other, two versions of a key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with HistoryWriter(path) as writer:
            for op, kind, identity, content in (
                ("c1", "context", REF, "one"),
                ("c2", "context", OTHER, "two"),
                ("e1", "event", "event-1", "d1"),
                ("e2", "event", "event-2", "d2"),
                ("k1", "key", "plan", "v1"),
                ("k2", "key", "plan", "v2"),
            ):
                made = attempt(op, msgspec.convert(kind, Kind), identity, content)
                writer.begin(made)
                writer.acknowledged(op, version={"k1": 1, "k2": 2}.get(op))
            writer.begin(attempt("u", "event", "event-3", "d3"), attempt("r", "event", "event-4", "d4"))
            writer.unknown("u", "no answer")
            writer.refused("r", "it may not be")

    @property
    def history(self) -> History:
        return read_history([self.path])


def sound() -> View:
    """What every reader should show."""
    return View(
        is_whole=True,
        contexts=[(REF, "one"), (OTHER, "two"), ("r1", "v1"), ("r2", "v2")],
        events=[SeenEvent("event-1", "d1", None, 0), SeenEvent("event-2", "d2", None, 1)],
        versions=[SeenVersion("plan", 1, "r1", "v1", "k1"), SeenVersion("plan", 2, "r2", "v2", "k2")],
    )


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path / "h.ndjson")


def judged(recorded: Recorded, view: View, samples: tuple[Sample, ...] = (), **more: object) -> list[Violation]:
    observation = Observation(["default"], {"sdk": view}, **more)  # type: ignore[arg-type]
    return check(recorded.history, observation, samples)


def test_a_sound_system_has_no_violation(recorded: Recorded) -> None:
    assert judged(recorded, sound()) == []


def test_what_is_unknown_may_be_there_or_not(recorded: Recorded) -> None:
    view = sound()
    view.events.append(SeenEvent("event-3", "d3", None, 2))
    assert judged(recorded, view) == []


CASES: dict[str, tuple[str, str, Callable[[View], object]]] = {
    "a lost context": ("I1", "lost", lambda view: view.contexts.pop(0)),
    "a context said to be missing": ("I1", "lost", lambda view: view.contexts.__setitem__(0, (REF, MISSING))),
    "a lost event": ("I1", "lost", lambda view: view.events.pop()),
    "a lost version": ("I1", "lost", lambda view: view.versions.pop()),
    "a lost body of a version": (
        "I1",
        "missing",
        lambda view: view.versions.__setitem__(1, SeenVersion("plan", 2, "r2", MISSING, "k2")),
    ),
    "a doubled context": ("I1", "2 times", lambda view: view.contexts.append((REF, "one"))),
    "a doubled event": ("I1", "2 times", lambda view: view.events.append(SeenEvent("event-1", "d1", None, 9))),
    "an unknown event twice": (
        "I1",
        "2 times",
        lambda view: view.events.extend([SeenEvent("event-3", "d3", None, 7), SeenEvent("event-3", "d3", None, 8)]),
    ),
    "a doubled version": (
        "I2",
        "one change as 2 versions",
        lambda view: view.versions.append(SeenVersion("plan", 3, "r2", "v2", "k2")),
    ),
    "a version number twice": (
        "I1",
        "in the place of",
        lambda view: view.versions.insert(1, SeenVersion("plan", 1, "r2", "v2", "k2")),
    ),
    "a gap in versions": (
        "I1",
        "in the place of 1",
        lambda view: view.versions.__setitem__(slice(None), [SeenVersion("plan", 2, "r2", "v2", "k2")]),
    ),
    "altered bytes of a context": ("I4", "shows bytes", lambda view: view.contexts.__setitem__(0, (REF, "xxx"))),
    "altered data of an event": (
        "I4",
        "shows data",
        lambda view: view.events.__setitem__(0, SeenEvent("event-1", "xx", None, 0)),
    ),
    "another context of an event": (
        "I4",
        "shows context",
        lambda view: view.events.__setitem__(0, SeenEvent("event-1", "d1", REF, 0)),
    ),
    "altered bytes of a version": (
        "I4",
        "other bytes",
        lambda view: view.versions.__setitem__(0, SeenVersion("plan", 1, "r1", "xx", "k1")),
    ),
    "a version under another number": (
        "I4",
        "was acknowledged to k2",
        lambda view: view.versions.__setitem__(
            slice(None), [SeenVersion("plan", 1, "r2", "v2", "k2"), SeenVersion("plan", 2, "r1", "v1", "k1")]
        ),
    ),
    "an invented context": ("I2", "nobody put", lambda view: view.contexts.append(("ctx_x_c", "zz"))),
    "an invented event": ("I2", "nobody", lambda view: view.events.append(SeenEvent("event-9", "d9", None, 9))),
    "an invented version": (
        "I2",
        "nobody wrote",
        lambda view: view.versions.append(SeenVersion("plan", 3, "r2", "v9", "k9")),
    ),
    "a refused event": ("I2", "refused", lambda view: view.events.append(SeenEvent("event-4", "d4", None, 9))),
    "reordered events": (
        "I3",
        "reordered",
        lambda view: view.events.__setitem__(
            slice(None), [SeenEvent("event-1", "d1", None, 5), SeenEvent("event-2", "d2", None, 1)]
        ),
    ),
    "a reader that fails": ("I5", "could not read", lambda view: view.errors.append("it is damaged")),
}


@pytest.mark.parametrize("name", list(CASES))
def test_each_violation_is_found(recorded: Recorded, name: str) -> None:
    invariant, said, damage = CASES[name]
    view = sound()
    damage(view)
    found = judged(recorded, view)
    assert any(each.invariant == invariant and said in each.what for each in found), found


def test_a_violation_carries_the_lines_of_its_object_alone(recorded: Recorded) -> None:
    view = sound()
    view.events.pop()
    found = judged(recorded, view)
    assert len(found) == 1
    assert found[0].object == "event-2"
    assert len(found[0].history) == 1
    assert "e2 event event-2 via sdk" in found[0].history[0]
    assert "acknowledged" in found[0].history[0]


def test_a_reader_that_need_not_show_all_is_not_blamed_for_what_it_lacks(recorded: Recorded) -> None:
    part = View(is_whole=False, contexts=[(REF, "one")])
    assert check(recorded.history, Observation(["default"], {"lake": part})) == []
    invented = View(is_whole=False, contexts=[("ctx_x_c", "zz")])
    assert check(recorded.history, Observation(["default"], {"lake": invented}))[0].invariant == "I2"


def test_two_contents_at_one_place_and_one_row_twice_are_found(recorded: Recorded) -> None:
    placed = [
        Placed("S", "e", 1, "a", "stream"),
        Placed("S", "e", 1, "a", "lake"),
        Placed("S", "e", 2, "b", "stream"),
        Placed("S", "e", 2, "c", "lake"),
        Placed("S", "e", 3, "d", "lake"),
        Placed("S", "e", 3, "d", "lake"),
        Placed("S", "other", 2, "z", "lake"),
    ]
    found = judged(recorded, sound(), placed=placed)
    assert [(each.invariant, "sequence 2" in each.what or "sequence 3" in each.what) for each in found] == [
        ("I1", True),
        ("I4", True),
    ]


def mark(watermark: int, first: int = 1, epoch: str = "e") -> Mark:
    return Mark("S", epoch, epoch, watermark, first, 100, 50)


def test_a_watermark_that_goes_back_is_found(recorded: Recorded) -> None:
    samples = (Sample(1.0, [mark(10)]), Sample(2.0, [mark(20)]), Sample(3.0, [mark(15)]))
    found = judged(recorded, sound(), samples, marks=[mark(30)])
    assert [each.invariant for each in found] == ["I3"]
    assert "from 20 (2.0 s) to 15 (3.0 s)" in found[0].what
    # Another life of the stream begins anew.
    assert judged(recorded, sound(), samples[:2], marks=[mark(1, epoch="f")]) == []
    assert judged(recorded, sound(), samples[:2], marks=[mark(10)])[0].invariant == "I3"
    # It was made anew between the two looks: the stream is still the old one, the watermark of the new.
    torn = (*samples[:2], Sample(3.0, [Mark("S", "e", "f", 1, 1, 100, 50)]))
    assert judged(recorded, sound(), torn, marks=[mark(7, epoch="f")]) == []
    found = judged(recorded, sound(), torn, marks=[mark(30)])
    assert [each.what for each in found] == ["the watermark went back to epoch e (3.0 s)"]


def test_a_purge_above_the_watermark_is_found(recorded: Recorded) -> None:
    assert judged(recorded, sound(), (Sample(1.0, [mark(10, first=11)]),)) == []
    found = judged(recorded, sound(), (Sample(1.0, [mark(10, first=12)]),))
    assert [each.invariant for each in found] == ["I3"]
    unarchived = Mark("S", "e", None, 0, 5, 9, 5)
    assert judged(recorded, sound(), marks=[unarchived])[0].invariant == "I3"


def test_an_error_that_is_none_of_the_products_is_found(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path / "h") as writer:
        writer.begin(attempt("e", "event", "id"))
        writer.unknown("e", f"{UNTYPED}KeyError: 'x'")
    found = check(read_history([tmp_path / "h"]), Observation([], {}))
    assert [(each.invariant, each.what) for each in found] == [("I7", "KeyError: 'x'")]


def test_what_readers_noted_during_the_run_counts(recorded: Recorded) -> None:
    found = check(recorded.history, Observation([], {"sdk": sound()}), notes=["context x is not found"])
    assert [each.what for each in found] == ["context x is not found"]


def test_many_of_a_kind_are_listed_in_part_and_counted(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path / "h") as writer:
        for number in range(MOST_OF_A_KIND + 5):
            writer.begin(attempt(f"e{number}", "event", f"id{number}"))
            writer.acknowledged(f"e{number}")
    found = check(read_history([tmp_path / "h"]), Observation([], {"sdk": View(is_whole=True)}))
    assert len(found) == MOST_OF_A_KIND + 1
    assert found[-1].what == "5 more of the same kind"


# The record


def test_a_history_survives_a_torn_line_and_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "h.ndjson"
    with HistoryWriter(path) as writer:
        writer.begin(attempt("a", "event", "x"))
        writer.acknowledged("a", seq=7)
    with path.open("ab") as torn:
        torn.write(b'{"a":{"op":"b","ki')
    with HistoryWriter(path) as writer:
        writer.begin(attempt("c", "event", "y"))
    history = read_history([path])
    assert [each.op for each in history.attempts] == ["a", "c"]
    assert (history.outcome("a"), history.outcome("c")) == ("acknowledged", "unknown")
    assert history.torn_lines == 1
    assert [each.id for each in history.acknowledged("event")] == ["x"]


def test_an_acknowledgement_stays_one_and_may_come_late(tmp_path: Path) -> None:
    path = tmp_path / "h.ndjson"
    with HistoryWriter(path) as writer:
        writer.begin(attempt("a", "event", "x"))
        writer.unknown("a", "timed out")
        writer.acknowledged("a")
        writer.unknown("a", "a repetition that had no answer")
    assert read_history([path]).outcome("a") == "acknowledged"


def test_an_attempt_that_is_begun_twice_is_no_record(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path / "h") as writer:
        writer.begin(attempt("a", "event", "x"), attempt("a", "event", "x"))
    with pytest.raises(ValueError, match="begun before"):
        read_history([tmp_path / "h"])


def test_a_line_is_in_the_file_before_the_call_goes_out(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "h")
    writer.begin(attempt("a", "event", "x"))
    assert (tmp_path / "h").stat().st_size > 0
    writer.close()


# What is written, twice


def test_what_a_producer_writes_is_a_function_of_its_name_number_and_seed() -> None:
    assert body_of("p", 3, 7) == body_of("p", 3, 7)
    assert len({canonical(body_of("p", number, 7)) for number in range(50)}) == 50
    assert body_of("p", 3, 7) != body_of("p", 3, 8)
    assert data_of("p", 3, 7) == data_of("p", 3, 7)
    assert event_id_of("p", 3, 7) != event_id_of("q", 3, 7)
    assert max(len(canonical(body_of("p", number, 1, large_one_in=2))) for number in range(10)) > 524_288


@pytest.mark.parametrize("large_one_in", [0, 1])
def test_the_formats_written_down_a_second_time_agree_with_the_first(large_one_in: int) -> None:
    body = canonical(body_of("p", 1, 7, large_one_in=large_one_in))
    assert body == encode_json(body_of("p", 1, 7, large_one_in=large_one_in))
    forms = seal("ns", "torture", body)
    assert (len(forms) > 1) == bool(large_one_in)
    whole = forms[-1]
    assert ref_of("ns", "torture", body) == f"ctx_torture_{whole.digest}"
    as_whole = {"Hf-Form": "", "Hf-Kind": "chunk"}
    chunks = {
        form.digest: body_of_message("ns", form.digest, form.headers | as_whole, form.payload, lambda _: None)
        for form in forms[:-1]
    }
    plain = {Digest(digest): found[1] for digest, found in chunks.items() if found is not None}

    def find(digest: str) -> bytes | None:
        return plain.get(Digest(digest))

    assert body_of_message("ns", whole.digest, whole.headers, whole.payload, find) == (
        f"ctx_torture_{whole.digest}",
        body,
    )
    with pytest.raises(UnreadableError):
        body_of_message("ns", "a" * 32, whole.headers, whole.payload, find)
    assert digest_text(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
