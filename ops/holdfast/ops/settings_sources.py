"""Where settings come from: a TOML file, environment variables, flags.  Each knows how to name a setting's place in
it and how to write a right value there, for messages.  What the settings are is not known here."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import msgspec

from holdfast.schemas.errors import ConfigurationError

CONFIG_FILE: Final = "holdfast.toml"
CONFIG_VARIABLE: Final = "HOLDFAST_CONFIG"
ENV_PREFIX: Final = "HOLDFAST_"

# HOLDFAST_ names that are not settings: where settings are, failpoints, tracebacks, keys of encryption (the SDK reads
# them, and they are nothing to show), the directory of checkpoints (the SDK reads it), and those of the test suite.
_RESERVED: Final = (
    CONFIG_VARIABLE,
    "HOLDFAST_FAILPOINTS",
    "HOLDFAST_DEBUG",
    "HOLDFAST_TRACES",
    "HOLDFAST_KEYS",
    "HOLDFAST_KEYS_FILE",
    "HOLDFAST_CHECKPOINTS",
)
_TEST_PREFIX: Final = "HOLDFAST_TEST_"


class SettingsSource(Protocol):
    """One source of settings."""

    @property
    def base(self) -> Path:
        """The directory that relative paths in this source start from."""
        ...

    @property
    def is_typed(self) -> bool:
        """Whether values have their types; if not, text stands for a number where one is wanted."""
        ...

    def read(self) -> dict[str, object]:
        """Returns the values that are set here, unchecked, by setting name.  Raises ConfigurationError."""
        ...

    def place(self, name: str) -> str:
        """Names where setting ``name`` stands."""
        ...

    def example(self, name: str, value: object) -> str:
        """Says how to set ``name`` to ``value`` here."""
        ...


class FileSource:
    """``holdfast.toml``, or another TOML file."""

    is_typed = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path.parent

    def read(self) -> dict[str, object]:
        """Returns the top-level keys of the file."""
        try:
            return tomllib.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            reason = (error.strerror or "not readable").lower()
            raise ConfigurationError(
                f"settings file {self.path} cannot be read: {reason}",
                field="config",
                hint="give an existing file with --config",
            ) from error
        except (ValueError, RecursionError) as error:
            # Beside what is no TOML: text that is not UTF-8, a number of over 4,300 digits, brackets without end.
            raise ConfigurationError(
                f"settings file {self.path} is not TOML: {str(error)[:300]}",
                field="config",
                hint="write lines like port = 4222",
            ) from error

    def place(self, name: str) -> str:
        """All settings of a file stand at its path."""
        return str(self.path)

    def example(self, name: str, value: object) -> str:
        """A line of TOML: of the values settings have, JSON writes the same."""
        return f"write {name} = {msgspec.json.encode(value).decode()}"


class EnvironmentSource:
    """Variables ``HOLDFAST_<NAME>``; an empty one counts as unset, as compose files and CI leave them."""

    is_typed = False

    def __init__(self, environ: Mapping[str, str], base: Path) -> None:
        self.environ = environ
        self.base = base

    def read(self) -> dict[str, object]:
        """Returns the variables with the prefix, but for those that are no settings."""
        values: dict[str, object] = {}
        for variable in sorted(self.environ):
            if not variable.startswith(ENV_PREFIX) or variable.startswith(_TEST_PREFIX) or variable in _RESERVED:
                continue
            if self.environ[variable]:
                values[variable.removeprefix(ENV_PREFIX).lower()] = self.environ[variable]
        return values

    def place(self, name: str) -> str:
        """The variable's name."""
        return ENV_PREFIX + name.upper()

    def example(self, name: str, value: object) -> str:
        """An assignment, as in a shell."""
        return f"set {self.place(name)}={value}"


class FlagSource:
    """Flags of the command line, by setting name; None stands for a flag that was not given."""

    is_typed = False

    def __init__(self, flags: Mapping[str, object], base: Path) -> None:
        self.flags = flags
        self.base = base

    def read(self) -> dict[str, object]:
        """Returns the flags that were given."""
        return {name: value for name, value in self.flags.items() if value is not None}

    def place(self, name: str) -> str:
        """The flag, as it is typed."""
        return "--" + name.replace("_", "-")

    def example(self, name: str, value: object) -> str:
        """The flag with a value."""
        return f"give {self.place(name)} {value}"


def find_config(config: Path | None, environ: Mapping[str, str], cwd: Path) -> Path | None:
    """Returns the settings file: ``config``, else what ``HOLDFAST_CONFIG`` names, else ``holdfast.toml`` in ``cwd``
    if there is one, else None.  A file that was named is returned even if it does not exist: reading it says so."""
    if config is not None:
        return cwd / config.expanduser()
    if named := environ.get(CONFIG_VARIABLE):
        return cwd / Path(named).expanduser()
    path = cwd / CONFIG_FILE
    return path if path.is_file() else None
