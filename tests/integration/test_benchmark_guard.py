"""The guard against collapse: hot paths beside their raw limits, in seconds, and no clock that a slow machine fails."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks.guard import LEAST, collapses, measure_guarded

from holdfast.client import Holdfast

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

LARGE = bytes(3_000_000)


@pytest.mark.slow
async def test_no_hot_path_has_collapsed(tmp_path: Path) -> None:
    records = await measure_guarded(tmp_path)
    assert {record.name for record in records} == set(LEAST)
    assert [str(collapse) for collapse in collapses(records)] == []


async def test_the_guard_notices_a_put_that_does_far_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Holdfast.put

    async def wasteful(hf: Holdfast, body: Any, **options: Any) -> Ref:
        blake2b(LARGE).digest()  # milliseconds of work that no put needs
        return await put(hf, body, **options)

    monkeypatch.setattr(Holdfast, "put", wasteful)
    records = await measure_guarded(tmp_path, ["put_64_producers"])
    assert [collapse.name for collapse in collapses(records)] == ["put_64_producers"]
