"""The one way in: a trace file to its steps, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from holdfast.ops.traces import claude_code, mapped, mini_swe_agent, openai_messages, openhands, steps, tau_bench
from holdfast.ops.traces.detect import TraceFile, find_traces
from holdfast.ops.traces.model import FORMATS, Format, Record
from holdfast.ops.traces.sources import Source

READERS: Final[dict[Format, Callable[[Source], Iterator[Record]]]] = {
    "steps": steps.read,
    "tau-bench": tau_bench.read,
    "mini-swe-agent": mini_swe_agent.read,
    "openai-messages": openai_messages.read,
    "claude-code": claude_code.read,
    "openhands": openhands.read,
}
"""The reader of each format."""


def read_source(source: Source, source_format: Format) -> Iterator[Record]:
    """Yields the steps of a trace in their order, and a Malformed for each place that is none.

    Never raises for what the file holds or for a file that cannot be opened.  A step comes after its cause.
    """
    reader = READERS.get(source_format)
    if reader is None:
        return iter([source.malformed(0, f"{source_format} needs a map: read it with --map")])
    return reader(source)


def read_file(file: TraceFile) -> Iterator[Record]:
    """Yields the steps of a file found by :func:`~holdfast.ops.traces.detect.find_traces`."""
    source = Source.of_path(file.path)
    if file.map is not None:
        yield from mapped.read(source, file.map)
        return
    if file.format is None:
        yield source.malformed(0, f"not recognised as a trace; name its format, one of {', '.join(FORMATS)}")
        return
    yield from read_source(source, file.format)


def read_path(path: str | Path, format: str = "auto") -> Iterator[Record]:
    """Yields the steps of all traces under a path, file by file; raises as ``find_traces`` does, at the first step."""
    for file in find_traces([path], format).files:
        yield from read_file(file)
