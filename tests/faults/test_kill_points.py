"""SIGKILL at random moments of a worker's cycles: a short run of the campaign."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]


def test_workers_killed_at_any_moment_lose_and_double_nothing() -> None:
    command = [sys.executable, "-m", "tests.campaigns.kill_points", "--kills", "15", "--processes", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] == 15
    assert told["violations"] == 0
    assert told["acknowledged"] > 100
