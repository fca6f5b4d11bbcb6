"""The file of a checkpoint: whole or refused, whatever happened to it; and what goes back from its items."""

from __future__ import annotations

import base64
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client.checkpoint_file import (
    CheckpointReader,
    CheckpointWriter,
    Item,
    Point,
    check_file,
    new_header,
    read_header,
)
from holdfast.client.checkpoint_items import decode_item, event_message, item_of
from holdfast.client.checkpoint_scratch import Scratch
from holdfast.schemas.errors import ConfigurationError, HoldfastError, IntegrityError, InvalidFieldError, NotFoundError
from holdfast.schemas.rows import EventRow
from holdfast.streams.decode import decode_event
from holdfast.streams.messages import StoredMessage
from tests.support import examples

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

POINTS = (
    Point("KV_ctx-hot", "e0", 1, 900),
    Point("KV_ctx-keys", "e1", 1, 40),
    Point("CTX_EVENTS", "e2", 3, 70),
    Point("CTX_DEAD", "e3", 0, 0),
)
HEADER = new_header("one", 1_700_000_000_000, None, POINTS)
ITEMS = [
    Item(0, "$KV.ctx-hot.default.abc", 5, 1_000, {"Hf-Kind": "plan"}, b'{"goal": "fly"}'),
    Item(0, "$KV.ctx-hot.default.def", 9, 2_000, {"Hf-Kind": "plan"}, bytes(range(256))),
    Item(1, "$KV.ctx-keys.default.k", 2, 3_000, {}, b'{"version":1,"op":"put"}'),
    Item(2, "ctx.default.event.a.b", 3, 4_000, {"Nats-Msg-Id": "default.x"}, b"{}", "an-id"),
    Item(3, "ctx.default.dead.CTX_EVENTS.e.1", 1, 5_000, {}, b""),
]

GOLDEN_1 = (
    "KLUv/QBYlRQApCZob2xkZmFzdC1jaGVja3BvaW50CmMAAACXpmhlYWRlcgGjb25lzwAAAYvP5WgApTAuMS4wwJSUqktWX2N0eC1o"
    "b3SiZTABzQOElKtrZXlzomUxASiUqkNUWF9FVkVOVFOiZTIDRpSoQ1RYX0RFQUSiZTMAAEMAAACYpGl0ZW0AtyRLVi4uZGVmYXVs"
    "dC5hYmMFzQPogadIZi1LaW5kpHBsYW7ED3siZ29hbCI6ICJmbHkifcA1AWRlZgnNB9DFAQAAAQIDBAUGBwgJCgsMDQ4PEBESExQV"
    "FhcYGRobHB0eHyAhIiMkJSYnKCkqKywtLi8wMTIzNDU2Nzg5Ojs8PT4/QEFCQ0RFRkdISUpLTE1OT1BRUlNUVVZXWFlaW1xdXl9g"
    "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7fH1+f4CBgoOEhYaHiImKi4yNjo+QkZKTlJWWl5iZmpucnZ6foKGio6Slpqeoqaqr"
    "rK2ur7CxsrO0tba3uLm6u7y9vr/AwcLDxMXGx8jJysvMzc7P0NHS09TV1tfY2drb3N3e3+Dh4uPk5ebn6Onq6+zt7u/w8fLz9PX2"
    "9/j5+vv8/f7/wD4AAbZrZXlzawLNC7iAxBh7InZlcnNpb24iOjEsIm9wIjoicHV0In3AQgK1Y3R4ZXZlbnQuYS5iA80PoIGrTmF0"
    "cy1Nc2ctSWSpeMQCe32lYW4taWQvA79kZWFkLi5lLjEBzROIgMQAwBEAAACVp3N1bW1hcnmUAgEBAQAAACcAAACSo2VuZNkgdHpy"
    "N3dnaDJmdzRqYXhneWRicjZsZG56dzQzamY3cGMNAEbEpoHjJJS0UWRwLU/FWwjhKhkIZsCziAmyESUEzCk4WMydZw=="
)
"""The file of these items as the first release wrote it, in base64."""


