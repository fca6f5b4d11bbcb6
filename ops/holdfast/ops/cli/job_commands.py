"""``holdfast job``: the jobs of pipelines, what their steps produced, and what they were given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.context_commands import write_body
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.key_commands import open_client
from holdfast.schemas.errors import NotFoundError

if TYPE_CHECKING:
    from holdfast.client import ContextRegistry, Holdfast
    from holdfast.client.pipeline_records import ExecutionContext, JobRecord, StepAudit
    from holdfast.client.pipeline_store import SavedStep

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its id, or that of one of its resumed runs.")]
ExecutionContextId = Annotated[
    str | None, typer.Option("--context", "-c", help="Of this execution context alone: 0 is the first run.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(add_completion=False)
    command(
        group,
        "job",
        examples=("holdfast job list", "holdfast job show job-1", "holdfast job step job-1 seo_keywords"),
        default_of_group=True,
    )(job)
    command(group, "list", examples=("holdfast job list", "holdfast job list --json | jq -r .job_id"))(list_jobs)
    command(group, "show", examples=("holdfast job show job-1", "holdfast job show job-1 --json"))(show)
    command(
        group,
        "history",
        examples=("holdfast job history job-1", "holdfast job history job-1 --step seo_keywords --json"),
    )(history)
    command(
        group,
        "step",
        examples=(
            "holdfast job step job-1 seo_keywords",
            "holdfast job step job-1 seo_keywords --context 0 --version 1 --json",
            "holdfast job step job-1 article --raw > article.json",
        ),
    )(step)
    app.add_typer(group, name="job")


async def job(invocation: Invocation) -> None:
    """List and show the jobs of pipelines: their execution contexts, and what each step was given and produced."""
    await list_jobs(invocation)


async def list_jobs(invocation: Invocation) -> None:
    """List the jobs, in order of id; a resumed run that has an id of its own names its root job."""
    async with open_client(invocation) as hf:
        records = await _registry(hf).get_jobs()
    if invocation.json:
        for record in records:
            output.write_json(job_json(record))
    elif records:
        columns = ("job", "of job", "execution contexts", "first heard of", "last begun")
        rows = [
            (
                record.job_id,
                record.root_job_id,
                None if record.root_job_id is not None else len(record.execution_contexts),
                record.created_at,
                max((context.started_at for context in record.execution_contexts), default=None),
            )
            for record in records
        ]
        output.write_table(columns, rows, right=("execution contexts",))
    else:
        output.remark("no jobs")


async def show(invocation: Invocation, identity: JobId) -> None:
    """Show a job: its execution contexts, and in each the newest result of every step."""
    async with open_client(invocation) as hf:
        registry = _registry(hf)
        root = await registry.get_root_job_id(identity)
        steps = await registry.get_steps(root)
        contexts = _with_unheard_of(await registry.get_execution_contexts(root), steps)
    if not contexts:
        raise _unknown(identity, invocation.settings.namespace)
    if invocation.json:
        output.write_json(
            {
                "job_id": root,
                "execution_contexts": [
                    {**_context_json(context), "steps": [step_json(s) for s in _steps_in(steps, context.id)]}
                    for context in contexts
                ],
            }
        )
        return
    for context in contexts:
        output.write_line(f"context_{context.id}  {context.job_id}  {context.started_at}")
        _write_steps(_steps_in(steps, context.id))


async def history(
    invocation: Invocation,
    identity: JobId,
    step_name: Annotated[str | None, typer.Option("--step", help="Of this step alone.")] = None,
    context: ExecutionContextId = None,
) -> None:
    """List everything that the steps of a job have saved, superseded results too, in the order of time."""
    async with open_client(invocation) as hf:
        saved = await _registry(hf).history(identity, step_name, context)
    if not saved:
        raise _unknown(identity, invocation.settings.namespace, step_name)
    if invocation.json:
        for found in saved:
            output.write_json(step_json(found))
    else:
        _write_steps(saved)


async def step(
    invocation: Invocation,
    identity: JobId,
    step_name: Annotated[str, typer.Argument(metavar="STEP", help="Its name.")],
    context: ExecutionContextId = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="This version instead of the newest.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write the exact bytes of the result and nothing else.")] = False,
) -> None:
    """Show what a step was given, which of it it used, and what it produced."""
    async with open_client(invocation) as hf:
        audit = await _registry(hf).get_step_audit(identity, step_name, context, version)
        result = await hf.resolve(audit.result_ref)
        given = None if audit.input_ref is None else await hf.resolve(audit.input_ref)
    if raw:
        output.write_bytes(result.raw)
        return
    if invocation.json:
        output.write_json(audit_json(audit))
        return
    facts = (f"context_{audit.execution_context_id}", f"{audit.step_number} {audit.step_name}", f"v{audit.version}")
    output.write_line("  ".join((audit.job_id, *facts, audit.timestamp)))
    if audit.context_keys_used:
        output.write_line(f"used    {', '.join(audit.context_keys_used)}")
    if given is not None:
        output.write_line(f"input   {audit.input_ref}")
        write_body(given)
    output.write_line(f"result  {audit.result_ref}")
    write_body(result)


def job_json(record: JobRecord) -> dict[str, Any]:
    """Returns a job as ``job list --json`` prints it."""
    members: dict[str, Any] = {"job_id": record.job_id, "created_at": record.created_at}
    if record.root_job_id is not None:
        return {**members, "root_job_id": record.root_job_id}
    return {**members, "execution_contexts": [_context_json(context) for context in record.execution_contexts]}


def step_json(saved: SavedStep) -> dict[str, Any]:
    """Returns a saved step as ``job show`` and ``job history`` print it: everything but the data."""
    record = saved.record
    members = {name: getattr(record, name) for name in record.__struct_fields__}
    return {**members, "version": saved.version}


def audit_json(audit: StepAudit) -> dict[str, Any]:
    """Returns a step with its data as ``job step --json`` prints it; bytes that are no text as ``…_base64``."""
    members = {name: getattr(audit, name) for name in audit.__struct_fields__}
    return {f"{name}_base64" if isinstance(value, bytes) else name: value for name, value in members.items()}


def _registry(hf: Holdfast) -> ContextRegistry:
    from holdfast.client import ContextRegistry

    return ContextRegistry(hf)


def _context_json(context: ExecutionContext) -> dict[str, Any]:
    return {"id": context.id, "job_id": context.job_id, "started_at": context.started_at}


def _with_unheard_of(contexts: list[ExecutionContext], steps: list[SavedStep]) -> list[ExecutionContext]:
    """The execution contexts on record, and those that only steps tell of: somebody else may have written them."""
    from holdfast.client.pipeline_records import ExecutionContext

    by_id = {context.id: context for context in contexts}
    for record, _ in steps:
        unheard_of = ExecutionContext(id=record.execution_context_id, job_id=record.job_id, started_at=record.timestamp)
        by_id.setdefault(unheard_of.id, unheard_of)
    return sorted(by_id.values(), key=lambda context: int(context.id))


def _steps_in(steps: list[SavedStep], execution_context_id: str) -> list[SavedStep]:
    return [saved for saved in steps if saved.record.execution_context_id == execution_context_id]


def _write_steps(steps: list[SavedStep]) -> None:
    rows = [
        (
            f"context_{record.execution_context_id}",
            record.step_number,
            record.step_name,
            version,
            record.timestamp,
            record.job_id,
            ", ".join(record.context_keys_used),
            record.result,
        )
        for record, version in steps
    ]
    columns = ("context", "number", "step", "version", "saved", "by job", "used", "result")
    output.write_table(columns, rows, right=("number", "version"))


def _unknown(identity: str, namespace: str, step_name: str | None = None) -> NotFoundError:
    what = f"job {identity!r}" if step_name is None else f"step {step_name!r} of job {identity!r}"
    return NotFoundError(
        f"there is no {what} in namespace {namespace!r}", field="job", hint="list them with 'holdfast job list'"
    )
