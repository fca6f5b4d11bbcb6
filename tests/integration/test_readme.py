"""What the README shows works as it stands there."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.workers.settings import WORKERS, WorkerSettings
from holdfast.workers.system import run_workers

ROOT = Path(__file__).parents[2]


def _python_examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


async def _lines_printed(example: str, data: Path) -> list[str]:
    async with EmbeddedServer(ServerSettings(data=data)) as server:
        target = ConnectionTarget(url=server.info.nats_url, origin="the test")
        settings = WorkerSettings(lake=data / "lake", index=data / "index")
        async with run_workers(target, WORKERS, settings):
            environment = {**os.environ, "HOLDFAST_NATS_URL": server.info.nats_url}
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-c", example],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PRINTED = (
    ["0 planner plan:made {'steps': 3}", "book a flight 24 hot", "1 planner plan:checked {'ok': True}"],
    ["101 102 {'legs': [], 'to': 'Oslo'}"],
    ["topic:given", "  draft:made", "  topic:given:result", "[True]"],
)


@pytest.mark.parametrize(("example", "printed"), list(zip(_python_examples(), PRINTED, strict=True)))
async def test_python_examples_run_against_a_running_system(example: str, printed: list[str], tmp_path: Path) -> None:
    assert await _lines_printed(example, tmp_path) == printed


async def test_the_page_on_named_contexts_prints_what_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "named-contexts.md").read_text()
    [(example, printed)] = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert await _lines_printed(example, tmp_path) == printed.splitlines()


def test_readme_opens_with_the_two_commands() -> None:
    opening = (ROOT / "README.md").read_text()[:1200]
    assert "$ make demo" in opening
    assert "$ make test" in opening


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("name", ["lineage"])
async def test_the_example_of_a_page_runs(name: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert await _lines_printed(example, tmp_path) == []
