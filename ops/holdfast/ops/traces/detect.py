"""Finds the traces among files and directories, and tells their formats by first record and name."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from holdfast.ops.traces.mapped import FieldMap
from holdfast.ops.traces.model import FORMATS, Format
from holdfast.ops.traces.sources import BLANK, Source
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, NotFoundError

FormatChoice = Literal["auto"] | Format
"""What a caller may ask for: a format, or to have each file's told from its content."""

Verdict = Format | Literal["sessions"]
"""``sessions``: the summaries that go with a ``steps`` file.  They hold no step and are passed over."""

_SUFFIXES: Final = tuple(f".{plain}{packed}" for plain in ("json", "jsonl", "ndjson") for packed in ("", ".gz", ".zst"))
_NAMES: Final[tuple[tuple[str, Verdict], ...]] = (
    (".steps.jsonl", "steps"),
    (".sessions.jsonl", "sessions"),
    (".traj.json", "mini-swe-agent"),
)
# Most first records are short; a few begin with the whole set-up of an agent.
_HEAD_BYTES: Final = 64 * limits.KIB
_LONG_HEAD_BYTES: Final = 4 * limits.MIB
_LINES_TRIED: Final = 20
_TOKEN: Final = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"(\s*:)?|[\[\]{}]|[^\s"\[\]{}]++|\s++', re.DOTALL)


class TraceFile(msgspec.Struct, frozen=True):
    """A file to read.  ``format`` None: it was named by the caller and its format could not be told.

    With a ``map`` it is read by that, whatever its format.
    """

    path: Path
    format: Format | None
    size_bytes: int
    map: FieldMap | None = None


class Found(msgspec.Struct, frozen=True):
    """What lies under some paths: the traces, each file once, and what was passed over because it is none."""

    files: list[TraceFile]
    skipped: list[Path]


def find_traces(paths: Iterable[str | os.PathLike[str]], format: str = "auto") -> Found:
    """Returns the traces among ``paths``; directories are walked in sorted order, links to directories not followed.

    With a format other than ``auto`` every file with a trace's suffix (and every file named itself) is taken to be of
    that format, but for summaries of sessions.  Raises InvalidFieldError for a format there is not and for a path that
    is neither file nor directory, NotFoundError for a path that does not exist.  A file that cannot be read is no
    error here: reading it reports that.
    """
    wanted = check_format(format)
    files: dict[Path, TraceFile] = {}
    skipped: dict[Path, None] = {}
    for given in map(Path, paths):
        for path, is_named in _candidates(given):
            identity = path.resolve()
            if identity in files or identity in skipped:
                continue
            verdict = _verdict(path, is_named=is_named)
            if verdict == "sessions" or (verdict is None and not is_named and (wanted == "auto" or not _may_be(path))):
                skipped[identity] = None
                continue
            files[identity] = TraceFile(path, verdict if wanted == "auto" else wanted, path.stat().st_size)
    return Found(list(files.values()), list(skipped))


def check_format(format: str) -> FormatChoice:
    """Returns ``format`` when it is ``auto`` or a format; raises InvalidFieldError otherwise."""
    choices: tuple[FormatChoice, ...] = ("auto", "mapped", *FORMATS)
    for choice in choices:
        if choice == format:
            return choice
    raise InvalidFieldError(
        f"there is no trace format {format[:40]!r}", field="format", hint=f"use auto or one of {', '.join(FORMATS)}"
    )


def detect(source: Source) -> Verdict | None:
    """Returns the format of a trace: what its first record says, else what its name says, else None."""
    head = source.head(_HEAD_BYTES)
    verdict = _by_content(head)
    if verdict is None and len(head) == _HEAD_BYTES:
        verdict = _by_content(source.head(_LONG_HEAD_BYTES))
    return verdict or _by_name(source.name)


def _candidates(given: Path) -> Iterator[tuple[Path, bool]]:
    try:
        mode = given.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file or directory {str(given)!r}", field="path") from error
    except (OSError, ValueError) as error:
        raise InvalidFieldError(f"{str(given)[:200]!r} cannot be looked at: {error}", field="path") from error
    if stat.S_ISDIR(mode):
        for folder, folders, names in os.walk(given):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                # Not a socket or a pipe, which would never end, and not a link that leads nowhere.
                if path.is_file():
                    yield path, False
    elif stat.S_ISREG(mode):
        yield given, True
    else:
        raise InvalidFieldError(
            f"{str(given)!r} is neither a file nor a directory", field="path", hint="import regular files"
        )


def _verdict(path: Path, *, is_named: bool) -> Verdict | None:
    return detect(Source.of_path(path)) if is_named or _may_be(path) else None


def _may_be(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES)


def _by_name(name: str) -> Verdict | None:
    plain = name.removesuffix(".gz").removesuffix(".zst")
    return next((verdict for suffix, verdict in _NAMES if plain.endswith(suffix)), None)


def _by_content(head: bytes) -> Verdict | None:
    # A first line may be damaged: the lines after it are asked too.
    rest = head.lstrip(BLANK)
    for _ in range(_LINES_TRIED):
        if not rest:
            return None
        verdict = _classify(first_keys(rest))
        if verdict is not None or rest.startswith(b"["):
            return verdict
        rest = rest.partition(b"\n")[2].lstrip(BLANK)
    return None


def first_keys(head: bytes) -> frozenset[str]:
    """Returns the member names of the first object, or of the first object in an array, as far as ``head`` reaches.

    Names within its members do not count.  No parser is used: the beginning of a document is not a document.
    """
    keys: set[str] = set()
    depth = 0
    object_depth = 0
    for match in _TOKEN.finditer(head):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            if token == b"{" and not object_depth:
                object_depth = depth
            elif not object_depth and depth > 1:
                return frozenset()
        elif token in (b"}", b"]"):
            depth -= 1
            if depth < object_depth or depth <= 0:
                break
        elif match[2] is not None and depth == object_depth:
            keys.add(match[1].decode(errors="replace"))
        elif not object_depth and not token.isspace():
            return frozenset()
    return frozenset(keys)


def _classify(keys: frozenset[str]) -> Verdict | None:
    verdict: Verdict | None = None
    if keys >= {"session_id", "seq", "role"}:
        verdict = "steps"
    elif keys >= {"session_id", "n_steps"}:
        verdict = "sessions"
    elif keys >= {"task_id", "traj"}:
        verdict = "tau-bench"
    elif keys >= {"id", "source"} and keys & {"action", "observation"}:
        verdict = "openhands"
    elif "messages" in keys:
        is_trajectory = keys & {"trajectory_format", "instance_id", "info"}
        verdict = "mini-swe-agent" if is_trajectory else "openai-messages"
    elif "type" in keys and keys & {"uuid", "sessionId", "leafUuid", "messageId", "parentUuid"}:
        verdict = "claude-code"
    elif "role" in keys and keys & {"content", "tool_calls", "function_call"}:
        verdict = "openai-messages"
    elif keys & {"history", "trajectory"} and keys & {"instance_id", "session_id"}:
        verdict = "openhands"
    return verdict
