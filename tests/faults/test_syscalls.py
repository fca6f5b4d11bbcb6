"""A cycle killed before its system calls: some of the points of the campaign, and that the campaign would notice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns.tracer import CALLS

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]

# Files made, written, synced, renamed and removed by five threads at once: 25 calls, whoever counts.
THREADS = """
import os, sys, threading
def work():
    def one(name):
        with open(name, "wb") as file:
            file.write(b"a")
            file.flush()
            os.fsync(file.fileno())
        os.rename(name, name + ".placed")
        os.unlink(name + ".placed")
    threads = [threading.Thread(target=one, args=[f"{sys.argv[1]}/{n}"]) for n in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""
TRACED = f"""
{THREADS}
import json
from tests.campaigns.tracer import run_traced
ends = [run_traced(work)] + [run_traced(work, kill_at=number) for number in (1, 13, 25, 26)]
named = run_traced(work, kill_at=3, of="fsync file")
print(json.dumps([[end.status, len(end.calls)] for end in ends] + [[named.status, named.calls.count("fsync file")]]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on its own: the tests' process has threads, and must not fork."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def traceable() -> None:
    asked = run("-c", "from tests.campaigns.tracer import why_not; print(why_not())")
    assert asked.returncode == 0, asked.stderr
    if asked.stdout.strip() != "None":
        pytest.skip(asked.stdout.strip())


def sweep(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs the campaign; returns its exit code, its last line and all it said."""
    done = run("-m", "tests.campaigns.syscalls", "--processes", "1", "--json", *arguments)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_calls_of_all_threads_are_counted_in_one_row(tmp_path: Path) -> None:
    done = run("-c", TRACED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 25], [-9, 0], [-9, 12], [-9, 24], [0, 25], [-9, 2]]


def test_strace_counts_the_same_calls(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    told = tmp_path / "told"
    wanted = ",".join(f"?{name}" for name in CALLS)
    program = [sys.executable, "-c", f"{THREADS}\nwork()", str(tmp_path)]
    done = subprocess.run(
        [strace, "-f", "-y", "-e", f"trace={wanted}", "-o", str(told), *program], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("strace may not trace here")
    lines = [line for line in told.read_text().splitlines() if f"{tmp_path}/" in line and "resumed" not in line]
    assert len([line for line in lines if "O_RDONLY" not in line]) == 25, lines


def test_cycles_killed_before_a_commit_lose_and_double_nothing_and_a_wrong_one_is_caught() -> None:
    # At each commit's own call; the third cycle purges before it archives, so that there is something to find.
    cycles = ["archive", "compact", "planted"]
    code, done, said = sweep(*(f"--cycle={name}" for name in cycles), "--before", "linkat", "--stride", "3")
    assert code == 5
    found = {name: (done["cycles"][name]["points"], done["cycles"][name]["violations"] > 0) for name in cycles}
    assert found == {"archive": (1, False), "compact": (1, False), "planted": (1, True)}, said
    assert re.search(r"planted, linkat 1: as left: I1 \w+: ", said), said


@pytest.mark.slow
@pytest.mark.parametrize(("cycle", "stride"), [("trim", 43), ("expire", 5)])
def test_every_cycle_killed_before_some_of_its_calls_loses_and_doubles_nothing(cycle: str, stride: int) -> None:
    code, done, said = sweep("--cycle", cycle, "--from", "5", "--stride", str(stride))
    assert code == 0, said
    assert done["points"] >= 1
