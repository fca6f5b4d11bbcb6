"""The notebook of the project runs from its first cell to its last on a lake as the archiver leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from holdfast.lake import Lake
from holdfast.schemas.bodies import encode_body
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.refs import compute_digest
from holdfast.schemas.rows import ContextRow, EventRow, Row

NOTEBOOK = Path(__file__).parents[2] / "ops" / "notebooks" / "explore.ipynb"
STORED_AT_MS = 1_763_600_000_000


def _context(seq: int, body: object) -> ContextRow:
    raw, content_type = encode_body({"text": body})
    return ContextRow(
        namespace="default",
        kind="note",
        digest=compute_digest("default", "note", raw, content_type=content_type),
        content_type=content_type,
        body=raw,
        size=len(raw),
        stored_at_ms=STORED_AT_MS + seq,
        epoch="e",
        seq=seq,
    )


def _chain(contexts: list[ContextRow], session: str, first_seq: int) -> list[EventRow]:
    events: list[EventRow] = []
    for position, context in enumerate(contexts):
        parent = events[-1] if events else None
        identity = new_event_id(STORED_AT_MS + position)
        events.append(
            EventRow(
                namespace="default",
                id=identity,
                name="step:note",
                agent_id=("planner", "writer")[position % 2],
                stored_at_ms=STORED_AT_MS + position,
                epoch="e",
                seq=first_seq + position,
                timestamp_ms=STORED_AT_MS + position,
                session_id=session,
                parent_event_id=parent.id if parent else None,
                root_event_id=parent.root_event_id if parent else identity,
                event_depth=position,
                context_ref=context.ref,
            )
        )
    return events


@pytest.mark.notebook
def test_notebook_runs_on_an_archived_lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [_context(seq, f"thought {seq}") for seq in range(1, 31)]
    events = [*_chain(contexts, "s1", 1), *_chain(contexts[:5], "s2", 31)]
    with Lake.open(tmp_path / "lake", create=True) as lake:
        rows: list[Row] = [*contexts]
        lake.append("contexts", rows, epoch="e", first_seq=1, last_seq=len(contexts))
        rows = [*events]
        lake.append("events", rows, epoch="e", first_seq=1, last_seq=len(events))
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    monkeypatch.delenv("HOLDFAST_NATS_URL", raising=False)

    read: Any = nbformat.read  # it has no types
    notebook = read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()

    outputs = [
        "".join(str(output.get("data", output)) for output in cell.get("outputs", [])) for cell in notebook.cells
    ]
    assert any("'text/plain'" in output and "30" in output and "35" in output for output in outputs)
    assert sum(bool(output) for output in outputs) >= 7
