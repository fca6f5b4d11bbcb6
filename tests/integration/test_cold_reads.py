"""What a batch of cold look-ups costs: files are opened once, a damaged row costs few readings, an absent one none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.lake import Lake, LakeIndex, Lookup
from holdfast.lake import lookup as lookup_module
from holdfast.schemas.errors import DigestMismatchError, UnavailableError
from holdfast.workers.contexts import ColdReader
from tests.test_lake_samples import EPOCH, contexts

if TYPE_CHECKING:
    from holdfast.schemas.refs import Digest
    from holdfast.schemas.rows import ContextRow

FILES = 40
ROWS = 10
"""In each file."""


@pytest.fixture
async def cold(lake: Lake, index: LakeIndex) -> AsyncIterator[ColdReader]:
    reader = ColdReader(lake, index)
    yield reader
    await reader.close()


def archive(lake: Lake, rows: list[ContextRow]) -> None:
    lake.append("contexts", rows, epoch=EPOCH, first_seq=rows[0].seq, last_seq=rows[-1].seq)


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[tuple[Any, ...]]:
    """Returns a list of the arguments of each call to come."""
    calls: list[tuple[Any, ...]] = []
    method = getattr(owner, name)

    def noted(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, noted)
    return calls


def test_a_batch_over_more_files_than_are_kept_open_opens_each_once(
    lake: Lake, index: LakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = contexts(1, FILES * ROWS)
    for start in range(0, len(rows), ROWS):
        archive(lake, rows[start : start + ROWS])
    index.refresh(lake)
    opened = calls_of(monkeypatch, lookup_module._OpenFile, "__init__")
    with Lookup(lake, index, open_files=8) as lookup:
        assert lookup.get_contexts([row.digest for row in rows]) == {row.digest: row for row in rows}
    assert len(opened) == FILES


async def test_one_damaged_row_costs_a_batch_a_few_readings_and_hides_no_other(
    lake: Lake, cold: ColdReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = contexts(1, 256)
    rows[77] = msgspec.structs.replace(rows[77], body=b"tampered")
    archive(lake, rows)
    read = calls_of(monkeypatch, Lookup, "get_contexts")
    found, failed = await cold.get_many([row.digest for row in rows])
    assert found.keys() == {row.digest for row in rows} - {rows[77].digest}
    assert {digest: type(error) for digest, error in failed.items()} == {rows[77].digest: DigestMismatchError}
    assert len(read) == 1 + 2 * 8


async def test_a_batch_that_a_disk_does_not_answer_is_asked_for_once(
    lake: Lake, cold: ColdReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = contexts(1, 100)
    archive(lake, rows)
    asked: list[list[Digest]] = []

    def refuse(_: Lookup, digests: list[Digest]) -> None:
        asked.append(digests)
        raise UnavailableError("the disk does not answer")

    monkeypatch.setattr(Lookup, "get_contexts", refuse)
    found, failed = await cold.get_many([row.digest for row in rows])
    assert (found, len(failed), len(asked)) == ({}, 100, 1)
    assert {type(error) for error in failed.values()} == {UnavailableError}


async def test_an_absent_context_costs_one_refresh_and_a_new_one_is_found(
    lake: Lake, cold: ColdReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, later = contexts(1, 2)
    archive(lake, [first])
    await cold.get_many([first.digest])
    refreshed = calls_of(monkeypatch, LakeIndex, "refresh")
    assert await cold.get_many([later.digest]) == ({}, {})
    assert len(refreshed) == 1
    archive(Lake.open(lake.path), [later])
    found, _ = await cold.get_many([later.digest])
    assert found[later.digest].row == later
