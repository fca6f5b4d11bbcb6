"""The policies of every namespace, for workers: read hot, else from the lake, kept for some seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from holdfast.schemas.errors import HoldfastError, NotFoundError, RetryError
from holdfast.schemas.policies import DEFAULT_POLICIES, POLICIES_BYTES, POLICIES_KEY, Policies, decode_policies
from holdfast.schemas.refs import parse_ref
from holdfast.streams.key_log import KeyLog
from holdfast.workers.contexts import ColdReader, ContextReader
from holdfast.workers.key_reader import ColdKeys

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier

logger = logging.getLogger(__name__)

KEPT_S: Final = 10.0
"""How late a change of policies may be seen."""

_NAMESPACES: Final = 1_000
"""Most namespaces whose policies are kept."""


class PolicyReader:
    """Tells what the policies of a namespace say of a key."""

    def __init__(self, connection: Connection, hot: HotTier, lake: Lake, index: LakeIndex) -> None:
        self._log = KeyLog(connection)
        self._cold_keys = ColdKeys(lake, index)
        self._cold = ColdReader(lake, index)
        self._contexts = ContextReader(hot, self._cold)
        self._kept: OrderedDict[str, tuple[float, Policies | None]] = OrderedDict()

    async def max_versions(self, namespace: str, key: str) -> int | None:
        """Returns how many versions of a key stay hot, None when there is no limit.

        Policies that cannot be read are told in the log and limit nothing.  Raises RetryError when they cannot be
        looked up now.
        """
        policies = await self._policies(namespace)
        return None if policies is None else policies.policy_for(key).max_versions

    async def close(self) -> None:
        """Waits for what is under way and closes the files of the lake."""
        await self._cold.close()
        await self._cold_keys.close()
        await self._log.close()

    async def _policies(self, namespace: str) -> Policies | None:
        kept = self._kept.get(namespace)
        if kept is not None and time.monotonic() - kept[0] < KEPT_S:
            return kept[1]
        try:
            policies: Policies | None = await self._read(namespace)
        except RetryError:
            raise
        except HoldfastError as error:
            logger.warning(
                "policies cannot be read: no limit holds",
                extra={"action": "policies_broken", "namespace": namespace, "error": str(error)},
            )
            policies = None
        self._kept[namespace] = time.monotonic(), policies
        self._kept.move_to_end(namespace)
        if len(self._kept) > _NAMESPACES:
            self._kept.popitem(last=False)
        return policies

    async def _read(self, namespace: str) -> Policies:
        head = (await self._log.head(namespace, POLICIES_KEY)).row or await self._cold_keys.last(
            namespace, POLICIES_KEY
        )
        if head is None or head.ref is None or head.op in ("delete", "expire"):
            return DEFAULT_POLICIES
        digest = parse_ref(head.ref).digest
        found, failed = await self._contexts.get_many(namespace, [digest], max_bytes=POLICIES_BYTES)
        if digest in failed:
            raise failed[digest]
        if digest not in found:
            raise NotFoundError(f"the body of {POLICIES_KEY}, {head.ref}, is stored nowhere")
        return await asyncio.to_thread(decode_policies, found[digest].row.body)