def write(path: Path, items: list[Item] = ITEMS, **counts: int) -> Path:
    writer = CheckpointWriter(path, HEADER)
    try:
        writer.write(items)
        writer.finish(**counts)
    finally:
        writer.abort()
    return path


def read(path: Path) -> tuple[Any, ...]:
    with CheckpointReader(path) as reader:
        items = [item for page in reader.pages() for item in page]
        return reader.header, items, reader.info.summary


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "one", purged=1, elsewhere=2, unreadable=3)
    header, items, summary = read(path)
    assert header == HEADER
    assert items == ITEMS
    assert summary.items == (2, 1, 1, 1)
    assert (summary.purged, summary.elsewhere, summary.unreadable) == (1, 2, 3)
    assert read_header(path) == HEADER
    assert check_file(path).size == path.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_file_of_the_first_version_is_read_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "golden"
    path.write_bytes(base64.b64decode(GOLDEN_1))
    header, items, summary = read(path)
    assert msgspec.structs.replace(header, holdfast="") == msgspec.structs.replace(HEADER, holdfast="")
    assert items == ITEMS
    assert summary.items == (2, 1, 1, 1)


def test_a_page_is_of_one_stream_and_bounded(tmp_path: Path) -> None:
    many = [Item(stream, "s", seq, 0, {}, b"x" * 100) for stream in range(2) for seq in range(1, 11)]
    path = write(tmp_path / "one", many)
    with CheckpointReader(path) as reader:
        assert [(page[0].stream, len(page)) for page in reader.pages(items=4)] == [
            (0, 4), (0, 4), (0, 2), (1, 4), (1, 4), (1, 2)
        ]  # fmt: skip
    with CheckpointReader(path) as reader:
        assert [len(page) for page in reader.pages(size=300)] == [3, 3, 3, 1, 3, 3, 3, 1]


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "one").read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises((IntegrityError, InvalidFieldError)):
            check_file(cut)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """A few bits of zstd's own header mean nothing; what is read then is the same to the last byte."""
    path = write(tmp_path / "one")
    whole = path.read_bytes()
    expected = read(path)
    flipped = tmp_path / "flipped"
    harmless = 0
    for place in range(len(whole)):
        for bit in range(8):
            flipped.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                found = read(flipped)
            except (IntegrityError, InvalidFieldError):
                continue
            assert found == expected
            harmless += 1
    assert harmless < len(whole)


@pytest.mark.parametrize("more", [b"x", b"\0" * 8, b"\x28\xb5\x2f\xfd"])
def test_what_follows_the_end_is_refused(tmp_path: Path, more: bytes) -> None:
    path = write(tmp_path / "one")
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(IntegrityError, match="damaged"):
        check_file(path)


def test_two_files_behind_each_other_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "one")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(IntegrityError, match="follows its end"):
        check_file(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"holdfast-checkpoint\n", zstd.compress(b"something")])
def test_another_file_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(InvalidFieldError, match="is no checkpoint"):
        check_file(path)


def test_no_file_and_a_directory_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        check_file(tmp_path / "none")
    with pytest.raises(InvalidFieldError):
        check_file(tmp_path)


def test_a_later_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "one", msgspec.structs.replace(HEADER, v=2))
    writer.finish()
    with pytest.raises(InvalidFieldError, match="version 2") as caught:
        check_file(tmp_path / "one")
    assert caught.value.hint == "upgrade holdfast"


@pytest.mark.parametrize("items", [[ITEMS[1], ITEMS[0]], [ITEMS[2], ITEMS[0]], [ITEMS[0], ITEMS[0]]])
def test_items_out_of_order_are_refused(tmp_path: Path, items: list[Item]) -> None:
    path = write(tmp_path / "one", items)
    with pytest.raises(IntegrityError, match="out of order"):
        check_file(path)


def test_a_frame_that_claims_to_be_huge_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_bytes(zstd.compress(b"holdfast-checkpoint\n\xff\xff\xff\xff" + b"\0" * 100))
    with pytest.raises(IntegrityError, match="claims 4294967295 bytes"):
        check_file(path)


