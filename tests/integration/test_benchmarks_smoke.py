"""The benchmarks run, and say what they promise to say of each figure.  No figure is judged here."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest
from benchmarks.__main__ import FILES
from benchmarks.growth import Session, measure
from benchmarks.growth_report import markdown_table, plot
from benchmarks.records import Record

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_smoke_run_writes_a_complete_record_of_every_figure(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", "--quick", "--json", str(path), "--data", str(tmp_path)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    # Decoding into the Struct checks that every member is there, and of its type.
    records = msgspec.json.decode(path.read_bytes(), type=list[Record], strict=True)
    names = [record.name for record in records]
    assert len(set(names)) == len(names)
    # Bytes are measured of recorded traces alone, and not in a smoke run.
    assert {name.partition(":")[0] for name in names} == {name for figures, _ in FILES for name in figures} - {
        "bytes_at_rest"
    }
    in_hand = next(record for record in records if record.name == "near_cache")
    assert [peer.name for peer in in_hand.peers] == ["sqlite_dict"]
    assert [verdict.target.number for verdict in in_hand.verdicts] == [1_000_000]
    for record in records:
        assert min(record.value, record.raw_limit.value) > 0, record.name
        assert record.ratio == pytest.approx(record.value / record.raw_limit.value)
        assert record.ratio_low <= record.ratio_high
        assert record.unit
        assert record.what
        assert record.raw_limit.what
        assert len(record.values) == record.parameters["runs"]
        assert {"payload_bytes", "traces"} & set(record.parameters)
        assert {"concurrency", "count"} <= set(record.parameters)
        assert record.durability in ("durable", "fast")
        assert record.replicas == 1
        assert {"holdfast", "python", "nats-server", "nats-py", "duckdb", "pyarrow", "deltalake", "msgspec"} <= set(
            record.versions
        )
        assert {"cores", "kernel", "cpu"} <= set(record.machine)
        assert record.git_commit
        assert record.started_at
        if record.unit == "ms":
            assert record.p50_ms is not None
            assert record.p99_ms is not None
            assert 0 < record.p50_ms <= record.p99_ms
        assert record.name in output.decode()
    assert not list(tmp_path.glob("holdfast-bench-*")), "scratch data was left behind"


async def test_what_a_growing_conversation_costs_is_measured_on_a_whole_system(tmp_path: Path) -> None:
    steps = [{"seq": turn, "role": "user", "content": f"{turn} {'some words ' * 60}"} for turn in range(30)]
    sessions = [Session("one", steps), Session("two", steps[:20])]
    figures = await measure(sessions, tmp_path, interleaved=False)
    [first, second] = figures.sessions
    assert (first.turns, second.turns) == (30, 20)
    assert first.last.a == sum(len(msgspec.json.encode(step)) for step in steps)
    # What the second says, the first has said: only its versions and manifests are new.
    assert second.last.hot_bodies < first.last.hot_bodies
    assert first.last.hot_bodies + first.last.hot_versions < first.last.b / 3
    assert 0 < figures.lake_compacted <= figures.lake_archived < first.last.b
    table = markdown_table(figures)
    assert "| `one` | 30 |" in table
    assert plot(figures).count("<polyline") == 5


async def test_an_unknown_figure_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", "no_such_figure", "--json", str(tmp_path / "records.json")),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"put_sequential" in errors
    assert not list(tmp_path.iterdir())
