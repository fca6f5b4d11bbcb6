"""What the demo's agents do to a module's source."""

from __future__ import annotations

import ast
import gc
import sys
import threading
from pathlib import Path

from holdfast.ops.demo import library


class _Finalized:
    """Garbage whose collection runs Python code, and so may let another thread in."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        sum(range(200))


def test_two_agents_may_parse_at_once() -> None:
    """On CPython 3.11 without a lock some of these end in a SystemError: a finalizer runs while a tree is built."""
    sources = [path.read_text(errors="ignore") for path in sorted(Path(ast.__file__).parent.glob("*.py"))[:30]]
    errors: list[SystemError] = []

    def parse_all() -> None:
        for source in sources:
            _Finalized()
            try:
                library.parse_module(source)
            except SystemError as error:
                errors.append(error)

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    threads = [threading.Thread(target=parse_all) for _ in range(4)]
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(50, 2, 2)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)

    assert errors == []
