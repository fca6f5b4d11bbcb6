"""A process of its own that archives the stream of contexts when it is asked to, for the memory that this takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.archived import archive_stream
from benchmarks.bench import target_of
from benchmarks.children import serve
from benchmarks.event_loop import default_loop, run_on_loop
from holdfast.streams.connection import open_connection


async def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    async with open_connection(target_of(arguments.url), name="bench-archiver") as connection:

        async def archive(request: dict[str, Any]) -> dict[str, Any]:
            await archive_stream(connection, arguments.data, rows_per_commit=request["rows_per_commit"])
            return {}

        await serve({"ready": True}, archive)


if __name__ == "__main__":
    run_on_loop(default_loop(), main())
