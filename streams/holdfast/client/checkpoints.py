"""Checkpoints of the hot state: captured while the system runs, saved, loaded, restored into an empty one::

    from holdfast.client import connect
    from holdfast.client.checkpoints import Checkpoints

    async with connect() as hf:
        checkpoints = Checkpoints(hf)
        data = await checkpoints.capture_context_state()
        await checkpoints.save_context_checkpoint(data)

    async with connect("nats://elsewhere:4222") as hf:
        checkpoints = Checkpoints(hf)
        await checkpoints.restore_context_state(await checkpoints.load_context_checkpoint())

The functions of the same names use the connection that the environment names, one for each event loop.  Checkpoints
without a path are kept in the directory that ``HOLDFAST_CHECKPOINTS`` names, else in ``./holdfast-checkpoints``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from holdfast.client.checkpoint_capture import Capture, Progress, no_progress
from holdfast.client.checkpoint_file import (
    ITEM_NAMES,
    CheckpointInfo,
    check_file,
    read_header,
    sync_directory,
    unwritable,
)
from holdfast.client.checkpoint_restore import Restore, RestoreReport
from holdfast.client.checkpoint_scratch import in_thread
from holdfast.client.checkpoint_verify import Verification, VerifyReport
from holdfast.client.context_connection import OwnedConnection
from holdfast.schemas.errors import HoldfastError, InvalidFieldError, NotFoundError
from holdfast.schemas.ids import iso_from_ms, new_event_id, now_ms

if TYPE_CHECKING:
    from holdfast.client.store import Holdfast

logger = logging.getLogger(__name__)

VARIABLE: Final = "HOLDFAST_CHECKPOINTS"
DEFAULT_DIRECTORY: Final = "holdfast-checkpoints"
SUFFIX: Final = ".checkpoint"

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


class CheckpointData:
    """A whole checkpoint: what it says of itself, and the file that holds it; its contents are never in memory.

    What was captured and not saved is removed when this object is: by :meth:`discard`, or when nobody holds it.
    """

    def __init__(self, path: Path, info: CheckpointInfo, *, is_spooled: bool) -> None:
        self.path = path
        self.info = info
        self._spool = weakref.finalize(self, _remove, path) if is_spooled else None

    @property
    def checkpoint_id(self) -> str:
        """The name that it was captured under."""
        return self.info.header.checkpoint_id

    @property
    def created_at_ms(self) -> int:
        """When the capture began, in milliseconds since 1970."""
        return self.info.header.created_at_ms

    @property
    def is_saved(self) -> bool:
        """Whether the file stays when this object goes."""
        return self._spool is None

    @property
    def counts(self) -> dict[str, int]:
        """How many contexts (parts of large ones too), versions of keys, events and dead letters it holds."""
        return dict(zip(ITEM_NAMES, self.info.summary.items, strict=True))

    def discard(self) -> None:
        """Removes the file, unless it has been saved."""
        if self._spool is not None:
            self._spool()

    def saved_at(self, path: Path) -> None:
        """Notes that the file is somebody's now; for :meth:`Checkpoints.save_context_checkpoint`."""
        if self._spool is not None:
            self._spool.detach()
            self._spool = None
        self.path = path


