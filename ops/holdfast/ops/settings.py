"""The settings of the command line and the workers: read once at the edge, then passed on as a value.

Three sources are merged, each stronger than the one before it: ``holdfast.toml`` (in the working directory, or the
file that ``--config`` or ``HOLDFAST_CONFIG`` names), environment variables (``HOLDFAST_PORT`` sets ``port``), flags.
An empty variable counts as unset.  An unknown key and a bad value are errors that name the key and its source.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta

from holdfast.ops.settings_sources import EnvironmentSource, FileSource, FlagSource, SettingsSource, find_config
from holdfast.schemas.errors import ConfigurationError, InvalidNameError
from holdfast.schemas.names import check_namespace
from holdfast.streams.connection_target import Durability, mask_url, split_servers
from holdfast.streams.local_server import default_data_directory

DEFAULT_SOURCE: Final = "default"

HOT_WINDOW_S: Final = 86_400.0
"""A day: agents that resume work the next morning still read from memory-mapped blocks, not from the lake."""
HOT_MESSAGES: Final = 1_000_000
"""Half a gigabyte of the server's memory, which keeps a name for each."""
ARCHIVE_INTERVAL_S: Final = 5.0
"""An idle trickle reaches the lake in seconds; below this, commits are many and files tiny."""
ARCHIVE_ROWS: Final = 50_000
"""A full batch is archived at once: some seconds of full load, some tens of MB in memory."""
HANDLER_BYTES: Final = 1_073_741_824
"""Some million events: a handler that is away for a day or so of them finds them where it left off."""
COMPACT_INTERVAL_S: Final = 300.0
"""Sixty archive cycles: few enough small files that a query over the newest does not feel them."""
SCRUB_INTERVAL_S: Final = 86_400.0
"""A day: rot is found while the streams, which keep a day, still hold the rows that it took."""
SCRUB_BYTES_PER_S: Final = 33_554_432
"""A quarter of a slow disk; a lake of a terabyte takes nine hours."""
BACKUP_INTERVAL_S: Final = 21_600.0
"""Six hours: what a lost disk costs at most where there is no second copy."""
BACKUP_RETENTION_S: Final = 2_592_000.0
"""Thirty days: a mistake that is noticed after the holidays can still be undone."""
DRAIN_TIMEOUT_S: Final = 10.0
"""As long as container runtimes wait by default between SIGTERM and SIGKILL."""
START_TIMEOUT_S: Final = 60.0
"""Recovery of 1 M messages takes about a second; a cold disk and a large store take more."""
STOP_TIMEOUT_S: Final = 10.0

_YEARS_10_S: Final = 315_360_000
_URL_SETTINGS: Final = ("nats_url", "nats_monitor_url")
_PATH_SETTINGS: Final = ("data", "nats_creds", "backup_directory", "copy_directory")
_ALTERNATIVES: Final = {"nats_url": "nats_context", "nats_context": "nats_url"}

