"""Memory that was freed, and that allocators keep for the thread that had it.

Arrow's allocator (mimalloc) keeps freed pages with the thread that used them, and nobody else can give them back: six
threads that had looked up a thousand contexts each left a process at 441 MiB, of which it used 110.  So whoever reads
row groups says how much (:func:`moved`), and every ``KEPT_BYTES`` its thread gives back what is free.  That
costs the next reads their pages: one cold look-up took 2.65 ms without it, 2.7 to 2.85 with 64 MiB, 3.1 with 16; a
thousand at once 96, 116 and 128.  What the archiver writes is not counted, since it uses again at once what that has
freed; what its thread reads is, by its index and its look-ups, as anybody's.

DuckDB's allocator (jemalloc) gives back what has been free for some seconds, but only while it is called, or with a
thread of its own: see ``allocator_background_threads`` in :mod:`holdfast.lake.duck`.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

import pyarrow as pa

KEPT_BYTES: Final = 64 * 1024 * 1024
"""How much a thread may read before it gives back what is free."""


class _Thread(threading.local):
    moved_bytes = 0


_thread: Final = _Thread()
_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


def moved(size_bytes: int) -> None:
    """Notes that this thread has read so much by way of Arrow; gives back what is free now and then."""
    _thread.moved_bytes += size_bytes
    if _thread.moved_bytes >= KEPT_BYTES:
        _thread.moved_bytes = 0
        pa.default_memory_pool().release_unused()


def give_back() -> None:
    """Gives back what this thread has freed, and what the C library keeps: after work that comes seldom."""
    _thread.moved_bytes = 0
    pa.default_memory_pool().release_unused()
    if _malloc_trim is not None:  # glibc
        _malloc_trim(0)


__all__ = ["KEPT_BYTES", "give_back", "moved"]
