"""Traces of real agents, parsed to steps: the part of ``holdfast import`` that knows formats and nothing else.

Pure: reads files, talks to no server, keeps no state from one file to the next.  :func:`find_traces` says which files
there are and :func:`read_file` yields their steps; :func:`step_event` gives the fields of a step's event.
"""

from holdfast.ops.traces.detect import FormatChoice, Found, TraceFile, detect, find_traces
from holdfast.ops.traces.mapped import FieldMap, parse_map
from holdfast.ops.traces.model import FORMATS, Format, Malformed, ParentSource, Record, Step, StepEvent, step_event
from holdfast.ops.traces.reading import read_file, read_path, read_source
from holdfast.ops.traces.sources import Source

__all__ = [
    "FORMATS",
    "FieldMap",
    "Format",
    "FormatChoice",
    "Found",
    "Malformed",
    "ParentSource",
    "Record",
    "Source",
    "Step",
    "StepEvent",
    "TraceFile",
    "detect",
    "find_traces",
    "parse_map",
    "read_file",
    "read_path",
    "read_source",
    "step_event",
]