Seconds = Annotated[float, Meta(ge=0, le=_YEARS_10_S, examples=[30])]
Period = Annotated[float, Meta(gt=0, le=_YEARS_10_S, examples=[30])]
Port = Annotated[int, Meta(ge=0, le=65_535, examples=[4222])]
StoreBytes = Annotated[int, Meta(ge=1_048_576)]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every setting with its default.  Paths are absolute after :func:`load_settings`."""

    data: Annotated[str, Meta(description="the data directory", examples=["/var/lib/holdfast"])]
    nats_url: Annotated[
        str | None, Meta(description="NATS server to use instead of an embedded one", examples=["nats://host:4222"])
    ] = None
    nats_creds: Annotated[str | None, Meta(description="NATS credentials file", examples=["/etc/nats/me.creds"])] = None
    nats_context: Annotated[
        str | None, Meta(description="context of the NATS command line, or @selected", examples=["prod"])
    ] = None
    nats_monitor_url: Annotated[
        str | None,
        Meta(
            description="monitoring address of nats_url, of a cluster one for each node, to verify their durability",
            examples=["http://host:8222"],
        ),
    ] = None
    replicas: Annotated[
        int, Meta(ge=1, le=5, description="copies of each stream, each on another node of a cluster", examples=[3])
    ] = 1
    durability: Annotated[Durability, Meta(description="sync to disk before each acknowledgement?")] = "durable"
    port: Annotated[Port, Meta(description="port of the embedded server; 0 takes a free one")] = 0
    monitor_port: Annotated[Port, Meta(description="its monitoring port; 0 takes a free one", examples=[8222])] = 0
    max_store_bytes: Annotated[
        StoreBytes | None, Meta(description="most bytes of its streams on disk", examples=[10_737_418_240])
    ] = None
    start_timeout_s: Annotated[Period, Meta(description="longest start of the embedded server")] = START_TIMEOUT_S
    stop_timeout_s: Annotated[Period, Meta(description="its longest clean stop, then it is killed")] = STOP_TIMEOUT_S
    namespace: Annotated[str, Meta(description="namespace of commands that name none", examples=["default"])] = (
        "default"
    )
    hot_window_s: Annotated[Seconds, Meta(description="how long archived data stays hot", examples=[86_400])] = (
        HOT_WINDOW_S
    )
    hot_messages: Annotated[
        int, Meta(ge=0, description="most contexts, and parts of large ones, that stay hot", examples=[1_000_000])
    ] = HOT_MESSAGES
    archive_interval_s: Annotated[Period, Meta(description="longest wait for a full batch", examples=[5])] = (
        ARCHIVE_INTERVAL_S
    )
    archive_rows: Annotated[
        int, Meta(ge=1, le=1_000_000, description="rows that make a batch full", examples=[50_000])
    ] = ARCHIVE_ROWS
    handler_bytes: Annotated[
        int, Meta(ge=0, description="most bytes of the event log kept for handlers that are behind", examples=[10**9])
    ] = HANDLER_BYTES
    compact_interval_s: Annotated[Period, Meta(description="time between two compactions", examples=[300])] = (
        COMPACT_INTERVAL_S
    )
    scrub_interval_s: Annotated[
        Period, Meta(description="how often every file of the lake is read again and compared", examples=[86_400])
    ] = SCRUB_INTERVAL_S
    scrub_bytes_per_s: Annotated[
        int, Meta(ge=65_536, description="how much of the lake the scrub reads in a second", examples=[33_554_432])
    ] = SCRUB_BYTES_PER_S
    backup_directory: Annotated[
        str | None, Meta(description="where the janitor makes backups", examples=["/mnt/other-disk/backups"])
    ] = None
    backup_interval_s: Annotated[Period, Meta(description="time between two backups", examples=[21_600])] = (
        BACKUP_INTERVAL_S
    )
    backup_retention_s: Annotated[
        Period, Meta(description="how long backups are kept; the newest always", examples=[2_592_000])
    ] = BACKUP_RETENTION_S
    copy_directory: Annotated[
        str | None, Meta(description="a second copy of the lake, on another disk", examples=["/mnt/other-disk/copy"])
    ] = None
    drain_timeout_s: Annotated[Seconds, Meta(description="longest drain of a worker at its stop")] = DRAIN_TIMEOUT_S
    log_level: Annotated[LogLevel, Meta(description="least severe log lines shown")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="form of log lines")] = "text"

    @property
    def data_path(self) -> Path:
        """``data`` as a path."""
        return Path(self.data)


class LoadedSettings(msgspec.Struct, frozen=True):
    """Settings and, for each, its source: ``default``, a file's path, a variable's name or a flag."""

    settings: Settings
    sources: dict[str, str]


class SettingLine(msgspec.Struct, frozen=True):
    """One line of ``holdfast config``: the effective value with its secrets masked."""

    name: str
    value: str
    source: str
    description: str


_FIELDS: Final = {field.name: field for field in msgspec.structs.fields(Settings)}


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> LoadedSettings:
    """Returns the merged settings and their sources.

    ``flags`` are those given on the command line, by setting name; a None is a flag that was not given.  ``config``
    must exist; ``holdfast.toml`` in ``cwd`` need not.  A relative path in a file is relative to that file, elsewhere
    to ``cwd``.  Raises ConfigurationError.
    """
    env = os.environ if environ is None else environ
    base = Path.cwd() if cwd is None else cwd
    path = find_config(config, env, base)
    layers: list[SettingsSource] = [EnvironmentSource(env, base), FlagSource(flags or {}, base)]
    if path is not None:
        layers.insert(0, FileSource(path))
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for source in layers:
        layer = source.read()
        _check_alternatives(layer, source)
        for name, value in layer.items():
            values[name] = _check(name, value, source)
            sources[name] = source.place(name)
            # One server is named: by the strongest source that names any, whichever way it does.
            if (other := _ALTERNATIVES.get(name)) is not None:
                values.pop(other, None)
                sources.pop(other, None)
    if "data" not in values:
        values["data"] = str(default_data_directory(env))
    settings = msgspec.convert(values, Settings)
    return LoadedSettings(settings, {name: sources.get(name, DEFAULT_SOURCE) for name in _FIELDS})


def describe_settings(loaded: LoadedSettings) -> tuple[SettingLine, ...]:
    """Returns every effective setting, its source and its meaning; what is secret in an address is masked."""
    return tuple(
        SettingLine(name, _shown(name, getattr(loaded.settings, name)), loaded.sources[name], _meta(name).description)
        for name in _FIELDS
    )


class _Meta(msgspec.Struct, frozen=True):
    description: str
    example: object


def _meta(name: str) -> _Meta:
    # Nested annotations (Port inside a described field) arrive flattened, the innermost first.
    found = [part for part in get_args(_FIELDS[name].type)[1:] if isinstance(part, Meta)]
    description = next((part.description for part in reversed(found) if part.description), name)
    examples = next((part.examples for part in reversed(found) if part.examples), None)
    default = _FIELDS[name].default
    return _Meta(description, examples[0] if examples else default)


def _check(name: str, value: object, source: SettingsSource) -> object:
    if name not in _FIELDS:
        raise _unknown(name, source)
    if isinstance(value, Path):
        value = str(value)
    try:
        # A file's values are typed; text from a variable or a flag stands for a number where one is wanted.
        checked: Any = msgspec.convert(value, _FIELDS[name].type, strict=source.is_typed)
    except msgspec.ValidationError as error:
        reason = str(error)
        raise _bad_value(name, value, source, reason[:1].lower() + reason[1:]) from error
    if isinstance(checked, float) and not math.isfinite(checked):
        raise _bad_value(name, value, source, "expected a finite number")
    if isinstance(checked, str):
        return _check_text(name, checked, source)
    return checked


def _check_text(name: str, text: str, source: SettingsSource) -> str:
    if not text or "\0" in text:
        raise _bad_value(name, text, source, "expected text, not empty and without NUL")
    if name == "nats_url":
        split_servers(text, source.place(name))
    elif name == "nats_monitor_url" and not all(
        part.strip().startswith(("http://", "https://")) for part in text.split(",")
    ):
        raise _bad_value(name, text, source, "expected an address that starts with http:// or https://")
    elif name == "namespace":
        try:
            check_namespace(text)
        except InvalidNameError as error:
            raise _bad_value(name, text, source, error.message) from error
    elif name in _PATH_SETTINGS:
        try:
            return os.path.normpath(source.base / Path(text).expanduser())
        except RuntimeError as error:  # ~nobody-of-that-name/…
            raise _bad_value(name, text, source, "its home directory is not known") from error
    return text


def _check_alternatives(layer: Mapping[str, object], source: SettingsSource) -> None:
    if "nats_url" in layer and "nats_context" in layer:
        raise ConfigurationError(
            f"{source.place('nats_url')} and {source.place('nats_context')} name two servers: "
            "nats_url and nats_context are both set",
            field="nats_url",
            hint="keep one of nats_url and nats_context",
        )


def _shown(name: str, value: object) -> str:
    if value is None:
        return ""
    return mask_url(str(value)) if name in _URL_SETTINGS else str(value)


def _bad_value(name: str, value: object, source: SettingsSource, reason: str) -> ConfigurationError:
    shown = repr(mask_url(value) if isinstance(value, str) else value)[:80]
    return ConfigurationError(
        f"setting {name!r} from {source.place(name)} has the bad value {shown}: {reason[:300]}",
        field=name,
        hint=source.example(name, _meta(name).example),
    )


def _unknown(name: str, source: SettingsSource) -> ConfigurationError:
    closest = next(iter(difflib.get_close_matches(name, _FIELDS, n=1)), None)
    hint = source.example(closest, _meta(closest).example) if closest else "list the settings with: holdfast config"
    return ConfigurationError(
        f"unknown setting {name[:80]!r} from {source.place(name[:80])}", field=name[:80], hint=hint
    )
