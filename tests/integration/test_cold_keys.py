"""Look-ups of archived versions of named contexts, against a plain list of them."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from holdfast.lake import Lake, LakeIndex, compact, vacuum
from holdfast.schemas.errors import IntegrityError, InvalidFieldError
from holdfast.workers.key_reader import PAGE_VERSIONS, ColdKeys
from tests.test_lake_samples import EPOCH, T0_MS, key_version, key_versions

if TYPE_CHECKING:
    from holdfast.schemas.rows import KeyVersionRow

pytestmark = pytest.mark.asyncio

LATER_MS = 2_000_000_000_000


@pytest_asyncio.fixture
async def keys(lake: Lake, tmp_path: Path) -> AsyncGenerator[ColdKeys]:
    with LakeIndex.open(tmp_path / "index") as index:
        reader = ColdKeys(Lake.open(lake.path), index)
        yield reader
        await reader.close()


def archive(lake: Lake, rows: list[KeyVersionRow]) -> None:
    lake.append("key_versions", rows, epoch=rows[0].epoch, first_seq=rows[0].seq, last_seq=rows[-1].seq)


def made_up(rnd: random.Random, count: int) -> list[KeyVersionRow]:
    """Versions of three keys in two lives of the stream, now and then several in one millisecond."""
    rows: list[KeyVersionRow] = []
    versions = {"a": 0, "a.b": 0, "b": 0}
    at_ms = T0_MS
    for number in range(count):
        key = rnd.choice(sorted(versions))
        versions[key] += 1
        at_ms += rnd.choice((0, 0, 1, 7))
        epoch, seq = (EPOCH, number + 1) if number < count // 2 else ("epoch-2", number - count // 2 + 1)
        rows.append(key_version(seq, key=key, version=versions[key], stored_at_ms=at_ms, epoch=epoch))
    return rows


async def test_every_question_is_answered_as_a_plain_list_would(lake: Lake, keys: ColdKeys) -> None:
    rnd = random.Random(7)
    rows = made_up(rnd, 400)
    for start in range(0, 400, 50):
        archive(lake, rows[start : start + 50])
    for key in ("a", "a.b", "b"):
        chain = [row for row in rows if row.key == key]
        assert await keys.last("default", key) == chain[-1]
        for row in rnd.sample(chain, 20):
            assert await keys.get("default", key, row.version) == row
        for at_ms in rnd.sample(range(T0_MS - 2, rows[-1].stored_at_ms + 3), 60):
            by_then = [row for row in chain if row.stored_at_ms <= at_ms]
            assert await keys.as_of("default", key, at_ms) == (by_then[-1] if by_then else None)
        for before in (None, 1, 2, 3, 40, len(chain), len(chain) + 1, len(chain) + 50):
            below = [row for row in chain if before is None or row.version < before]
            assert await keys.page("default", key, before, 25) == below[::-1][:25]


async def test_history_is_whole_page_after_page(lake: Lake, keys: ColdKeys) -> None:
    rows = key_versions(1, 2_300)
    for start in range(0, 2_300, 1_000):
        archive(lake, rows[start : start + 1_000])
    found: list[KeyVersionRow] = []
    before: int | None = None
    while page := await keys.page("default", "plan.today", before, PAGE_VERSIONS):
        found += page
        before = page[-1].version
    assert found == rows[::-1]


async def test_what_is_not_there_is_none(lake: Lake, keys: ColdKeys) -> None:
    assert await keys.last("default", "plan.today") is None
    archive(lake, key_versions(1, 5))
    for namespace, key in (("default", "plan"), ("other", "plan.today"), ("default", "plan.today.x")):
        assert await keys.last(namespace, key) is None
        assert await keys.get(namespace, key, 1) is None
        assert await keys.page(namespace, key, None, 10) == []
        assert await keys.as_of(namespace, key, LATER_MS) is None
    assert await keys.as_of("default", "plan.today", T0_MS) is None
    for version in (0, -1, 6, 2**63, 2**80):
        assert await keys.get("default", "plan.today", version) is None
    assert [row.version for row in await keys.page("default", "plan.today", 2**80, 2)] == [5, 4]
    for limit in (0, PAGE_VERSIONS + 1):
        with pytest.raises(InvalidFieldError, match="limit"):
            await keys.page("default", "plan.today", None, limit)


async def test_what_was_archived_a_moment_ago_is_seen_by_every_question(lake: Lake, keys: ColdKeys) -> None:
    """A lake that this process has not looked at since is read again before an older answer is given."""
    for last in range(1, 40, 8):
        archive(lake, key_versions(last, last))
        row = key_version(last)
        assert await keys.last("default", "plan.today") == row
        archive(lake, key_versions(last + 1, last + 1))
        assert await keys.get("default", "plan.today", last + 1) == key_version(last + 1)
        archive(lake, key_versions(last + 2, last + 3))
        assert (await keys.page("default", "plan.today", last + 4, 2))[0].version == last + 3
        archive(lake, key_versions(last + 4, last + 5))
        assert await keys.as_of("default", "plan.today", T0_MS + last + 4) == key_version(last + 4)
        archive(lake, key_versions(last + 6, last + 7))
        assert (await keys.page("default", "plan.today", None, 3))[0].version == last + 7


async def test_versions_survive_compaction_and_vacuum(lake: Lake, keys: ColdKeys) -> None:
    for start in range(1, 301, 20):
        archive(lake, key_versions(start, start + 19))
    assert await keys.get("default", "plan.today", 5) == key_version(5)
    other = Lake.open(lake.path)
    compact(other, at_ms=LATER_MS)
    vacuum(other, older_than_s=-60)
    assert await keys.page("default", "plan.today", None, 300) == key_versions(1, 300)[::-1]


async def test_a_lake_that_lost_a_file_says_so(lake: Lake, keys: ColdKeys) -> None:
    archive(lake, key_versions(1, 20))
    assert await keys.last("default", "another") is None
    (lake.path / "key_versions" / lake.files("key_versions")[0].path).rename(lake.path / "elsewhere")
    with pytest.raises(IntegrityError, match="missing"):
        await keys.get("default", "plan.today", 3)
