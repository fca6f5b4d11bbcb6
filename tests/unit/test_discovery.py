"""Discovery: one order, nothing asked for is replaced by something else, and only a live local server is believed."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from holdfast.ops.discovery import resolve_connection
from holdfast.ops.settings import load_settings
from holdfast.schemas.errors import ConfigurationError
from holdfast.streams.connection_target import ConnectionTarget, mask_url
from holdfast.streams.discovery import find_connection, require_connection
from holdfast.streams.local_server import LocalServer, process_start_ticks, read_local_server


def write_context(home: Path, name: str, **fields: object) -> None:
    directory = home / ".config" / "nats" / "context"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(fields))


def select_context(home: Path, name: str) -> None:
    (home / ".config" / "nats" / "context.txt").write_text(name + "\n")


def write_server(data: Path, *, pid: int | None = None, start_ticks: int | None = None, v: int = 1) -> LocalServer:
    ticks = process_start_ticks(os.getpid())
    assert ticks is not None
    server = LocalServer(
        v=v,
        pid=os.getpid() if pid is None else pid,
        start_ticks=ticks if start_ticks is None else start_ticks,
        owner_pid=os.getpid(),
        nats_url="nats://127.0.0.1:1",
        monitor_url="http://127.0.0.1:2",
        durability="durable",
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        data=str(data),
    )
    data.mkdir(parents=True, exist_ok=True)
    (data / "server.json").write_bytes(msgspec.json.encode(server))
    return server


def origin(environ: dict[str, str], **arguments: str) -> str | None:
    found = find_connection(environ=environ, **arguments)  # type: ignore[arg-type]  # only text arguments are given
    return None if found is None else found.origin


def test_the_first_that_names_a_server_wins(tmp_path: Path) -> None:
    write_context(tmp_path, "prod", url="nats://prod")
    write_server(tmp_path / ".local/share/holdfast")
    environ = {
        "HOME": str(tmp_path),
        "HOLDFAST_NATS_URL": "nats://a",
        "HOLDFAST_NATS_CONTEXT": "prod",
        "NATS_URL": "nats://b",
        "NATS_CONTEXT": "prod",
    }
    assert origin(environ, url="h", url_origin="--nats-url") == "--nats-url"
    assert origin(environ, context="prod") == "NATS context 'prod'"
    for variable in ("HOLDFAST_NATS_URL", "HOLDFAST_NATS_CONTEXT", "NATS_URL", "NATS_CONTEXT"):
        expected = "NATS context 'prod'" if variable.endswith("CONTEXT") else variable
        assert origin(environ) == expected
        del environ[variable]
    assert origin(environ) == f"local server of {tmp_path}/.local/share/holdfast"
    assert find_connection(environ=environ, local=False) is None


def test_an_address_and_a_context_at_once_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="both name a server"):
        find_connection(url="h", context="c", environ={})


def test_addresses_without_a_scheme_are_completed() -> None:
    found = find_connection(url="a:4222, tls://b", environ={})
    assert found is not None
    assert found.url == "nats://a:4222,tls://b"
    assert found.connect_options() == {"servers": ["nats://a:4222", "tls://b"]}


def test_a_context_brings_its_credentials(tmp_path: Path) -> None:
    (tmp_path / "me.nk").write_text("seed")
    write_context(
        tmp_path,
        "prod",
        description="ignored",
        url="nats://prod:4222",
        user="me",
        password="hunter2",
        nkey="~/me.nk",
        inbox_prefix="_MY",
        tls_first=True,
        socks_proxy="",
    )
    found = find_connection(context="prod", environ={"HOME": str(tmp_path)})
    assert found is not None
    assert (found.url, found.user, found.password) == ("nats://prod:4222", "me", "hunter2")
    assert (found.nkey, found.inbox_prefix, found.tls_first) == (str(tmp_path / "me.nk"), "_MY", True)
    assert found.creds is None
    assert "hunter2" not in repr(found)


def test_the_selected_context_is_used_only_when_asked_for(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    write_context(tmp_path, "prod", url="nats://prod")
    select_context(tmp_path, "prod")
    assert find_connection(environ=environ) is None
    assert origin(environ, context="@selected") == "NATS context 'prod'"
    assert origin({**environ, "NATS_CONTEXT": "@selected"}) == "NATS context 'prod'"
    select_context(tmp_path, "")
    with pytest.raises(ConfigurationError, match="none is selected; run: nats context select"):
        find_connection(context="@selected", environ=environ)


def test_contexts_are_looked_for_in_the_configured_directory(tmp_path: Path) -> None:
    write_context(tmp_path, "prod", url="nats://prod")
    environ = {"HOME": "/nowhere", "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    assert origin(environ, context="prod") == "NATS context 'prod'"


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("none", None, ["'none'", "--nats-context", "nats context ls"]),
        ("../prod", None, ["not the name of a NATS context"]),
        ("..", None, ["not the name of a NATS context"]),
        ("c", {"user": "me"}, ["has no url", "nats context edit c"]),
        ("c", {"url": "nats://h", "socks_proxy": "p"}, ["'socks_proxy'", "cannot honour"]),
        ("c", {"url": "nats://h", "jetstream_domain": "hub"}, ["'jetstream_domain'"]),
        ("c", {"url": "nats://h", "creds": "/no/such.creds"}, ["/no/such.creds", "'creds'", "does not exist"]),
        ("c", {"url": "nats://h", "creds": "op://vault/item"}, ["op://", "path of a file"]),
        ("c", {"url": 5}, ["damaged"]),
        ("c", {"url": "nats://"}, ["names no host", "NATS context 'c'"]),
    ],
)
def test_a_context_that_cannot_be_honoured_is_refused(
    tmp_path: Path, name: str, fields: dict[str, object] | None, words: list[str]
) -> None:
    if fields is not None:
        write_context(tmp_path, name, **fields)
    with pytest.raises(ConfigurationError) as refused:
        find_connection(context=name, context_origin="--nats-context", environ={"HOME": str(tmp_path)}, data=tmp_path)
    for word in words:
        assert word in str(refused.value)


def test_credentials_of_the_nats_variables_go_to_their_own_server_only(tmp_path: Path) -> None:
    creds = tmp_path / "me.creds"
    creds.write_text("x")
    environ = {"NATS_URL": "nats://a", "NATS_CREDS": str(creds), "NATS_USER": "me", "NATS_PASSWORD": "hunter2"}
    found = find_connection(environ=environ)
    assert found is not None
    assert (found.creds, found.user, found.password) == (str(creds), "me", "hunter2")
    elsewhere = find_connection(environ={**environ, "HOLDFAST_NATS_URL": "nats://b"})
    assert elsewhere is not None
    assert (elsewhere.creds, elsewhere.user, elsewhere.password) == (None, None, None)
    token = find_connection(environ={"NATS_URL": "nats://a", "NATS_USER": "t0ken"})
    assert token is not None
    assert (token.token, token.user) == ("t0ken", None)


def test_a_credentials_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="from HOLDFAST_NATS_CREDS does not exist"):
        find_connection(url="h", environ={"HOLDFAST_NATS_CREDS": str(tmp_path / "none")})


def test_a_missing_nkeys_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nats-py\[nkeys\]'"):
        ConnectionTarget(url="nats://h", origin="here", creds="/x.creds").connect_options()


def test_tls_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    with pytest.raises(ConfigurationError, match="TLS files of here cannot be used"):
        ConnectionTarget(url="tls://h", origin="here", ca=str(tmp_path / "ca.pem")).connect_options()


def test_a_live_local_server_is_found_with_its_mode(tmp_path: Path) -> None:
    server = write_server(tmp_path)
    assert read_local_server(tmp_path) == server
    found = require_connection(environ={"HOLDFAST_DATA": str(tmp_path)})
    assert (found.url, found.monitor_url, found.durability) == (server.nats_url, server.monitor_url, "durable")


def test_a_stale_server_file_is_ignored(tmp_path: Path) -> None:
    ticks = process_start_ticks(os.getpid())
    assert ticks is not None
    write_server(tmp_path, start_ticks=ticks - 1)  # the pid was re-used
    assert read_local_server(tmp_path) is None
    write_server(tmp_path, pid=2**22 + 1)  # over the kernel's largest
    assert read_local_server(tmp_path) is None
    write_server(tmp_path, v=2)
    assert read_local_server(tmp_path) is None
    for damage in (b"", b"{}", b'{"v":1', b"\xff"):
        (tmp_path / "server.json").write_bytes(damage)
        assert read_local_server(tmp_path) is None


def test_no_server_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holdfast up"):
        require_connection(environ={"HOLDFAST_DATA": str(tmp_path)})


def test_a_zombie_does_not_run() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert process_start_ticks(pid) is None
    finally:
        os.waitpid(pid, 0)


def test_settings_name_the_server_for_the_command_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    server = write_server(data)
    environ = {"HOLDFAST_DATA": str(data)}
    loaded = load_settings(environ=environ, cwd=tmp_path)
    assert resolve_connection(loaded, environ=environ) is None
    local = resolve_connection(loaded, local=True, environ=environ)
    assert local is not None
    assert local.url == server.nats_url
    generic = resolve_connection(loaded, environ={**environ, "NATS_URL": "nats://b"})
    assert generic is not None
    assert generic.origin == "NATS_URL"
    flags: dict[str, object] = {"nats_url": "nats://a", "nats_monitor_url": "http://a:8222"}
    named = resolve_connection(load_settings(flags, environ=environ, cwd=tmp_path), environ={"NATS_URL": "nats://b"})
    assert named is not None
    assert (named.origin, named.url, named.monitor_url) == ("--nats-url", "nats://a", "http://a:8222")


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("nats://h:4222", "nats://h:4222"),
        ("nats://me:pw@h", "nats://***@h"),
        ("token@h", "***@h"),
        ("nats://me:p@w/x@h", "nats://***@h"),
        ("nats://a:b@h,h2,tls://c@h3", "nats://***@h,h2,tls://***@h3"),
    ],
)
def test_addresses_are_masked(url: str, masked: str) -> None:
    assert mask_url(url) == masked