class Checkpoints:
    """Captures, saves, loads, restores and compares checkpoints through one client.

    ``directory`` is where those without a path are kept; see the module for the default.
    """

    def __init__(self, hf: Holdfast, *, directory: Path | str | None = None) -> None:
        self._hf = hf
        self._directory = Path(directory) if directory is not None else default_directory()

    async def capture_context_state(
        self,
        checkpoint_id: str | None = None,
        *,
        all_namespaces: bool = False,
        on_progress: Progress = no_progress,
    ) -> CheckpointData:
        """Captures what is hot at this moment into a spooled file, while the system goes on.

        Everything acknowledged before the call that has not left the hot tier is in it: contexts, versions of keys,
        events and dead letters of the client's namespace, or of all.  Raises InvalidFieldError for an id that is no
        name of a file, ConfigurationError when the file cannot be written, UnavailableError without a server.
        """
        path = await in_thread(self._spool_path)
        return await capture_to(
            self._hf,
            path,
            checkpoint_id,
            namespace=None if all_namespaces else self._hf.namespace,
            on_progress=on_progress,
            is_spooled=True,
        )

    async def save_context_checkpoint(self, data: CheckpointData, path: Path | str | None = None) -> Path:
        """Gives a checkpoint its place and returns that; it is on the disk then.  A file of that name is replaced.

        ``path`` None: the directory of the checkpoints, under its id.
        """
        return await _save(data, path, self._directory)

    async def load_context_checkpoint(
        self, checkpoint_id: str | None = None, *, path: Path | str | None = None
    ) -> CheckpointData:
        """Returns a saved checkpoint, checked to its last byte: that of an id, or of a path, or the newest one.

        Raises NotFoundError when there is none, IntegrityError when it is damaged.
        """
        return await _load(checkpoint_id, path, self._directory)

    async def restore_context_state(
        self, data: CheckpointData, *, merge: bool = False, on_progress: Progress = no_progress
    ) -> RestoreReport:
        """Restores a checkpoint into this system, which must be empty unless this is a ``merge``.

        The same restore again completes one that was cut off.  Errors as of :meth:`Restore.run`.
        """
        return await Restore(self._hf.connection, merge=merge, on_progress=on_progress).run(data.path)

    async def verify_context_checkpoint(
        self, data: CheckpointData, *, on_progress: Progress = no_progress
    ) -> VerifyReport:
        """Compares a checkpoint with this system, hot and cold, item by item; see :class:`VerifyReport`."""
        return await Verification(self._hf.connection, on_progress=on_progress).run(data.path)

    def _spool_path(self) -> Path:
        # Beside where it will be saved, so that saving is a renaming: a temporary directory may be memory.
        make_directory(self._directory)
        return self._directory / f".spool-{new_event_id()}{SUFFIX}"


async def _save(data: CheckpointData, path: Path | str | None, directory: Path) -> Path:
    target = directory / f"{data.checkpoint_id}{SUFFIX}" if path is None else Path(path)
    await in_thread(partial(_move, data, target))
    return target


async def _load(checkpoint_id: str | None, path: Path | str | None, directory: Path) -> CheckpointData:
    chosen = Path(path) if path is not None else await in_thread(partial(find_checkpoint, directory, checkpoint_id))
    return CheckpointData(chosen, await in_thread(partial(check_file, chosen)), is_spooled=False)


async def capture_to(
    hf: Holdfast,
    path: Path,
    checkpoint_id: str | None = None,
    *,
    namespace: str | None,
    on_progress: Progress = no_progress,
    is_spooled: bool = False,
) -> CheckpointData:
    """Captures into a file of the caller's; ``namespace`` None: all.  See :meth:`Checkpoints.capture_context_state`."""
    at_ms = now_ms()
    name = new_checkpoint_id(at_ms) if checkpoint_id is None else check_checkpoint_id(checkpoint_id)
    info = await Capture(hf.connection, namespace=namespace, on_progress=on_progress).run(path, name, at_ms)
    return CheckpointData(path, info, is_spooled=is_spooled)


def new_checkpoint_id(at_ms: int) -> str:
    """Returns an id that tells the time and is nobody else's, such as ``20260131T093000.125Z-4f2a91``."""
    stamp = iso_from_ms(at_ms).replace("-", "").replace(":", "")
    return f"{stamp}-{new_event_id()[-6:]}"


def check_checkpoint_id(checkpoint_id: object) -> str:
    """Returns an id when it can be the name of a file: 1 to 100 of ``[A-Za-z0-9._-]``, the first no point."""
    if isinstance(checkpoint_id, str) and _ID.match(checkpoint_id):
        return checkpoint_id
    raise InvalidFieldError(
        f"checkpoint id {repr(checkpoint_id)[:80]} is not 1 to 100 of the characters A-Z a-z 0-9 . _ -",
        field="checkpoint_id",
        limit=100,
    )


def default_directory() -> Path:
    """Returns where checkpoints without a path are kept."""
    return Path(os.environ.get(VARIABLE) or DEFAULT_DIRECTORY)


