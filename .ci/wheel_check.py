"""Builds the distribution and proves that what users install is what we mean to ship.

sdist, wheel made from that sdist, its contents; then, outside the checkout and in empty environments: the base
install (the SDK alone), the ``lake`` extra (a notebook's view of the data), the ``server`` extra (the command line).
Needs the ``build`` package; otherwise the standard library.  Exit status 0 only if everything holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORTIONS = ("client", "lake", "ops", "schemas", "streams", "workers")

SDK_ALONE = """
import sys
from importlib.util import find_spec

from holdfast.client import connect
import holdfast.client, holdfast.schemas, holdfast.streams

heavy = [name for name in ("pyarrow", "duckdb", "deltalake", "lmdb") if name in sys.modules]
assert not heavy, f"importing the SDK loaded {heavy}"
assert callable(connect)
for name in ("schemas", "streams", "workers", "ops", "client", "lake"):
    assert find_spec(name) is None, f"the wheel installs a top-level package called {name}"
try:
    import schemas
except ImportError:
    pass
else:
    raise AssertionError("import schemas must fail")
"""

NOTHING_HEAVY_INSTALLED = """
from importlib.util import find_spec

present = [name for name in ("pyarrow", "duckdb", "deltalake", "lmdb", "typer") if find_spec(name)]
assert not present, f"the base install brings {present}"
"""

LAKE = """
import sys

import holdfast.lake
from holdfast.lake import connect

assert callable(connect)
assert "nats" not in sys.modules, "importing the lake loaded nats"
"""


def main() -> None:
    """Runs all checks; raises at the first that does not hold."""
    with tempfile.TemporaryDirectory(prefix="holdfast-wheel-") as name:
        scratch = Path(name)
        wheel = build(scratch / "dist")
        check_contents(wheel)
        report("wheel holds every portion, each marked as typed, and nothing else")

        base = make_environment(scratch / "base", f"{wheel}")
        run_python(base, SDK_ALONE)
        run_python(base, NOTHING_HEAVY_INSTALLED)
        report("base install: the SDK imports, without any part of the lake")

        lake = make_environment(scratch / "lake", f"{wheel}[lake]")
        run_python(lake, LAKE)
        run_python(lake, SDK_ALONE)
        report("lake extra: holdfast.lake imports without nats, the SDK still without the lake")

        install(lake, f"{wheel}[server]")
        run([str(lake / "bin" / "holdfast"), "--help"], cwd="/")
        report("server extra: the command line answers")


def build(out: Path) -> Path:
    """Returns the wheel, built from the sdist so that the sdist is proven complete."""
    run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)])
    (wheel,) = out.glob("*.whl")
    report(f"built {wheel.name} ({wheel.stat().st_size // 1024} KiB) from its sdist")
    return wheel


def check_contents(wheel: Path) -> None:
    """Requires all portions with their markers, no ``holdfast/__init__.py``, and nothing at the top level."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    foreign = sorted({name.split("/")[0] for name in names if not name.startswith(("holdfast/", "holdfast-"))})
    missing = [
        path
        for portion in PORTIONS
        for path in (f"holdfast/{portion}/__init__.py", f"holdfast/{portion}/py.typed")
        if path not in names
    ]
    if foreign or missing or "holdfast/__init__.py" in names:
        raise SystemExit(
            f"wheel {wheel.name}: top-level names that do not belong there: {foreign}; missing: {missing}; "
            f"holdfast/__init__.py present: {'holdfast/__init__.py' in names}"
        )


def make_environment(path: Path, requirement: str) -> Path:
    """Returns a new virtual environment with ``requirement`` installed."""
    run([sys.executable, "-m", "venv", str(path)])
    install(path, requirement)
    return path


def install(environment: Path, requirement: str) -> None:
    run([str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", requirement])


def run_python(environment: Path, code: str) -> None:
    """Runs ``code`` isolated (-I) and from ``/``, so that nothing of the checkout can be imported."""
    run([str(environment / "bin" / "python"), "-I", "-c", code], cwd="/")


def run(command: list[str], cwd: str | None = None) -> None:
    """Runs a command quietly; on failure shows its output and ends the check."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nexit status {done.returncode}: {' '.join(command)}")


def report(fact: str) -> None:
    print(f"wheel-check: {fact} [{time.perf_counter() - STARTED:.1f} s]", flush=True)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
