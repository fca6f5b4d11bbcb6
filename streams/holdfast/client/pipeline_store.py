"""Reads and writes the records of jobs and steps through a client; decides nothing about what is stored in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from holdfast.client.keys import UNCHANGED
from holdfast.client.pipeline_records import (
    DATA_KIND,
    JOB_KIND,
    JOBS_PREFIX,
    STEP_KIND,
    JobRecord,
    StepRecord,
    first_context,
    job_key,
    next_context,
    parse_step_key,
    read_record,
    step_key,
    steps_prefix,
    with_context,
)
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, NotFoundError, VersionConflictError
from holdfast.schemas.refs import Ref

if TYPE_CHECKING:
    from holdfast.client.model import Context
    from holdfast.client.step_data import EncodedBody
    from holdfast.client.store import Holdfast

logger = logging.getLogger(__name__)

_KEYS_AT_ONCE: Final = 256
_BODIES_AT_ONCE: Final = 64
_KNOWN_JOBS: Final = 4_096
"""Most jobs whose place a process remembers: a few hundred bytes each."""
_LINKS: Final = 64
"""Most links from a resumed job to its root: jobs that name each other in a circle end here."""


class SavedStep(NamedTuple):
    """A record and the version of its key that it is."""

    record: StepRecord
    version: int


class KnownJobs:
    """What this process knows of jobs and what never changes: the root of a job, and that a context is on record."""

    def __init__(self) -> None:
        self._roots: dict[str, str] = {}
        self._contexts: dict[tuple[str, str], None] = {}

    def root_of(self, job_id: str) -> str | None:
        """The root job, if it is known."""
        return self._roots.get(job_id)

    def add_root(self, job_id: str, root_job_id: str) -> None:
        """Remembers a job's root."""
        _remember(self._roots, job_id, root_job_id)

    def has_context(self, root_job_id: str, number: str) -> bool:
        """Whether the execution context is known to be on record."""
        return (root_job_id, number) in self._contexts

    def add_context(self, root_job_id: str, number: str) -> None:
        """Remembers that an execution context is on record."""
        _remember(self._contexts, (root_job_id, number), None)


def _remember(known: dict[Any, Any], name: object, value: object) -> None:
    known[name] = value
    while len(known) > _KNOWN_JOBS:
        known.pop(next(iter(known)), None)


