"""The layout's promises: one namespace over several source roots, typed, in small modules, the SDK light.

See docs/adr/0001-one-namespace-over-source-roots.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORTIONS = {
    "schemas": ("schemas",),
    "streams": ("streams", "client"),
    "workers": ("workers", "lake"),
    "ops": ("ops",),
}
PORTION_PATHS = [
    pytest.param(ROOT / root / "holdfast" / portion, id=f"holdfast.{portion}")
    for root, portions in PORTIONS.items()
    for portion in portions
]
MAX_MODULE_LINES = 500


@pytest.mark.parametrize("root", PORTIONS)
def test_namespace_has_no_init_module(root: str) -> None:
    """An ``__init__.py`` in one root would hide the portions of all others."""
    assert not (ROOT / root / "__init__.py").exists()
    assert not (ROOT / root / "holdfast" / "__init__.py").exists()


@pytest.mark.parametrize(("root", "portions"), PORTIONS.items())
def test_roots_hold_the_known_portions_alone(root: str, portions: tuple[str, ...]) -> None:
    found = {path.name for path in (ROOT / root / "holdfast").iterdir() if path.name != "__pycache__"}
    assert found == set(portions)


@pytest.mark.parametrize("portion", PORTION_PATHS)
def test_portion_is_a_typed_package(portion: Path) -> None:
    assert (portion / "__init__.py").is_file()
    assert (portion / "py.typed").is_file()


@pytest.mark.parametrize("portion", PORTION_PATHS)
def test_modules_stay_small(portion: Path) -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in portion.rglob("*.py")}
    too_long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MAX_MODULE_LINES}
    assert not too_long, f"over {MAX_MODULE_LINES} lines, split by responsibility: {too_long}"


def test_sdk_import_loads_no_part_of_the_lake() -> None:
    """A fresh interpreter, because this one may have imported anything already."""
    loaded = _modules_after("from holdfast.client import connect")
    assert not loaded & {"pyarrow", "duckdb", "deltalake", "lmdb", "holdfast.lake"}


def test_lake_import_loads_no_nats() -> None:
    loaded = _modules_after("import holdfast.lake")
    assert not loaded & {"nats", "holdfast.streams", "holdfast.client"}


def _modules_after(statement: str) -> set[str]:
    """Returns the names of all modules loaded by ``statement``, run outside the checkout."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
