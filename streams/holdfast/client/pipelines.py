"""Step results of pipelines: what saves them, and the registry and manager that need no set-up.

::

    manager = get_step_result_manager()
    await manager.save_step_result("job-1", 1, "seo_keywords", {"main": "tea"}, input_snapshot={"topic": "tea"})
    data = await get_context_registry().get_context("job-1", "seo_keywords")

The two accessors need no set-up and may be used from any event loop: see :class:`ContextRegistry`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from holdfast.client.context_reference import ContextReference
from holdfast.client.context_registry import ContextRegistry
from holdfast.client.pipeline_records import StepAudit

if TYPE_CHECKING:
    from holdfast.client.store import Holdfast


class StepResultManager:
    """Saves the results of pipeline steps; what is saved is in the registry by that.

    Takes an open client or a registry; without either it shares the one of :func:`get_context_registry`.
    """

    def __init__(self, hf: Holdfast | ContextRegistry | None = None) -> None:
        if hf is None:
            self._registry: ContextRegistry | None = None
        else:
            self._registry = hf if isinstance(hf, ContextRegistry) else ContextRegistry(hf)

    @property
    def registry(self) -> ContextRegistry:
        """The registry that the results are in."""
        return get_context_registry() if self._registry is None else self._registry

    async def save_step_result(
        self,
        job_id: str,
        step_number: int,
        step_name: str,
        result_data: Any,
        metadata: Mapping[str, Any] | None = None,
        execution_context_id: str | int | None = None,
        root_job_id: str | None = None,
        input_snapshot: Any = None,
        context_keys_used: Sequence[str] | None = None,
        relative_step_number: int | None = None,
        *,
        encrypt: bool | None = None,
    ) -> ContextReference:
        """Saves the result of a step with its input, durably, and returns the reference to it.

        Saving a step again keeps both.  Arguments and errors as of :meth:`ContextRegistry.register_step_output`.
        """
        return await self.registry.register_step_output(
            job_id=job_id,
            step_name=step_name,
            step_number=step_number,
            output_data=result_data,
            input_snapshot=input_snapshot,
            context_keys_used=context_keys_used,
            execution_context_id=execution_context_id,
            root_job_id=root_job_id,
            metadata=metadata,
            relative_step_number=relative_step_number,
            encrypt=encrypt,
        )

    async def get_step_result_by_name(
        self, job_id: str, step_name: str, execution_context_id: str | int | None = None
    ) -> dict[str, Any]:
        """Returns a step's newest result with everything that was saved with it, as a dict of :class:`StepAudit`."""
        return _as_dict(await self.registry.get_step_audit(job_id, step_name, execution_context_id))

    async def get_full_context_history(self, job_id: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Returns results, inputs and keys used of all steps: ``{"0": {step: {…}}, "1": {…}}``."""
        history: dict[str, dict[str, dict[str, Any]]] = {}
        for record, version in await self.registry.get_steps(job_id):
            audit = await self.registry.get_step_audit(
                record.root_job_id, record.step_name, record.execution_context_id, version
            )
            history.setdefault(record.execution_context_id, {})[record.step_name] = _as_dict(audit)
        return history

    async def begin_execution_context(
        self, job_id: str, *, root_job_id: str | None = None, expected: str | int | None = None
    ) -> str:
        """Begins a run of a job; see :meth:`ContextRegistry.begin_execution_context`."""
        return await self.registry.begin_execution_context(job_id, root_job_id=root_job_id, expected=expected)


def _as_dict(audit: StepAudit) -> dict[str, Any]:
    return {name: getattr(audit, name) for name in audit.__struct_fields__}


class _Accessors:
    """The one registry and the one manager of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registry: ContextRegistry | None = None
        self.manager = StepResultManager()

    def registry(self) -> ContextRegistry:
        with self._lock:
            if self._registry is None or self._registry.is_closed:
                self._registry = ContextRegistry()
            return self._registry


_accessors: Final = _Accessors()


def get_context_registry() -> ContextRegistry:
    """Returns the registry of this process, a new one when the last has been closed; see :class:`ContextRegistry`."""
    return _accessors.registry()


def get_step_result_manager() -> StepResultManager:
    """Returns the step result manager of this process, which saves to the registry of :func:`get_context_registry`."""
    return _accessors.manager


__all__ = [
    "ContextReference",
    "ContextRegistry",
    "StepAudit",
    "StepResultManager",
    "get_context_registry",
    "get_step_result_manager",
]