def fill(writer: CheckpointWriter) -> None:
    noise = random.Random(1)
    for number in range(10_000):
        writer.write([Item(0, "s", number, 0, {}, noise.randbytes(2_000))])
    writer.finish()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk: both end in an error of the write."""
    path = write(tmp_path / "one")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    writer = CheckpointWriter(path, HEADER)
    try:
        with pytest.raises(ConfigurationError, match="cannot be written") as caught:
            fill(writer)
        assert "make room" in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
        writer.abort()
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        CheckpointWriter(tmp_path / "none" / "one", HEADER)


def test_a_place_that_is_a_directory_is_told_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    writer = CheckpointWriter(tmp_path / "one", HEADER)
    writer.write(ITEMS)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        writer.finish()
    writer.abort()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_abandoned_file_leaves_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "one", HEADER)
    writer.write(ITEMS)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@examples(50)
@given(st.dictionaries(st.binary(max_size=4), st.binary(max_size=8)), st.lists(st.binary(max_size=4)))
def test_scratch_remembers_what_it_was_given(entries: dict[bytes, bytes], asked: list[bytes]) -> None:
    with Scratch() as scratch:
        scratch.add(entries.items())
        scratch.add((key, b"later") for key in entries)
        assert scratch.find(asked) == {key: entries[key] for key in asked if key in entries}
        scratch.put((key, b"later") for key in entries)
        assert scratch.find(list(entries)) == dict.fromkeys(entries, b"later")


def stored(payload: bytes, headers: dict[str, str] | None = None, seq: int = 7) -> StoredMessage:
    return StoredMessage("ctx.default.event.agent.note", headers or {}, payload, seq, 1_700_000_000_123, "e2")


@pytest.mark.parametrize(
    ("payload", "headers"),
    [
        (b'{"data": 1}', {}),
        (b'{"data": 1, "timestamp": null}', {}),
        (b'{"data": 1, "timestamp": "2026-01-31T09:30:00+02:00"}', {}),
        (b'{"data": 1, "timestamp": 1700000000.5}', {"Nats-Msg-Id": "order-5"}),
        (b'{"id": "order-5", "data": {"n": 1.10}}', {"Nats-Msg-Id": "something else"}),
        (b'{"event_id": "0190c7a4-9b7e-7abc-8def-0123456789ab", "parent_event_id": "p"}', {}),
        (b'{"context": {"a":  1.0 , "b": [1e2]}, "context_kind": "plan"}', {"Nats-Msg-Id": "default.order-6"}),
        (b"{}", {"Nats-Msg-Id": "default.0190c7a4-9b7e-7abc-8def-0123456789ab", "traceparent": "junk", "b\xe4d": "x"}),
        (b'{"foreign": [1, 2], "v": 1}', {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "X-Other": "kept"}),
    ],
)
def test_an_event_that_goes_back_says_the_same_wherever_it_is_stored(payload: bytes, headers: dict[str, str]) -> None:
    """Its id and its time came from its place in the stream where it did not give them; they are in it now."""
    before = decode_event(stored(payload, headers))
    decoded = item_of(2, stored(payload, headers | {"Nats-Expected-Stream": "CTX_EVENTS"}))
    assert isinstance(decoded.row, EventRow)
    assert decoded.item.event_id == before.row.id
    assert "Nats-Expected-Stream" not in decoded.item.headers
    assert decode_item(HEADER, decoded.item) == decoded
    again = event_message(decoded)
    elsewhere = StoredMessage(again.subject, again.headers, again.payload, 99, 1_900_000_000_000, "another")
    after = decode_event(elsewhere)
    assert after.inline == before.inline
    moved = msgspec.structs.replace(after.row, seq=7, epoch="e2", stored_at_ms=1_700_000_000_123)
    assert moved == before.row
    assert again.headers["Nats-Msg-Id"].startswith("default.")


def test_what_is_no_event_stays_what_it_is() -> None:
    decoded = item_of(2, stored(b"not json"))
    assert isinstance(decoded.row, HoldfastError)
    assert decoded.item.event_id is None
    assert decoded.item.payload == b"not json"
