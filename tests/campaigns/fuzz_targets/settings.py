"""Settings from a file of TOML: whatever it says, it is read or refused, and no setting is a number that is none.

Holds no tests itself.
"""

from __future__ import annotations

import math
import random
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec

from holdfast.ops.settings import Settings, load_settings
from tests.campaigns import fuzz_inputs as make
from tests.campaigns.fuzz_targets.target import attempt


class Toml:
    """A settings file, written anew for each input."""

    @cached_property
    def path(self) -> Path:
        folder = tempfile.mkdtemp(prefix="holdfast-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        return Path(folder) / "holdfast.toml"

    def remove(self) -> None:
        path: Path | None = self.__dict__.pop("path", None)
        if path is not None:
            path.unlink(missing_ok=True)
            path.parent.rmdir()


TOML: Final = Toml()
_SETTINGS: Final = [field.name for field in msgspec.structs.fields(Settings)]


def make_toml(rng: random.Random) -> bytes:
    lines: list[bytes] = []
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(_SETTINGS).encode() if rng.random() < 0.85 else make.text(rng).encode("utf-8", "replace")
        value = rng.choice((b"1", b"-1", b"0.5", b"nan", b"inf", b"true", b'"durable"', b'"x"', b"[1]", b"{a=1}",
                            b"2026-01-01", b"1e400", b"9" * 30, b"9" * 5_000, b'"\\u0000"', b'"nats://u:p@h:1"',
                            b'"' + b"x" * 5_000 + b'"'))  # fmt: skip
        lines.append(name + b" = " + value)
    raw = b"\n".join(lines)
    if rng.randrange(3_000) == 0:
        return b"a = " + b"[" * 100_000
    return raw if rng.random() < 0.7 else make.mutated(rng, raw)


def check_toml(given: bytes) -> str:
    TOML.path.write_bytes(given)

    def whole() -> None:
        loaded = load_settings(config=TOML.path, environ={}, cwd=TOML.path.parent)
        for value in msgspec.structs.astuple(loaded.settings):
            assert not isinstance(value, float) or math.isfinite(value), "a setting that is no number"

    return attempt(whole)
