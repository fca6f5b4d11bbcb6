"""The policies of a namespace's prefixes, as its clients see them: a named context that is read before every write."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.key_arguments import check_prefix
from holdfast.client.lineage import within
from holdfast.schemas.errors import InvalidFieldError, NotFoundError
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
        self._reading = asyncio.Lock()

    async def get(self) -> Policies:
        """Returns the policies as they were at most ten seconds ago."""
        read = self._read
        if read is None or not _is_fresh(read):
            # Once for all writers that wait for them.
            async with self._reading:
                read = self._read
                if read is None or not _is_fresh(read):
                    now_s = asyncio.get_running_loop().time()
                    self._read = read = now_s, await self._stored()
        return read[1]

    async def set(self, prefix: str, policy: KeyPolicy | None) -> Policies:
        """Sets, or takes away, what holds for a prefix; returns all policies."""
        check_prefix(prefix)
        if policy is not None:
            _check(prefix, policy)

        def change(body: Any) -> Any:
            policies = decode_policies(msgspec.json.encode(body))
            prefixes = {name: kept for name, kept in policies.prefixes.items() if name != prefix}
            if policy is not None:
                prefixes[prefix] = policy
            changed = msgspec.structs.replace(policies, prefixes=prefixes)
            # Read again before it is stored: what cannot be would stop every write of the namespace.
            return msgspec.to_builtins(decode_policies(msgspec.json.encode(changed)))

        default = msgspec.to_builtins(DEFAULT_POLICIES)
        written = await self._keys.update(POLICIES_KEY, change, default=default, kind="policies")
        now_s, policies = asyncio.get_running_loop().time(), decode_policies(written.raw)
        # A get that is under way may have read what was before: what it remembers must not come last.
        async with self._reading:
            self._read = now_s, policies
        return policies

    async def _stored(self) -> Policies:
        try:
            with within(None):  # no event asked for it
                return decode_policies((await self._keys.get(POLICIES_KEY)).raw)
        except NotFoundError:
            return DEFAULT_POLICIES


def _check(prefix: str, policy: KeyPolicy) -> None:
    """Raises unless a policy, which Python makes unchecked, can be read: a wrong one would stop every write."""
    try:
        msgspec.convert(msgspec.to_builtins(policy), KeyPolicy)
    except msgspec.ValidationError as error:
        raise InvalidFieldError(
            f"the policy of {prefix!r} cannot be: {error}", field="policy", hint="a ttl_s of 0 stands for no end"
        ) from error


def _is_fresh(read: tuple[float, Policies]) -> bool:
    return asyncio.get_running_loop().time() - read[0] <= POLICIES_S
