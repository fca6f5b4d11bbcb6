"""Parquet files of the lake, read by the thread that asks and by no other.

Arrow would read ahead in a pool of threads and decode columns in another.  What such a thread has allocated stays with
it after it was freed (:mod:`holdfast.lake.memory`), and nobody can make it give that back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

_BATCH_ROWS: Final = 65_536


def open_parquet(source: Path | Any, *, checks_pages: bool = True) -> Any:
    """Opens a file, or an Arrow file that is open, as a ``ParquetFile``: a context manager, for :func:`read_group`.

    ``checks_pages``: every page is compared with its checksum when it is read.  Raises what Arrow raises.
    """
    return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=checks_pages)


def read_group(parquet: Any, number: int, columns: Sequence[str] | None = None) -> Any:
    """Returns a row group as an Arrow table."""
    return parquet.read_row_group(number, columns=columns, use_threads=False)


def read_batches(parquet: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Yields columns of a whole file as record batches."""
    yield from parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False)


def read_columns(path: Path, columns: Sequence[str]) -> Any:
    """Returns columns of a whole file as an Arrow table."""
    with open_parquet(path, checks_pages=False) as parquet:
        return parquet.read(columns=columns, use_threads=False)
