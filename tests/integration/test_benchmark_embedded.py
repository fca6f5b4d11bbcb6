"""The benchmark of migration runs on a whole system, and says what it promises to say.  No figure is judged closely."""

from __future__ import annotations

from pathlib import Path

import msgspec
from benchmarks.embedded import EmbeddedFigures, markdown_table, measure
from benchmarks.embedded_events import generate


async def test_what_embedded_contexts_cost_is_measured_on_a_whole_system(tmp_path: Path) -> None:
    count = 600
    figures = await measure(count, 7, tmp_path)
    assert [row.ids for row in figures.ids] == ["evt", "uuid7"]
    for row in figures.ids:
        # Every event was compared, and all of them were written back equal to what was generated.
        assert (row.verified, row.written_back) == (count, count)
        assert 0 < row.references.contexts <= 4
        assert 0 < row.references.lake_compacted <= row.references.lake_archived < row.embedded_bytes / 3
        assert row.references.wire < row.embedded.wire
        assert row.references.hot < row.embedded.hot
        assert row.least_ids + row.least_other < row.zstd["19"] < row.zstd["3"] < row.embedded_bytes
        assert sum(row.references.columns.values()) <= row.references.lake_compacted
    table = markdown_table(figures)
    assert table.count("| lake, compacted |") == 2
    assert msgspec.json.decode(msgspec.json.encode(figures), type=EmbeddedFigures) == figures


def test_generated_events_are_repeatable_and_of_the_shape_that_is_promised() -> None:
    one, same, other = generate(400, 7, "evt"), generate(400, 7, "evt"), generate(400, 8, "evt")
    assert one.lines == same.lines != other.lines
    contexts = [msgspec.json.decode(line)["_ksi_context"] for line in one.lines]
    assert {len(context) for context in contexts} == {7, 8}
    assert max(context["_event_depth"] for context in contexts) > 5
    depths = {context["_event_id"]: context["_event_depth"] for context in contexts}
    assert all(
        context["_event_depth"] == depths[context["_parent_event_id"]] + 1
        for context in contexts
        if "_parent_event_id" in context
    )
    assert 240 < sum(map(len, one.lines)) / 400 < 500
