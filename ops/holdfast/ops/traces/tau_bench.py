"""Reads ``tau-bench``: JSON, a list of ``{task_id, trial, reward, info, traj}``.

``traj`` is an ordered list of OpenAI chat messages without times; the body is the message.  The session id is
``<domain>-task<000>-trial<n>``, the domain being read from the policy in the system prompt.  A tool's message follows
from the assistant's that made the call.  Two runs that share task and trial but differ anywhere are told apart, from
their first step on, by a digest of the whole run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from holdfast.ops.traces.chain import SessionChain
from holdfast.ops.traces.elements import read_elements
from holdfast.ops.traces.messages import read_messages
from holdfast.ops.traces.model import Record
from holdfast.ops.traces.records import decode_as, digest_of
from holdfast.ops.traces.sources import Source
from holdfast.schemas.errors import InputError

ASSISTANT: Final = "tau-bench-agent"
"""Agent id of the assistant's steps."""

_POLICY: Final = re.compile(rb"([A-Za-z]{1,32})\s+agent\s+policy", re.IGNORECASE)
_DOMAIN_BYTES: Final = 4096


class _Run(msgspec.Struct):
    task_id: int | str
    traj: list[msgspec.Raw]
    trial: int | str = 0


_DECODER: Final = msgspec.json.Decoder(_Run)


def read(source: Source) -> Iterator[Record]:
    """Yields the messages of every run as steps, in the order of the file."""
    for element in read_elements(source):
        if not isinstance(element, tuple):
            yield element
            continue
        line, raw = element
        try:
            run = decode_as(_DECODER, raw)
            chain = SessionChain("tau-bench", _session_id(run), salt=digest_of(bytes(part) for part in run.traj))
        except InputError as error:
            yield source.malformed(line, error.message)
            continue
        yield from read_messages(source, line, chain, run.traj, assistant=ASSISTANT)


def _session_id(run: _Run) -> str:
    found = _POLICY.search(bytes(run.traj[0])[:_DOMAIN_BYTES]) if run.traj else None
    domain = found[1].decode().lower() if found else "tau"
    task = f"{run.task_id:03d}" if isinstance(run.task_id, int) else run.task_id
    return f"{domain}-task{task}-trial{run.trial}"
