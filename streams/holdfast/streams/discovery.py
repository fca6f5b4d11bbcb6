"""Which NATS server to use.  One order for the SDK, the command line and the workers; the first that is set wins:

1. an address or a NATS context given by the caller,
2. ``HOLDFAST_NATS_URL``, then ``HOLDFAST_NATS_CONTEXT``,
3. ``NATS_URL``, then ``NATS_CONTEXT``,
4. the embedded server that runs on this machine (``<data>/server.json``, when the caller wants it).

The *selected* context of the NATS command line is never used by itself: name it, or ask for ``@selected``.
Credentials: those of the caller or ``HOLDFAST_NATS_CREDS`` go with any address; ``NATS_CREDS``, ``NATS_NKEY``,
``NATS_USER`` and ``NATS_PASSWORD`` go with ``NATS_URL`` only, so that no secret meant for one server reaches another.
An empty variable counts as unset.  Nothing here opens a connection; a few small files are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from holdfast.schemas.errors import ConfigurationError
from holdfast.streams.connection_target import ConnectionTarget, split_servers
from holdfast.streams.local_server import default_data_directory, read_local_server
from holdfast.streams.nats_context import load_nats_context


def find_connection(
    *,
    url: str | None = None,
    url_origin: str = "the url given",
    context: str | None = None,
    context_origin: str = "the context given",
    creds: str | None = None,
    creds_origin: str = "the credentials given",
    data: Path | None = None,
    environ: Mapping[str, str] | None = None,
    local: bool = True,
) -> ConnectionTarget | None:
    """Returns the server to use, or None when nothing names one and (with ``local``) none runs on this machine.

    ``data`` is where a local server is looked for; the default is that of the environment.  The ``*_origin`` texts
    say where a value came from, for messages.  Raises ConfigurationError for an address, context or credentials
    file that cannot be used: what was asked for is never replaced by something else.
    """
    env = os.environ if environ is None else environ
    target = _configured(url, url_origin, context, context_origin, env)
    if target is not None:
        if creds is None:
            creds, creds_origin = env.get("HOLDFAST_NATS_CREDS") or None, "HOLDFAST_NATS_CREDS"
        return _with_creds(target, creds, creds_origin)
    if not local:
        return None
    server = read_local_server(data if data is not None else default_data_directory(env))
    if server is None:
        return None
    return ConnectionTarget(
        url=server.nats_url,
        origin=f"local server of {server.data}",
        monitor_url=server.monitor_url,
        durability=server.durability,
    )


def require_connection(
    *, url: str | None = None, data: Path | None = None, environ: Mapping[str, str] | None = None
) -> ConnectionTarget:
    """Returns the server to use: as :func:`find_connection`, but none at all is a ConfigurationError."""
    target = find_connection(url=url, data=data, environ=environ)
    if target is None:
        looked_in = data if data is not None else default_data_directory(environ)
        raise ConfigurationError(
            f"no NATS server is named, and no local server runs on {looked_in}",
            field="nats_url",
            hint="start one with: holdfast up, or set HOLDFAST_NATS_URL=nats://host:4222",
        )
    return target


def _configured(
    url: str | None, url_origin: str, context: str | None, context_origin: str, env: Mapping[str, str]
) -> ConnectionTarget | None:
    if url and context:
        raise ConfigurationError(
            f"{url_origin} and {context_origin} both name a server", field="nats_url", hint="give one of them"
        )
    if url:
        return _at(url, url_origin)
    if context:
        return load_nats_context(context, context_origin, env)
    for prefix in ("HOLDFAST_NATS", "NATS"):
        if named := env.get(f"{prefix}_URL"):
            target = _at(named, f"{prefix}_URL")
            return _with_nats_credentials(target, env) if prefix == "NATS" else target
        if named := env.get(f"{prefix}_CONTEXT"):
            return load_nats_context(named, f"{prefix}_CONTEXT", env)
    return None


def _at(url: str, origin: str) -> ConnectionTarget:
    return ConnectionTarget(url=",".join(split_servers(url, origin)), origin=origin)


def _with_nats_credentials(target: ConnectionTarget, env: Mapping[str, str]) -> ConnectionTarget:
    user, password = env.get("NATS_USER") or None, env.get("NATS_PASSWORD") or None
    if user is not None and password is None:
        # The nats tool: a user without a password is a token.
        target = msgspec.structs.replace(target, token=user)
    elif user is not None:
        target = msgspec.structs.replace(target, user=user, password=password)
    if nkey := env.get("NATS_NKEY"):
        target = msgspec.structs.replace(target, nkey=_existing(nkey, "NATS_NKEY"))
    return _with_creds(target, env.get("NATS_CREDS") or None, "NATS_CREDS")


def _with_creds(target: ConnectionTarget, creds: str | None, origin: str) -> ConnectionTarget:
    if creds is None:
        return target
    return msgspec.structs.replace(target, creds=_existing(creds, origin))


def _existing(name: str, origin: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"credentials file {path} from {origin} does not exist",
            field="nats_creds",
            hint="give the path of an existing file",
        )
    return str(path)