def find_checkpoint(directory: Path, checkpoint_id: str | None = None) -> Path:
    """Returns the path of a saved checkpoint: of an id, or the newest; raises NotFoundError when there is none."""
    if checkpoint_id is not None:
        path = directory / f"{check_checkpoint_id(checkpoint_id)}{SUFFIX}"
        if path.is_file():
            return path
        raise _none_in(directory, f"no checkpoint {checkpoint_id!r}")
    newest: tuple[int, Path] | None = None
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        if path.name.startswith("."):
            continue  # being written, or not saved
        try:
            created_at_ms = read_header(path).created_at_ms
        except HoldfastError as error:
            logger.warning(
                "passed over a checkpoint that cannot be read",
                extra={"action": "checkpoint_passed_over", "path": str(path), "error": str(error)},
            )
            continue
        if newest is None or created_at_ms >= newest[0]:
            newest = created_at_ms, path
    if newest is None:
        raise _none_in(directory, "no checkpoint")
    return newest[1]


def _none_in(directory: Path, what: str) -> NotFoundError:
    return NotFoundError(
        f"{what} in {str(directory)!r}",
        field="checkpoint_id",
        hint=f"save one first, or name its directory with {VARIABLE}",
    )


def make_directory(path: Path) -> None:
    """Makes a directory for checkpoints, unless it is there; raises ConfigurationError when it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def _move(data: CheckpointData, target: Path) -> None:
    make_directory(target.parent)
    try:
        if data.is_saved or data.path.stat().st_dev != target.parent.stat().st_dev:
            _copy(data.path, target)
            data.discard()
        else:
            data.path.replace(target)
            sync_directory(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    data.saved_at(target)


def _copy(source: Path, target: Path) -> None:
    if target.exists() and source.samefile(target):
        return
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())
        Path(name).replace(target)
        sync_directory(target.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class _Shared:
    """The client of one event loop that the functions use; it ends with the loop."""

    def __init__(self) -> None:
        self.connection = OwnedConnection(None, os.environ.get("HOLDFAST_NAMESPACE") or "default", "checkpoints")

    async def checkpoints(self) -> Checkpoints:
        return Checkpoints(await asyncio.shield(self.connection.ready))


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()


async def _checkpoints() -> Checkpoints:
    loop = asyncio.get_running_loop()
    shared = _shared.get(loop)
    if shared is None or shared.connection.has_failed:
        shared = _shared[loop] = _Shared()
    return await shared.checkpoints()


async def close_shared_connection() -> None:
    """Closes the connection that the functions use in this event loop; the next call opens another one."""
    shared = _shared.pop(asyncio.get_running_loop(), None)
    if shared is not None:
        await shared.connection.close()


async def capture_context_state(checkpoint_id: str | None = None, *, all_namespaces: bool = False) -> CheckpointData:
    """Captures with the connection of the environment; see :meth:`Checkpoints.capture_context_state`."""
    return await (await _checkpoints()).capture_context_state(checkpoint_id, all_namespaces=all_namespaces)


async def save_context_checkpoint(data: CheckpointData, path: Path | str | None = None) -> Path:
    """Saves a checkpoint, without a connection; see :meth:`Checkpoints.save_context_checkpoint`."""
    return await _save(data, path, default_directory())


async def load_context_checkpoint(
    checkpoint_id: str | None = None, *, path: Path | str | None = None
) -> CheckpointData:
    """Loads a checkpoint, without a connection; see :meth:`Checkpoints.load_context_checkpoint`."""
    return await _load(checkpoint_id, path, default_directory())


async def restore_context_state(data: CheckpointData, *, merge: bool = False) -> RestoreReport:
    """Restores with the connection of the environment; see :meth:`Checkpoints.restore_context_state`."""
    return await (await _checkpoints()).restore_context_state(data, merge=merge)


__all__ = [
    "CheckpointData",
    "Checkpoints",
    "RestoreReport",
    "VerifyReport",
    "capture_context_state",
    "load_context_checkpoint",
    "restore_context_state",
    "save_context_checkpoint",
]