class PipelineStore:
    """The records of one namespace, through one open client."""

    def __init__(self, hf: Holdfast, known: KnownJobs) -> None:
        self._hf = hf
        self._known = known

    async def locate(self, job_id: str) -> tuple[str, JobRecord | None]:
        """Returns the root of a job and the root's record, None when nothing is on record."""
        current = self._known.root_of(job_id) or job_id
        for _ in range(_LINKS):
            record = await self._job(current)
            if record is None or record.root_job_id is None:
                if record is not None:
                    self._known.add_root(job_id, current)
                return current, record
            current = record.root_job_id
        raise InvalidFieldError(
            f"job {job_id!r} leads to no root job", field="root_job_id", hint=f"see holdfast get {job_key(job_id)}"
        )

    async def claim(self, job_id: str, root_job_id: str | None, number: str | None, now: datetime) -> tuple[str, str]:
        """Returns root job and execution context that a job's step goes to; both are on record then.

        Without ``number`` it is the context that was begun last under this job id; there is always one, since the first
        step begins it.
        """
        root = await self._join(job_id, root_job_id, now)
        if number is not None and self._known.has_context(root, number):
            return root, number

        def choose(record: JobRecord) -> str:
            return number or record.newest_of(job_id) or first_context(record, job_id)

        if number is None:
            record = await self._job(root)
            mine = None if record is None else record.newest_of(job_id)
            if mine is not None:
                return root, mine
        chosen = await self._begin(root, job_id, choose, now)
        assert chosen is not None
        return root, chosen

    async def begin(
        self, job_id: str, root_job_id: str | None, expected: str | None, now: datetime
    ) -> tuple[str, str | None]:
        """Begins an execution context and returns root job and number.

        With ``expected``: None for the number, and nothing is begun, unless the newest is that one.
        """
        root = await self._join(job_id, root_job_id, now)

        def choose(record: JobRecord) -> str | None:
            newest = str(record.numbers[0]) if record.numbers else None
            return next_context(record, job_id) if expected is None or expected == newest else None

        return root, await self._begin(root, job_id, choose, now)

    async def write_step(
        self, record: Callable[[Ref, Ref | None], StepRecord], bodies: Sequence[EncodedBody], encrypt: bool | None
    ) -> SavedStep:
        """Stores a step's result, its input if there is one, and then the record that ``record`` makes of their names.

        A crash before the last of it leaves data that nothing names, and no step.
        """
        key = _key_of(record(Ref(""), None))  # which does not depend on the data
        if encrypt is None:
            encrypt = bool((await self._hf.keys.policies()).policy_for(key).encrypt)
        refs = await asyncio.gather(
            *(
                self._hf.put(body.raw, kind=DATA_KIND, content_type=body.content_type, encrypt=encrypt)
                for body in bodies
            )
        )
        saved = record(refs[0], refs[1] if len(refs) > 1 else None)
        value = await self._hf.keys.put(
            key,
            msgspec.to_builtins(saved),
            kind=STEP_KIND,
            session=saved.root_job_id,
            encrypt=encrypt,
            changed_by=saved.job_id,
            change_type="step",
        )
        return SavedStep(saved, value.version)

    async def find(self, job_id: str, steps: Iterable[str], number: str | None = None) -> dict[str, SavedStep]:
        """Returns the newest saving of each step: of one execution context, or of the newest that has the step."""
        root, job = await self.locate(job_id)
        left = list(dict.fromkeys(steps))
        numbers = [number] if number is not None else await self._numbers(root, job)
        found: dict[str, SavedStep] = {}
        at_once = max(1, _KEYS_AT_ONCE // max(1, len(left)))
        for start in range(0, len(numbers), at_once):
            window = numbers[start : start + at_once]
            keys = {(name, of): step_key(root, of, name) for name in left for of in window}
            saved = await self._records(list(keys.values()))
            for name in left:
                newest = next((saved[key] for of in window if (key := keys[name, of]) in saved), None)
                if newest is not None:
                    found[name] = newest
            left = [name for name in left if name not in found]
            if not left:
                break
        return found

    async def get(self, root_job_id: str, number: str, step_name: str, version: int) -> SavedStep:
        """Returns one saving of a step; raises NotFoundError when there is none of that version."""
        key = step_key(root_job_id, number, step_name)
        value = await self._hf.keys.get(key, version)
        return SavedStep(read_record(StepRecord, value.body, key), value.version)

    async def newest_steps(self, job_id: str) -> list[SavedStep]:
        """Returns the newest saving of each step in each execution context, in order of context and step number."""
        root, _ = await self.locate(job_id)
        saved = await self._records(await self._keys(root))
        return sorted(
            saved.values(), key=lambda s: (int(s.record.execution_context_id), s.record.step_number, s.record.timestamp)
        )

    async def all_steps(self, job_id: str, step_name: str | None, number: str | None) -> list[SavedStep]:
        """Returns every saving of the steps asked for, in the order of their times; hot and cold."""
        root, _ = await self.locate(job_id)
        found: list[tuple[str, int, Ref]] = []
        for key in await self._keys(root):
            place = parse_step_key(key)
            if place is None or (step_name not in (None, place[2])) or (number not in (None, place[1])):
                continue
            found += [
                (key, version.version, version.ref)
                async for version in self._hf.keys.history(key)
                if version.ref is not None
            ]
        bodies = await self.load(ref for _, _, ref in found)
        saved = [SavedStep(read_record(StepRecord, bodies[ref].decode(), key), version) for key, version, ref in found]
        return sorted(saved, key=lambda step: (step.record.timestamp, step.version))

    async def version_at(self, root_job_id: str, number: str, step_name: str, timestamp: str) -> SavedStep | None:
        """Returns the saving of a step that carries a time; None when none does."""
        key = step_key(root_job_id, number, step_name)
        async for version in self._hf.keys.history(key):
            if version.deleted:
                continue
            record = read_record(StepRecord, (await version.load()).body, key)
            if record.timestamp == timestamp:
                return SavedStep(record, version.version)
        return None

    async def jobs(self) -> list[JobRecord]:
        """Returns the records of all jobs, in order of their keys; what is none of ours is left out."""
        keys = [version.key async for version in self._hf.keys.list(JOBS_PREFIX)]
        records: list[JobRecord] = []
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            values = await self._hf.keys.get_many(keys[start : start + _KEYS_AT_ONCE])
            for key, value in values.items():
                try:
                    records.append(read_record(JobRecord, value.body, key))
                except InvalidBodyError as error:
                    logger.warning(
                        "key under the prefix of jobs is no job",
                        extra={"action": "job_skipped", "key": key, "error": error.message},
                    )
        return records

    async def load(self, refs: Iterable[Ref]) -> dict[Ref, Context]:
        """Returns the data of references; whoever hands it on decodes it for each, since equal data has one reference.

        Raises NotFoundError for data that is stored nowhere.
        """
        wanted = list(dict.fromkeys(refs))
        loaded: dict[Ref, Context] = {}
        for start in range(0, len(wanted), _BODIES_AT_ONCE):
            resolved = await self._hf.resolve_many(wanted[start : start + _BODIES_AT_ONCE])
            if resolved.missing:
                raise NotFoundError(
                    f"the data {resolved.missing[0]} of a step is stored nowhere",
                    field="ref",
                    hint="run 'holdfast verify'",
                )
            loaded |= resolved.found
        return loaded

    async def _join(self, job_id: str, root_job_id: str | None, now: datetime) -> str:
        """Returns the root job; puts on record that ``job_id`` is a run of it when the caller says so."""
        known = self._known.root_of(job_id)
        if root_job_id is None or root_job_id in (job_id, known):
            return known if known is not None else (await self.locate(job_id))[0]
        root, _ = await self.locate(root_job_id)
        if root == job_id:
            return root
        link = JobRecord(job_id=job_id, created_at=now.isoformat(), root_job_id=root)
        try:
            await self._hf.keys.put(
                job_key(job_id), msgspec.to_builtins(link), expected_version=0, kind=JOB_KIND, changed_by=job_id
            )
        except VersionConflictError as conflict:
            current, _ = await self.locate(job_id)
            if current != root:
                raise InvalidFieldError(
                    f"job {job_id!r} is filed under {current!r} already, not under {root!r}",
                    field="root_job_id",
                    hint="give the root job with the first step that a resumed job saves",
                ) from conflict
        self._known.add_root(job_id, root)
        return root

    async def _begin(
        self, root: str, job_id: str, choose: Callable[[JobRecord], str | None], now: datetime
    ) -> str | None:
        chosen: str | None = None

        def change(body: Any) -> Any:
            nonlocal chosen
            record = (
                JobRecord(job_id=root, created_at=now.isoformat())
                if body is None
                else read_record(JobRecord, body, job_key(root))
            )
            chosen = choose(record)
            changed = record if chosen is None else with_context(record, chosen, job_id, now)
            return UNCHANGED if changed is record else msgspec.to_builtins(changed)

        try:
            await self._hf.keys.update(job_key(root), change, default=None, kind=JOB_KIND, changed_by=job_id)
        except NotFoundError:
            return None  # nothing was begun on a job that is not on record
        if chosen is not None:
            self._known.add_root(root, root)
            self._known.add_context(root, chosen)
        return chosen

    async def _job(self, job_id: str) -> JobRecord | None:
        key = job_key(job_id)
        value = (await self._hf.keys.get_many([key])).get(key)
        return None if value is None else read_record(JobRecord, value.body, key)

    async def _numbers(self, root: str, job: JobRecord | None) -> list[str]:
        if job is not None and job.execution_contexts:
            return [str(number) for number in job.numbers]
        # Steps without a job: another client wrote them, or somebody deleted the record.
        places = [parse_step_key(key) for key in await self._keys(root)]
        return sorted({place[1] for place in places if place is not None}, key=int, reverse=True)

    async def _keys(self, root: str) -> list[str]:
        return [version.key async for version in self._hf.keys.list(steps_prefix(root)) if parse_step_key(version.key)]

    async def _records(self, keys: Sequence[str]) -> dict[str, SavedStep]:
        saved: dict[str, SavedStep] = {}
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            values = await self._hf.keys.get_many(keys[start : start + _KEYS_AT_ONCE])
            for key, value in values.items():
                saved[key] = SavedStep(read_record(StepRecord, value.body, key), value.version)
        return saved


def _key_of(record: StepRecord) -> str:
    return step_key(record.root_job_id, record.execution_context_id, record.step_name)


__all__ = ["KnownJobs", "PipelineStore", "SavedStep"]
