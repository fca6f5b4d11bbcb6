"""Filling the hot tier from the lake: contexts that were stored recently and have left it, newest first.

The resolver lists them and hands them on in the form they are stored in, so a large body comes in its parts and a
conversation that was stored after every turn takes what it takes in the hot tier.  Each is created once by its digest:
what is hot already stays as it is, and doing it again changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.checkpoint_items import digest_key
from holdfast.client.checkpoint_scratch import Scratch, in_thread
from holdfast.client.cold import ResolverClient, cold_chunks
from holdfast.schemas import limits
from holdfast.schemas.refs import Digest, parse_ref
from holdfast.streams.codec import StoredForm, decode_manifest, reseal
from holdfast.streams.hot import HotTier

if TYPE_CHECKING:
    from holdfast.client.store import Holdfast
    from holdfast.schemas.rows import ContextRow

LIMIT_BYTES: Final = 1024 * limits.MIB
"""How much is brought back at most, unless it is said: a day of many agents, in some seconds."""

_WINDOW: Final = 100
"""Contexts looked at together: of the largest that are stored whole, 50 MiB."""

_PARTS: Final = 64
_PAGE: Final = 500


class WarmReport(msgspec.Struct, kw_only=True):
    """What a filling did.  ``stored`` contexts (and ``parts`` of them, ``bytes`` in all) are hot now, ``hot`` were hot.

    ``failed`` could not be read; ``is_whole`` is false when the limit of bytes was reached before the time was.
    """

    stored: int = 0
    hot: int = 0
    parts: int = 0
    bytes: int = 0
    failed: int = 0
    is_whole: bool = True
    seconds: float = 0.0


class Warming:
    """One filling of one namespace.  ``limit_bytes`` bounds the stored bytes that are brought back."""

    def __init__(
        self,
        hf: Holdfast,
        *,
        kind: str | None = None,
        limit_bytes: int = LIMIT_BYTES,
        on_progress: Callable[[WarmReport], None] = lambda _: None,
    ) -> None:
        self.report = WarmReport()
        self._namespace = hf.namespace
        self._kind = kind
        self._limit_bytes = limit_bytes
        self._on_progress = on_progress
        self._hot = HotTier(hf.connection, cold=cold_chunks(hf.connection))
        self._resolver = ResolverClient(hf.connection, hf.namespace)

    async def run(self, since_ms: int) -> WarmReport:
        """Brings back what was stored at or after a time; everything is acknowledged when this returns.

        Raises UnavailableError when no resolver answers; the same call again goes on.
        """
        started = time.perf_counter()
        request: dict[str, Any] = {"since": since_ms, "limit": _PAGE}
        if self._kind is not None:
            request["kind"] = self._kind
        with Scratch() as seen:
            try:
                while self.report.is_whole:
                    answer = await self._resolver.call("recent", request)
                    digests = [parse_ref(item["ref"]).digest for item in answer["contexts"]]
                    for start in range(0, len(digests), _WINDOW):
                        window = await in_thread(_unseen(digests[start : start + _WINDOW], seen))
                        await self._take(window)
                        self._on_progress(self.report)
                    if answer["cursor"] is None:
                        break
                    request["cursor"] = answer["cursor"]
            finally:
                await self._hot.close()
        self.report.seconds = round(time.perf_counter() - started, 3)
        return self.report

    async def _take(self, digests: list[Digest]) -> None:
        if not (digests and self.report.is_whole):
            return
        hot, _ = await self._hot.get_stored_many(self._namespace, digests)
        absent = [digest for digest in digests if digest not in hot]
        cold, _ = await self._resolver.fetch(absent, cold=True)
        for digest in digests:
            row = hot.get(digest) or cold.get(digest)
            if row is None:
                self.report.failed += 1
            elif not await self._warm(row, is_hot=digest in hot):
                self.report.is_whole = False
                return

    async def _warm(self, row: ContextRow, *, is_hot: bool) -> bool:
        """Makes a context hot with all its parts; False when there is no room for it."""
        forms = [] if is_hot else await in_thread(lambda: _forms([row]))
        # The parts of a body that others share may have left the hot tier before it.
        lacking = await self._parts_not_hot(row) if row.form == "manifest" else []
        for start in range(0, len(lacking), _PARTS):
            digests = lacking[start : start + _PARTS]
            found, _ = await self._resolver.fetch(digests, cold=True)
            if len(found) < len(digests):
                self.report.failed += 1
                return True
            parts = await in_thread(lambda: _forms(found.values()))  # noqa: B023  awaited before the next turn
            if not await self._store(parts):
                return False
            self.report.parts += len(parts)
        if not await self._store(forms):
            return False
        self.report.stored += bool(forms or lacking)
        self.report.hot += not (forms or lacking)
        return True

    async def _store(self, forms: Sequence[StoredForm]) -> bool:
        size = sum(len(form.payload) for form in forms)
        if self.report.bytes + size > self._limit_bytes:
            return False
        if forms:
            await self._hot.store_forms(self._namespace, forms)
        self.report.bytes += size
        return True

    async def _parts_not_hot(self, row: ContextRow) -> list[Digest]:
        wanted = list(dict.fromkeys(decode_manifest(row.body).chunks))
        lacking: list[Digest] = []
        for start in range(0, len(wanted), _PARTS):
            some = wanted[start : start + _PARTS]
            held, _ = await self._hot.get_stored_many(self._namespace, some)
            lacking += [digest for digest in some if digest not in held]
        return lacking


def _unseen(digests: Sequence[Digest], seen: Scratch) -> Callable[[], list[Digest]]:
    """Returns what returns those digests that have not come before, each once."""

    def choose() -> list[Digest]:
        known = seen.find([digest_key(digest) for digest in digests])
        fresh = [digest for digest in dict.fromkeys(digests) if digest_key(digest) not in known]
        seen.add((digest_key(digest), b"") for digest in fresh)
        return fresh

    return choose


def _forms(rows: Iterable[ContextRow]) -> list[StoredForm]:
    return [StoredForm(row.digest, *reseal(row)) for row in rows]


__all__ = ["LIMIT_BYTES", "WarmReport", "Warming"]
