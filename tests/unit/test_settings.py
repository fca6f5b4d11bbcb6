"""Settings: three sources, one order, and errors that name the key, its source and what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.ops.settings import LoadedSettings, Settings, describe_settings, load_settings
from holdfast.ops.system import worker_settings
from holdfast.schemas.errors import ConfigurationError
from holdfast.workers.settings import WorkerSettings


def load(
    tmp_path: Path,
    *,
    toml: str | None = None,
    environ: dict[str, str] | None = None,
    flags: dict[str, object] | None = None,
) -> LoadedSettings:
    if toml is not None:
        (tmp_path / "holdfast.toml").write_text(toml)
    return load_settings(flags, environ={"HOME": "/home/me", **(environ or {})}, cwd=tmp_path)


def test_without_any_source_the_defaults_hold(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded.settings == Settings(data="/home/me/.local/share/holdfast")
    assert set(loaded.sources.values()) == {"default"}
    assert loaded.settings.durability == "durable"
    assert loaded.settings.port == 0
    assert loaded.settings.hot_window_s == 86_400
    assert loaded.settings.archive_rows == 50_000


def test_every_setting_of_a_worker_reaches_it(tmp_path: Path) -> None:
    names = {*Settings.__struct_fields__} & {*WorkerSettings.__struct_fields__}
    changed: dict[str, Any] = {}
    for name in names:
        default = getattr(Settings(data="/d"), name)
        changed[name] = f"/mnt/{name}" if default is None else default + 1
    told = worker_settings(load(tmp_path, flags=changed).settings, "up")
    assert len(names) >= 14
    assert {name: getattr(told, name) for name in names} == {
        name: Path(value) if isinstance(value, str) else value for name, value in changed.items()
    }


def test_without_any_source_workers_do_as_they_do_elsewhere(tmp_path: Path) -> None:
    own = WorkerSettings(lake=Path("/d/lake"), index=Path("/d/index/up"))
    assert worker_settings(load(tmp_path, flags={"data": "/d"}).settings, "up") == own


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        toml='port = 1\narchive_rows = 1\nnamespace = "file"',
        environ={"HOLDFAST_PORT": "2", "HOLDFAST_ARCHIVE_ROWS": "2"},
        flags={"port": 3, "archive_rows": None},
    )
    settings, sources = loaded.settings, loaded.sources
    assert (settings.port, settings.archive_rows, settings.namespace) == (3, 2, "file")
    assert sources["port"] == "--port"
    assert sources["archive_rows"] == "HOLDFAST_ARCHIVE_ROWS"
    assert sources["namespace"] == str(tmp_path / "holdfast.toml")


def test_text_of_variables_and_flags_stands_for_numbers(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, environ={"HOLDFAST_HOT_WINDOW_S": "0.5"}, flags={"port": "4222", "max_store_bytes": "2000000"}
    )
    assert loaded.settings.hot_window_s == 0.5
    assert loaded.settings.port == 4222
    assert loaded.settings.max_store_bytes == 2_000_000


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    loaded = load(tmp_path, toml="port = 7", environ={"HOLDFAST_PORT": "", "HOLDFAST_NATS_URL": ""})
    assert loaded.settings.port == 7
    assert loaded.settings.nats_url is None


def test_variables_that_are_no_settings_are_left_alone(tmp_path: Path) -> None:
    environ = {"HOLDFAST_FAILPOINTS": "x", "HOLDFAST_TEST_NATS_URL": "x", "NATS_URL": "x", "HOLDFASTER": "x"}
    assert load(tmp_path, environ=environ).settings == load(tmp_path).settings


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_DATA_HOME": "/xdg"}, "/xdg/holdfast"),
        ({"XDG_DATA_HOME": "relative/is/invalid"}, "/home/me/.local/share/holdfast"),
        ({"XDG_DATA_HOME": "/xdg", "HOLDFAST_DATA": "/mine"}, "/mine"),
    ],
)
def test_the_data_directory_follows_the_environment(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    assert load(tmp_path, environ=environ).settings.data == expected


def test_a_relative_path_starts_where_it_was_written(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my.toml").write_text('data = "d"\nnats_creds = "a.creds"')
    loaded = load_settings({"nats_creds": "b.creds"}, config=elsewhere / "my.toml", environ={}, cwd=tmp_path)
    assert loaded.settings.data_path == elsewhere / "d"
    assert loaded.settings.nats_creds == str(tmp_path / "b.creds")


def test_a_file_is_named_by_a_variable_or_by_a_flag(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("port = 1")
    (tmp_path / "b.toml").write_text("port = 2")
    environ = {"HOLDFAST_CONFIG": "a.toml"}
    assert load_settings(environ=environ, cwd=tmp_path).settings.port == 1
    assert load_settings(config=Path("b.toml"), environ=environ, cwd=tmp_path).settings.port == 2


@pytest.mark.parametrize(
    ("toml", "environ", "flags", "field", "words"),
    [
        ("prot = 1", {}, {}, "prot", ["'prot'", "holdfast.toml", "write port = 4222"]),
        ("[nats]\nurl = 'x'", {}, {}, "nats", ["'nats'", "holdfast.toml"]),
        (None, {"HOLDFAST_PROT": "1"}, {}, "prot", ["HOLDFAST_PROT", "set HOLDFAST_PORT=4222"]),
        (None, {}, {"prot": 1}, "prot", ["--prot", "give --port 4222"]),
        ("port = '1'", {}, {}, "port", ["'port'", "holdfast.toml", "`int`", "write port = 4222"]),
        ("port = true", {}, {}, "port", ["`int`"]),
        (None, {"HOLDFAST_PORT": "65536"}, {}, "port", ["HOLDFAST_PORT", "'65536'", "65535", "set HOLDFAST_PORT=4222"]),
        (None, {}, {"port": "x"}, "port", ["--port", "'x'", "give --port 4222"]),
        (None, {"HOLDFAST_DURABILITY": "yes"}, {}, "durability", ["'yes'", "set HOLDFAST_DURABILITY=durable"]),
        (None, {"HOLDFAST_ARCHIVE_INTERVAL_S": "0"}, {}, "archive_interval_s", ["> 0"]),
        (None, {"HOLDFAST_HOT_WINDOW_S": "nan"}, {}, "hot_window_s", ["HOLDFAST_HOT_WINDOW_S"]),
        ("hot_window_s = inf", {}, {}, "hot_window_s", ["holdfast.toml"]),
        ("namespace = ''", {}, {}, "namespace", ["not empty"]),
        (None, {}, {"namespace": "x" * 65}, "namespace", ["--namespace", "64"]),
        (None, {}, {"nats_url": "ftp://h"}, "nats_url", ["--nats-url", "'ftp'", "nats://host:4222"]),
        (None, {}, {"nats_monitor_url": "host:8222"}, "nats_monitor_url", ["http://"]),
        (None, {}, {"data": "a\0b"}, "data", ["NUL"]),
        ("port = x", {}, {}, "config", ["holdfast.toml", "line 1"]),
    ],
)
def test_a_bad_setting_is_refused_by_name_source_and_remedy(
    tmp_path: Path, toml: str | None, environ: dict[str, str], flags: dict[str, object], field: str, words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, toml=toml, environ=environ, flags=flags)
    assert refused.value.field == field
    for word in words:
        assert word in str(refused.value)


def test_a_named_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: no such file"):
        load_settings(config=tmp_path / "none.toml", environ={}, cwd=tmp_path)


def test_a_stronger_source_replaces_the_server_whichever_way_it_names_one(tmp_path: Path) -> None:
    loaded = load(tmp_path, toml='nats_url = "nats://file"', flags={"nats_context": "prod"})
    assert loaded.settings.nats_url is None
    assert loaded.settings.nats_context == "prod"
    assert loaded.sources["nats_url"] == "default"
    with pytest.raises(ConfigurationError, match="HOLDFAST_NATS_URL and HOLDFAST_NATS_CONTEXT name two servers"):
        load(tmp_path, environ={"HOLDFAST_NATS_URL": "h", "HOLDFAST_NATS_CONTEXT": "c"})


def test_the_description_shows_every_setting_with_its_source_and_no_secret(tmp_path: Path) -> None:
    environ = {
        "HOLDFAST_NATS_URL": "nats://me:hunter2@a:4222,nats://s3cret-token@b:4222",
        "HOLDFAST_NATS_MONITOR_URL": "http://me:hunter2@a:8222",
        "HOLDFAST_NATS_CREDS": "/etc/me.creds",
    }
    lines = {line.name: line for line in describe_settings(load(tmp_path, environ=environ))}
    assert list(lines) == list(Settings.__struct_fields__)
    assert lines["nats_url"].value == "nats://***@a:4222,nats://***@b:4222"
    assert lines["nats_url"].source == "HOLDFAST_NATS_URL"
    assert lines["nats_creds"].value == "/etc/me.creds"
    assert all(line.description for line in lines.values())
    text = repr(lines)
    assert "hunter2" not in text
    assert "s3cret" not in text


@pytest.mark.parametrize(
    "url", ["nats://me:hunter2@:1", "nats://me:hunter2,x@h", "me:hunter2@h:port", "ftp://a:hunter2@h"]
)
def test_a_refused_address_shows_no_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, environ={"HOLDFAST_NATS_URL": url})
    assert "hunter2" not in str(refused.value)
    assert "HOLDFAST_NATS_URL" in str(refused.value)
