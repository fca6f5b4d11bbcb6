"""What a pipeline's registry stores, and where: records of steps and jobs, the keys they stand under.

=====================================  ==============================================================
key                                    body
=====================================  ==============================================================
``job.<job>.context_<n>.<step>``       a :class:`StepRecord`; saving the step again is its next version
``jobs.<job>``                         a :class:`JobRecord`: the job's execution contexts, or its root job
=====================================  ==============================================================

``<job>`` is the root job; job id and step name are one segment each, encoded as subject tokens are, so that a dot in
one cannot be taken for the end of it.  What a step produced and what it was given are contexts of their own, which the
record names: equal ones are stored once, and none is loaded before it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, TypeVar, cast

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, InvalidNameError
from holdfast.schemas.names import decode_token, encode_token, is_well_formed
from holdfast.schemas.refs import Ref

DATA_KIND: Final = "step"
"""The kind of results and inputs: one for both, so that a step's result and the next step's equal input are one."""
STEP_KIND: Final = "step-record"
JOB_KIND: Final = "job-record"

STEPS_PREFIX: Final = "job."
JOBS_PREFIX: Final = "jobs."

_CONTEXT: Final = "context_"
_NUMBER: Final = re.compile(r"(?:context_)?(0|[1-9][0-9]{0,8})\Z")

Record = TypeVar("Record", bound=msgspec.Struct)


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="v", tag=1):
    """One saving of one step: everything about it but the data.

    ``job_id`` is the job that ran the step, ``root_job_id`` the one it is filed under: they differ when a job was
    resumed under an id of its own.  ``result`` and ``input`` name what it produced and what it was given.
    """

    job_id: str
    root_job_id: str
    step_name: str
    step_number: int
    execution_context_id: str
    timestamp: str
    result: Ref
    input: Ref | None = None
    context_keys_used: tuple[str, ...] = ()
    compressed: bool = False
    relative_step_number: int | None = None
    metadata: dict[str, Any] = {}


class StepAudit(msgspec.Struct, frozen=True, kw_only=True):
    """One saving of one step with its data: what it was given, what it used of that, what it produced.

    ``used`` holds the value of each of ``context_keys_used`` that the input snapshot has.  References in the snapshot
    have been resolved, to the versions that they were taken of.  ``result_ref`` and ``input_ref`` name both as stored.
    """

    job_id: str
    root_job_id: str
    step_name: str
    step_number: int
    relative_step_number: int | None
    execution_context_id: str
    version: int
    timestamp: str
    context_keys_used: tuple[str, ...]
    used: dict[str, Any]
    input_snapshot: Any
    result: Any
    metadata: dict[str, Any]
    result_ref: Ref
    input_ref: Ref | None


class ExecutionContext(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a job: the first, or one after it was resumed.

    ``job_id`` is the id under which the job was run, ``started_at`` when the registry first heard of the run.
    """

    id: str
    job_id: str
    started_at: str


class JobRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="v", tag=1):
    """A job.  With ``root_job_id`` it is a run of that job under an id of its own, and nothing is filed under it."""

    job_id: str
    created_at: str
    root_job_id: str | None = None
    execution_contexts: tuple[ExecutionContext, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of its execution contexts, newest first."""
        return tuple(sorted({int(context.id) for context in self.execution_contexts}, reverse=True))

    def newest_of(self, job_id: str) -> str | None:
        """The execution context that was begun last under ``job_id``; None when there is none."""
        mine = [int(context.id) for context in self.execution_contexts if context.job_id == job_id]
        return str(max(mine)) if mine else None


def with_context(record: JobRecord, number: str, job_id: str, now: datetime) -> JobRecord:
    """Returns the record with the execution context in it; the same object when it is there already."""
    if any(context.id == number for context in record.execution_contexts):
        return record
    begun = ExecutionContext(id=number, job_id=job_id, started_at=now.isoformat())
    return msgspec.structs.replace(record, execution_contexts=(*record.execution_contexts, begun))


def first_context(record: JobRecord, job_id: str) -> str:
    """Returns the number of the execution context that a job's first step begins.

    0 belongs to the first run, which is the root job's own: a job resumed under another id never gets it, even when the
    registry has not heard of the first run.
    """
    if job_id == record.job_id and 0 not in record.numbers:
        return "0"
    return next_context(record, job_id)


def next_context(record: JobRecord, job_id: str) -> str:
    """Returns the number that the next execution context gets; see :func:`first_context` for whose 0 is."""
    if record.execution_contexts:
        return str(record.numbers[0] + 1)
    return "0" if job_id == record.job_id else "1"


def check_execution_context(value: object) -> str:
    """Returns an execution context's id as text: ``0`` of ``0``, ``"0"`` and ``"context_0"``.

    Raises InvalidFieldError for anything else.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    match = _NUMBER.match(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidFieldError(
            f"execution context {repr(value)[:80]} is no number from 0 on",
            field="execution_context_id",
            hint="take it from begin_execution_context(), or leave it out",
        )
    return match[1]


def check_job_id(job_id: object, field: str = "job_id") -> str:
    """Returns ``job_id`` when it is text of 1 to 256 characters; raises InvalidNameError otherwise."""
    return _check_name(job_id, field)


def check_step_name(step_name: object) -> str:
    """Returns ``step_name`` when it is text of 1 to 256 characters; raises InvalidNameError otherwise."""
    return _check_name(step_name, "step_name")


def _check_name(name: object, field: str) -> str:
    if isinstance(name, str) and 0 < len(name) <= limits.ID_CHARS and is_well_formed(name):
        return name
    raise InvalidNameError(
        f"{field} {repr(name)[:80]} is not text of 1 to {limits.ID_CHARS} characters",
        field=field,
        limit=limits.ID_CHARS,
    )


def check_step_number(number: object, field: str = "step_number") -> int:
    """Returns ``number`` when it is a whole number from 0 on; raises InvalidFieldError otherwise."""
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 31:
        return number
    raise InvalidFieldError(f"{field} {repr(number)[:80]} is no whole number from 0 on", field=field)


def check_keys_used(keys: object) -> tuple[str, ...]:
    """Returns the context keys that a step used; None stands for none.  Raises InvalidFieldError otherwise."""
    if keys is None:
        return ()
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise InvalidFieldError("context_keys_used is no list of keys", field="context_keys_used")
    names = tuple(cast("Iterable[object]", keys))
    if not all(isinstance(name, str) for name in names):
        raise InvalidFieldError("context_keys_used holds something that is no text", field="context_keys_used")
    return cast("tuple[str, ...]", names)


def job_key(job_id: str) -> str:
    """Returns the key of a job's record."""
    return _checked(JOBS_PREFIX + encode_token(job_id), "job id")


def steps_prefix(root_job_id: str, execution_context_id: str | None = None) -> str:
    """Returns what the keys of a job's steps begin with, those of one execution context or of all."""
    prefix = f"{STEPS_PREFIX}{encode_token(root_job_id)}."
    return prefix if execution_context_id is None else f"{prefix}{_CONTEXT}{execution_context_id}."


def step_key(root_job_id: str, execution_context_id: str, step_name: str) -> str:
    """Returns the key of a step; raises InvalidNameError when the two names are too long together."""
    return _checked(steps_prefix(root_job_id, execution_context_id) + encode_token(step_name), "job id and step name")


def parse_step_key(key: str) -> tuple[str, str, str] | None:
    """Returns root job, execution context and step of a key; None for a key that is none of a step."""
    segments = key.split(".")
    if len(segments) != 4 or segments[0] + "." != STEPS_PREFIX or not segments[2].startswith(_CONTEXT):
        return None
    match = _NUMBER.match(segments[2])
    if match is None:
        return None
    try:
        return decode_token(segments[1]), match[1], decode_token(segments[3])
    except InvalidNameError:
        return None


def _checked(key: str, made_of: str) -> str:
    if len(key) > limits.KEY_BYTES:
        raise InvalidNameError(
            f"{made_of} make a key of {len(key)} bytes, the limit is {limits.KEY_BYTES}",
            field="key",
            limit=limits.KEY_BYTES,
            hint="shorten them; a character outside A-Z a-z 0-9 takes three bytes or more",
        )
    return key


def read_record(kind: type[Record], body: object, key: str) -> Record:
    """Returns the record that a key's body is; raises InvalidBodyError when another client wrote something else."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise InvalidBodyError(
            f"what stands under key {key!r} is no {kind.__name__}: {error}",
            field="body",
            hint=f"see who wrote it: holdfast history {key}",
        ) from error
