"""The policies of a namespace's prefixes, as its clients see them: a named context that is read before every write."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.errors import NotFoundError
from holdfast.schemas.names import check_key
from holdfast.schemas.policies import DEFAULT_POLICIES, POLICIES_KEY, KeyPolicy, Policies, decode_policies

if TYPE_CHECKING:
    from holdfast.client.keys import Keys

POLICIES_S: Final = 10.0
"""How late a change of policies may be seen."""


class PrefixPolicies:
    """Reads and writes the policies through the named contexts of one namespace."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._read: tuple[float, Policies] | None = None

    async def get(self) -> Policies:
        """Returns the policies as they were at most ten seconds ago."""
        now_s = asyncio.get_running_loop().time()
        if self._read is None or now_s - self._read[0] > POLICIES_S:
            try:
                policies = decode_policies((await self._keys.get(POLICIES_KEY)).raw)
            except NotFoundError:
                policies = DEFAULT_POLICIES
            self._read = now_s, policies
        return self._read[1]

    async def set(self, prefix: str, policy: KeyPolicy | None) -> Policies:
        """Sets, or takes away, what holds for a prefix; returns all policies."""
        if prefix:
            check_key(prefix)

        def change(body: Any) -> Any:
            policies = decode_policies(msgspec.json.encode(body))
            prefixes = {name: kept for name, kept in policies.prefixes.items() if name != prefix}
            if policy is not None:
                prefixes[prefix] = policy
            return msgspec.to_builtins(msgspec.structs.replace(policies, prefixes=prefixes))

        default = msgspec.to_builtins(DEFAULT_POLICIES)
        written = await self._keys.update(POLICIES_KEY, change, default=default, kind="policies")
        policies = decode_policies(written.raw)
        self._read = asyncio.get_running_loop().time(), policies
        return policies
