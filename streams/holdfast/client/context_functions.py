"""Storing and reading contexts by plain functions, with one shared client for each event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakKeyDictionary

from holdfast.client.context_client import ContextClient

if TYPE_CHECKING:
    from holdfast.client.context_model import StoredContext
    from holdfast.client.context_options import OptionMap, StoreOptions

_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, ContextClient] = WeakKeyDictionary()


def shared_context_client() -> ContextClient:
    """Returns the context client of the running event loop that the quick functions use; it ends with the loop."""
    loop = asyncio.get_running_loop()
    client = _shared.get(loop)
    if client is None or client.is_closed:
        client = _shared[loop] = ContextClient()
    return client


async def store_context(
    key: str, data: Any, options: OptionMap | None = None, **more: Unpack[StoreOptions]
) -> StoredContext:
    """Stores a context with the shared client of this event loop; see :meth:`ContextClient.store`."""
    return await shared_context_client().store(key, data, options, **more)


async def get_context(key: str) -> StoredContext | None:
    """Returns a context with the shared client of this event loop; see :meth:`ContextClient.get`."""
    return await shared_context_client().get(key)


async def update_context(
    key: str, data: Any, options: OptionMap | None = None, **more: Unpack[StoreOptions]
) -> StoredContext:
    """Changes a context with the shared client of this event loop; see :meth:`ContextClient.update`."""
    return await shared_context_client().update(key, data, options, **more)


storeContext, getContext, updateContext = store_context, get_context, update_context  # noqa: N816  names of old code

__all__ = [
    "getContext",
    "get_context",
    "shared_context_client",
    "storeContext",
    "store_context",
    "updateContext",
    "update_context",
]
