"""What holds for the named contexts under a prefix: the body of the named context ``holdfast.policies``.

::

    {"v": 1, "prefixes": {"store.": {"ttl_s": 86400, "max_versions": 10, "encrypt": false}}}

A namespace has one such body at most, written like any other named context.  A prefix is the beginning of a key's text;
``""`` is that of every key.  Each member is taken from the longest prefix that sets it, so a policy for ``store.eu.``
that sets ``ttl_s`` alone leaves the ``max_versions`` of ``store.`` in force.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, TooLargeError
from holdfast.schemas.undecodable import UNDECODABLE

POLICIES_KEY: Final = "holdfast.policies"
"""The key of the named context that holds a namespace's policies."""

POLICIES_BYTES: Final = 256 * limits.KIB
"""Largest body of policies: they are read before every write."""

STORE_PREFIX: Final = "store."
STORE_MAX_VERSIONS: Final = 10
"""How many versions of a stored context stay in the hot tier when no policy says otherwise."""

_MOST_VERSIONS: Final = 1_000_000_000
_Prefix = Annotated[str, Meta(max_length=limits.KEY_BYTES)]


class KeyPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What holds for the keys under one prefix.  None says nothing: a shorter prefix may."""

    ttl_s: Annotated[float, Meta(ge=0, le=limits.TTL_S)] | None = None
    """Seconds to live of a version whose writer gives none; 0: for ever."""

    max_versions: Annotated[int, Meta(ge=0, le=_MOST_VERSIONS)] | None = None
    """Versions that stay in the hot tier once they are archived; 0: as many as are younger than the hot window.  The
    lake keeps them all."""

    encrypt: bool | None = None
    """Whether bodies are encrypted when their writer does not say."""


class Policies(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The policies of one namespace, by prefix."""

    v: Literal[1] = 1
    prefixes: dict[_Prefix, KeyPolicy] = {}

    def policy_for(self, key: str) -> KeyPolicy:
        """Returns what holds for ``key``, the built-in defaults included.

        Here a 0 has become None: ``ttl_s`` and ``max_versions`` are above 0, or there is no limit.
        """
        policy = self.prefixes
        ttl_s: float | None = None
        max_versions: int | None = None
        encrypt: bool | None = None
        # From the longest on: the first to set a member decides it.
        for prefix in sorted((p for p in {STORE_PREFIX, *policy} if key.startswith(p)), key=len, reverse=True):
            found = policy.get(prefix, _NOTHING)
            ttl_s = found.ttl_s if ttl_s is None else ttl_s
            max_versions = found.max_versions if max_versions is None else max_versions
            if max_versions is None and prefix == STORE_PREFIX:
                max_versions = STORE_MAX_VERSIONS
            encrypt = found.encrypt if encrypt is None else encrypt
        return KeyPolicy(ttl_s=ttl_s or None, max_versions=max_versions or None, encrypt=encrypt)


_NOTHING: Final = KeyPolicy()
_DECODER: Final = msgspec.json.Decoder(Policies)

DEFAULT_POLICIES: Final = Policies()
"""What holds in a namespace that has no policies of its own."""


def decode_policies(body: bytes) -> Policies:
    """Returns the policies that a body holds; raises InvalidFieldError, or TooLargeError, when it holds none."""
    if len(body) > POLICIES_BYTES:
        raise TooLargeError(
            f"policies have {len(body)} bytes, the limit is {POLICIES_BYTES}", field="policies", limit=POLICIES_BYTES
        )
    try:
        return _DECODER.decode(body)
    except UNDECODABLE as error:
        raise InvalidFieldError(
            f"the policies in {POLICIES_KEY} do not decode: {error}",
            field="policies",
            hint='write {"v": 1, "prefixes": {"<prefix>": {"ttl_s": …, "max_versions": …, "encrypt": …}}}',
        ) from error
