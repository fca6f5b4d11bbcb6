"""The registry of what pipeline steps produced: every output of every run of a job, with its input, kept for good.

::

    registry = ContextRegistry(hf)
    await registry.register_step_output("job-1", "seo_keywords", 1, {"main": "tea"}, input_snapshot={"topic": "tea"})
    reference = registry.get_context_reference("job-1", "seo_keywords")   # asks nobody
    data = await registry.resolve_context(reference)                      # loads it, now

A job has execution contexts: 0 is its first run, each time it is resumed begins another.  A resumed job reads what
earlier runs produced and writes its own.  Saving a step again in one execution context makes another version of it, and
a reference goes on to answer with the version that it was taken of.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

from holdfast.client.background import ClientShare
from holdfast.client.context_reference import ContextReference, PendingReference, PendingReferences, is_reference_dict
from holdfast.client.pipeline_records import (
    ExecutionContext,
    JobRecord,
    StepAudit,
    StepRecord,
    check_execution_context,
    check_job_id,
    check_keys_used,
    check_step_name,
    check_step_number,
    job_key,
    step_key,
)
from holdfast.client.pipeline_store import KnownJobs, PipelineStore, SavedStep
from holdfast.client.step_data import EncodedBody, is_stored_compressed, to_plain
from holdfast.schemas.bodies import encode_body, encode_json
from holdfast.schemas.errors import (
    InputError,
    InvalidFieldError,
    InvalidRefError,
    NotFoundError,
    VersionConflictError,
)
from holdfast.schemas.refs import Ref, parse_ref

if TYPE_CHECKING:
    from holdfast.client.model import Context
    from holdfast.client.store import Holdfast

T = TypeVar("T")

NAMESPACE_VARIABLE: Final = "HOLDFAST_NAMESPACE"
_AGENT: Final = "pipeline"


class Runner(Protocol):
    """What runs something on an open client, wherever that lives.  A ClientShare is one."""

    async def run(self, use: Callable[[Holdfast], Awaitable[T]]) -> T:
        """Awaits ``use(client)`` and returns its result."""
        ...


class _OpenClient:
    """A client that the caller has opened and will close."""

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf

    async def run(self, use: Callable[[Holdfast], Awaitable[T]]) -> T:
        return await use(self._hf)


class ContextRegistry:
    """Keeps and finds the outputs of pipeline steps.  Safe to use from many tasks; keeps no data in memory.

    ``hf`` is an open client.  Without one the registry connects with its first call to the server that
    :func:`holdfast.client.connect` would find, in the namespace of ``HOLDFAST_NAMESPACE``, and may be used from any
    event loop; that connection is the background client's (``holdfast.client.background``), which is closed when the
    interpreter exits, or by :meth:`close` when nobody else uses it.  ``enable_compression`` is there for callers of
    earlier registries and changes nothing: the hot tier compresses every body over 1 KiB that gets smaller by it, and
    the lake compresses all.
    """

    def __init__(self, hf: Holdfast | ClientShare | None = None, *, enable_compression: bool = True) -> None:
        self.enable_compression = enable_compression
        self._share: ClientShare | None = None
        if hf is None:
            hf = self._share = ClientShare(namespace=os.environ.get(NAMESPACE_VARIABLE) or "default", agent=_AGENT)
        self._runner: Runner = hf if isinstance(hf, ClientShare) else _OpenClient(hf)
        self._known = KnownJobs()
        self._pending = PendingReferences()

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` has closed it; one on a client of the caller's is never closed."""
        return self._share is not None and self._share.is_closed

    async def close(self) -> None:
        """Gives back the connection that it made itself; does nothing to a client that it was given."""
        if self._share is not None:
            await self._share.aclose()

    async def register_step_output(
        self,
        job_id: str,
        step_name: str,
        step_number: int,
        output_data: Any,
        input_snapshot: Any = None,
        context_keys_used: Sequence[str] | None = None,
        execution_context_id: str | int | None = None,
        root_job_id: str | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        relative_step_number: int | None = None,
        encrypt: bool | None = None,
    ) -> ContextReference:
        """Saves what a step produced, with what it was given, and returns the reference; then it is stored durably.

        ``output_data`` and ``input_snapshot`` may be anything that JSON can hold, text or bytes (and see
        :func:`~holdfast.client.step_data.to_plain`); references within them are stored as references.
        ``root_job_id`` says, once, which job ``job_id`` is a run of.  Without ``execution_context_id`` it goes to the
        one that was begun last under this job id.  ``encrypt`` is of data and record; None: as the prefix's policy has
        it.  Raises InputError naming the argument, before anything is stored; after UnknownOutcomeError the same call
        is safe to repeat, and may make a second, equal version.
        """
        names = check_job_id(job_id), check_step_name(step_name), check_step_number(step_number)
        root = None if root_job_id is None else check_job_id(root_job_id, "root_job_id")
        number = None if execution_context_id is None else check_execution_context(execution_context_id)
        relative = (
            None if relative_step_number is None else check_step_number(relative_step_number, "relative_step_number")
        )
        keys_used = check_keys_used(context_keys_used)
        facts = _check_metadata(metadata)
        step_key(root or names[0], number or "0", names[1])  # the key is not too long
        bodies = [await self._encoded(output_data, "output_data")]
        if input_snapshot is not None:
            bodies.append(await self._encoded(input_snapshot, "input_snapshot"))

        async def save(hf: Holdfast) -> SavedStep:
            now = datetime.now(UTC)
            store = PipelineStore(hf, self._known)
            filed_under, context = await store.claim(names[0], root, number, now)
            # They were taken of what is there now, and shall not turn into what is about to be saved.
            await self._pin_pending(hf, names[1], filed_under)
            is_compressed = await is_stored_compressed(hf.namespace, bodies[0])

            def record(result: Ref, given: Ref | None) -> StepRecord:
                return StepRecord(
                    job_id=names[0],
                    root_job_id=filed_under,
                    step_name=names[1],
                    step_number=names[2],
                    execution_context_id=context,
                    timestamp=now.isoformat(timespec="microseconds"),
                    result=result,
                    input=given,
                    context_keys_used=keys_used,
                    compressed=is_compressed,
                    relative_step_number=relative,
                    metadata=facts,
                )

            return await store.write_step(record, bodies, encrypt)

        return ContextReference.of_record(*await self._runner.run(save))

    async def begin_execution_context(
        self, job_id: str, *, root_job_id: str | None = None, expected: str | int | None = None
    ) -> str:
        """Begins a run of a job, the first or a resumed one, and returns its execution context: ``"0"``, ``"1"``, ….

        What is saved under ``job_id`` goes there from now on, unless told otherwise.  Two workers that begin at once
        get one each; pass it on as ``execution_context_id`` where both go on under the same job id.  With ``expected``
        one of them alone begins: it is the execution context that the caller takes to be the newest, and
        VersionConflictError says that another one has been begun since.
        """
        check_job_id(job_id)
        root = None if root_job_id is None else check_job_id(root_job_id, "root_job_id")
        newest = None if expected is None else check_execution_context(expected)

        async def begin(hf: Holdfast) -> tuple[str, str | None, JobRecord | None]:
            store = PipelineStore(hf, self._known)
            filed_under, begun = await store.begin(job_id, root, newest, datetime.now(UTC))
            record = None if begun is not None else (await store.locate(filed_under))[1]
            return filed_under, begun, record

        filed_under, begun, record = await self._runner.run(begin)
        if begun is not None:
            return begun
        if record is None or not record.numbers:
            raise NotFoundError(
                f"job {filed_under!r} has no execution context yet", field="expected", hint="leave expected out"
            )
        raise VersionConflictError(
            f"the newest execution context of job {filed_under!r} is {record.numbers[0]}, not {newest}",
            key=job_key(filed_under),
            expected=int(newest or 0),
            actual=record.numbers[0],
            field="expected",
            hint="another worker has resumed the job",
        )

    def get_context_reference(
        self, job_id: str, step_name: str, execution_context_id: str | int | None = None
    ) -> PendingReference:
        """Returns a reference to a step's output, at once: nobody is asked.

        It is completed when it is first needed, and pinned by that.  ``await`` it to do so now: that gives the same
        reference, or None when no such step is saved.
        """
        number = None if execution_context_id is None else check_execution_context(execution_context_id)
        reference = PendingReference(job_id, step_name, number, self._complete)
        self._pending.add(reference)
        return reference

    async def get_context_references(
        self, job_id: str, step_names: Iterable[str], execution_context_id: str | int | None = None
    ) -> dict[str, ContextReference]:
        """Returns the references of many steps, pinned; steps that are not saved are left out."""
        saved = await self._find(job_id, step_names, execution_context_id)
        return {name: ContextReference.of_record(*step) for name, step in saved.items()}

    async def resolve_context(self, reference: Any) -> Any:
        """Returns the data that a reference names; data that is passed instead of a reference is returned as it is.

        A reference is a :class:`ContextReference`, its dict form, or a Holdfast reference ``ctx_…`` of any context.
        Each call decodes the data anew, so that callers share nothing.  Raises NotFoundError when there is no such
        step.
        """
        if isinstance(reference, ContextReference):
            return await self._resolve(reference)
        if is_reference_dict(reference):
            return await self._resolve(ContextReference.from_dict(reference))
        if isinstance(reference, str) and _is_ref(reference):
            return (await self._load([Ref(reference)]))[Ref(reference)].decode()
        return reference

    async def get_context(
        self,
        job_id: str,
        key: str,
        step_name: str | None = None,
        execution_context_id: str | int | None = None,
    ) -> Any:
        """Returns what a step produced, in its newest execution context or the one given; None when there is nothing.

        ``key`` is the step's name; ``step_name`` says so where the two differ.
        """
        name = key if step_name is None else step_name
        return (await self.query_context(job_id, [name], execution_context_id)).get(name)

    async def query_context(
        self, job_id: str, keys: Iterable[str], execution_context_id: str | int | None = None
    ) -> dict[str, Any]:
        """Returns what many steps produced, by step; steps that are not saved are left out.

        Each is an object of its own, also of steps that produced the same.
        """
        saved = await self._find(job_id, keys, execution_context_id)
        data = await self._load(step.record.result for step in saved.values())
        return {name: data[step.record.result].decode() for name, step in saved.items()}

    async def resolve_missing(
        self,
        context: Mapping[str, Any],
        required_keys: Iterable[str],
        job_id: str | None = None,
        execution_context_id: str | int | None = None,
    ) -> dict[str, Any]:
        """Returns ``context`` with every required key as data: how a step gets its input.

        References among the required keys are resolved, data is taken as it is, and what is missing is looked up in
        the registry; keys that are not required stay as they are.  Without ``job_id`` there is no looking up.  Raises
        NotFoundError naming the keys that are nowhere.
        """
        wanted = list(dict.fromkeys(required_keys))
        given = {key: await self.resolve_context(context[key]) for key in wanted if key in context}
        missing = [key for key in wanted if key not in context]
        if missing and job_id is not None:
            given |= await self.query_context(job_id, missing, execution_context_id)
        nowhere = [key for key in missing if key not in given]
        if nowhere:
            raise NotFoundError(
                f"context keys {', '.join(nowhere)} are neither given nor saved under job {job_id!r}",
                field="required_keys",
                hint=f"see holdfast job show {job_id}" if job_id is not None else "give a job id",
            )
        return {**context, **given}

    async def get_full_history(self, job_id: str) -> dict[str, dict[str, Any]]:
        """Returns what every step produced in every execution context: ``{"0": {step: data}, "1": {…}}``.

        Everything at once: for one step after another, with inputs and superseded versions, see :meth:`history`.
        """
        steps = await self.get_steps(job_id)
        data = await self._load(step.record.result for step in steps)
        history: dict[str, dict[str, Any]] = {}
        for step in steps:
            outputs = history.setdefault(step.record.execution_context_id, {})
            outputs[step.record.step_name] = data[step.record.result].decode()
        return history

    async def get_steps(self, job_id: str) -> list[SavedStep]:
        """Returns the records of all steps of a job, without data, in order of execution context and step number."""
        check_job_id(job_id)
        return await self._run(lambda store: store.newest_steps(job_id))

    async def history(
        self, job_id: str, step_name: str | None = None, execution_context_id: str | int | None = None
    ) -> list[SavedStep]:
        """Returns every saving of the steps of a job, superseded ones too, in the order of their times.

        Without data: ``ContextReference.of_record(*saved)`` resolves to what that very saving produced.
        """
        check_job_id(job_id)
        number = None if execution_context_id is None else check_execution_context(execution_context_id)
        return await self._run(lambda store: store.all_steps(job_id, step_name, number))

    async def get_step_audit(
        self,
        job_id: str,
        step_name: str,
        execution_context_id: str | int | None = None,
        version: int | None = None,
    ) -> StepAudit:
        """Returns one saving of a step with exactly the data that it was given, used and produced.

        The newest saving, unless ``execution_context_id`` or ``version`` says otherwise.  Raises NotFoundError when
        there is none.
        """
        found = (await self._find(job_id, [step_name], execution_context_id)).get(step_name)
        if found is None:
            raise _no_step(job_id, step_name, execution_context_id)
        if version is not None and version != found.version:
            place = found.record.root_job_id, found.record.execution_context_id, step_name
            found = await self._run(lambda store: store.get(*place, version))
        record = found.record
        data = await self._load([ref for ref in (record.result, record.input) if ref is not None])
        snapshot = await self._resolve_within(None if record.input is None else data[record.input].decode())
        return StepAudit(
            job_id=record.job_id,
            root_job_id=record.root_job_id,
            step_name=record.step_name,
            step_number=record.step_number,
            relative_step_number=record.relative_step_number,
            execution_context_id=record.execution_context_id,
            version=found.version,
            timestamp=record.timestamp,
            context_keys_used=record.context_keys_used,
            used={key: snapshot[key] for key in record.context_keys_used if key in snapshot}
            if isinstance(snapshot, dict)
            else {},
            input_snapshot=snapshot,
            result=data[record.result].decode(),
            metadata=record.metadata,
            result_ref=record.result,
            input_ref=record.input,
        )

    async def get_execution_contexts(self, job_id: str) -> list[ExecutionContext]:
        """Returns the runs of a job, oldest first; [] for a job that the registry has not heard of."""
        check_job_id(job_id)
        _, record = await self._run(lambda store: store.locate(job_id))
        return [] if record is None else sorted(record.execution_contexts, key=lambda context: int(context.id))

    async def get_root_job_id(self, job_id: str) -> str:
        """Returns the job under which a job's steps are filed: itself, unless it is a run of another."""
        check_job_id(job_id)
        return (await self._run(lambda store: store.locate(job_id)))[0]

    async def get_jobs(self) -> list[JobRecord]:
        """Returns the records of all jobs, those that are runs of another among them."""
        return await self._run(lambda store: store.jobs())

    async def _find(
        self, job_id: str, steps: Iterable[str], execution_context_id: str | int | None
    ) -> dict[str, SavedStep]:
        check_job_id(job_id)
        names = [check_step_name(name) for name in ([steps] if isinstance(steps, str) else steps)]
        number = None if execution_context_id is None else check_execution_context(execution_context_id)
        return await self._run(lambda store: store.find(job_id, names, number)) if names else {}

    async def _load(self, refs: Iterable[Ref]) -> dict[Ref, Context]:
        wanted = list(refs)
        return await self._run(lambda store: store.load(wanted)) if wanted else {}

    async def _run(self, use: Callable[[PipelineStore], Awaitable[T]]) -> T:
        return await self._runner.run(lambda hf: use(PipelineStore(hf, self._known)))

    async def _resolve(self, reference: ContextReference) -> Any:
        if reference.ref is None and await self._complete(reference) is None:
            raise _no_step(reference.job_id, reference.step_name, reference.execution_context_id)
        assert reference.ref is not None
        return (await self._load([reference.ref]))[reference.ref].decode()

    async def _complete(self, reference: ContextReference) -> ContextReference | None:
        await self._run(lambda store: _pin(store, reference))
        return reference if reference.is_pinned else None

    async def _pin_pending(self, hf: Holdfast, step_name: str, root_job_id: str) -> None:
        store = PipelineStore(hf, self._known)
        for reference in self._pending.of_step(step_name):
            try:
                root, _ = await store.locate(reference.job_id)
                if root == root_job_id:
                    await _pin(store, reference)
            except InputError:
                continue  # its holder will be told; it is no reason not to save

    async def _encoded(self, value: Any, field: str) -> EncodedBody:
        """The bytes that are stored; a reference in it that is still pending is pinned first."""
        pending: list[ContextReference] = []
        plain = to_plain(value, field, lambda found: None if found.is_pinned else pending.append(found))
        if pending:
            for reference in pending:
                await self._complete(reference)
            plain = to_plain(value, field)
        return EncodedBody(*encode_body(plain))

    async def _resolve_within(self, snapshot: Any) -> Any:
        if not isinstance(snapshot, dict):
            return snapshot
        values = cast("dict[str, Any]", snapshot)
        return {
            key: await self.resolve_context(value) if is_reference_dict(value) else value
            for key, value in values.items()
        }


async def _pin(store: PipelineStore, reference: ContextReference) -> None:
    """Pins a reference to the saving that it names: by version, by time, or the newest."""
    name, number = reference.step_name, reference.execution_context_id
    if number is not None and reference.version is not None:
        root, _ = await store.locate(reference.root_job_id or reference.job_id)
        reference.pin(*await store.get(root, number, name, reference.version))
        return
    found = (await store.find(reference.root_job_id or reference.job_id, [name], number)).get(name)
    if found is not None and reference.timestamp not in (None, found.record.timestamp):
        record = found.record
        found = await store.version_at(record.root_job_id, record.execution_context_id, name, reference.timestamp)
    if found is not None and not reference.is_pinned:
        reference.pin(*found)


def _check_metadata(metadata: object) -> dict[str, Any]:
    plain = to_plain({} if metadata is None else metadata, "metadata")
    if not isinstance(plain, dict):
        raise InvalidFieldError("metadata is no object", field="metadata")
    encode_json(cast("dict[str, Any]", plain), "metadata")
    return cast("dict[str, Any]", plain)


def _is_ref(text: str) -> bool:
    try:
        parse_ref(text)
    except InvalidRefError:
        return False
    return True


def _no_step(job_id: str, step_name: str, execution_context_id: str | int | None) -> NotFoundError:
    where = "" if execution_context_id is None else f" in execution context {execution_context_id}"
    return NotFoundError(
        f"job {job_id!r} has no step {step_name!r}{where}",
        field="step_name",
        hint=f"see holdfast job show {job_id}",
    )


__all__ = ["ContextReference", "ContextRegistry", "StepAudit"]
