"""Reads a context of the NATS command line (``nats context add``): a named server with its credentials.

Layout, as the ``nats`` tool writes it::

    $XDG_CONFIG_HOME/nats/context.txt            the name of the selected context
    $XDG_CONFIG_HOME/nats/context/<name>.json    url, creds, user, password, token, nkey, ca, cert, key, …

A field that is set and that Holdfast cannot honour is an error: connecting without it would reach another server,
or the same one as somebody else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.schemas.errors import ConfigurationError
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.connection_target import ConnectionTarget, split_servers

SELECTED: Final = "@selected"
"""Stands for the context that ``nats context select`` chose.  It is used only when it is asked for by this name:
a context selected yesterday for an unrelated task must not silently become where contexts are stored."""

_UNSUPPORTED: Final = (
    "nsc",
    "socks_proxy",
    "user_jwt",
    "jetstream_domain",
    "jetstream_api_prefix",
    "jetstream_event_prefix",
    "windows_cert_store",
)
_PATHS: Final = ("creds", "nkey", "ca", "cert", "key")


class _ContextFile(msgspec.Struct):
    """The fields that are honoured; descriptions, colours and the like are ignored."""

    url: str = ""
    creds: str = ""
    user: str = ""
    password: str = ""
    token: str = ""
    nkey: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    tls_first: bool = False
    inbox_prefix: str = ""


def load_nats_context(name: str, origin: str, environ: Mapping[str, str] | None = None) -> ConnectionTarget:
    """Returns the server of NATS context ``name``, or of the selected one for :data:`SELECTED`.

    ``origin`` says where the name came from (``--nats-context``).  Raises ConfigurationError when there is no such
    context, when it cannot be read, or when it asks for what nats-py cannot do.
    """
    env = os.environ if environ is None else environ
    root = _nats_directory(env)
    if name == SELECTED:
        name = _selected(root, origin)
    if not name or "/" in name or "\\" in name or ".." in name or "\0" in name:
        raise _error(f"{name!r} from {origin} is not the name of a NATS context", "run: nats context ls")
    path = root / "context" / f"{name}.json"
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or "not readable"
        raise _error(
            f"NATS context {name!r} from {origin} cannot be read from {path}: {reason.lower()}",
            f"run: nats context ls, or create it with: nats context add {name}",
        ) from error
    return _target(name, path, raw, env)


def _target(name: str, path: Path, raw: bytes, env: Mapping[str, str]) -> ConnectionTarget:
    try:
        every: dict[str, Any] = msgspec.json.decode(raw, type=dict[str, Any])
        context = msgspec.convert(every, _ContextFile)
    except UNDECODABLE as error:  # ValidationError is one too
        raise _error(f"NATS context file {path} is damaged: {error}", f"run: nats context edit {name}") from error
    for field in _UNSUPPORTED:
        if every.get(field):
            raise _error(
                f"NATS context {name!r} sets {field!r}, which holdfast cannot honour",
                f"remove it with: nats context edit {name}, or give the address with --nats-url",
            )
    if not context.url:
        raise _error(f"NATS context {name!r} has no url", f"add one with: nats context edit {name}")
    paths: dict[str, str | None] = {field: _expand(name, field, getattr(context, field), env) for field in _PATHS}
    origin = f"NATS context {name!r}"
    split_servers(context.url, origin)
    return ConnectionTarget(
        url=context.url,
        origin=origin,
        user=context.user or None,
        password=context.password or None,
        token=context.token or None,
        tls_first=context.tls_first,
        inbox_prefix=context.inbox_prefix or None,
        creds=paths["creds"],
        nkey=paths["nkey"],
        ca=paths["ca"],
        cert=paths["cert"],
        key=paths["key"],
    )


def _expand(name: str, field: str, value: str, env: Mapping[str, str]) -> str | None:
    if not value:
        return None
    if "://" in value:  # newer versions of the nats tool resolve op://, nsc:// and others
        raise _error(
            f"NATS context {name!r} takes {field!r} from {value.partition('://')[0]}://, which holdfast cannot honour",
            "give the path of a file instead",
        )
    home = env.get("HOME")
    path = Path(home) / value[2:] if home and value.startswith("~/") else Path(value).expanduser()
    if not path.is_file():
        raise _error(
            f"file {path} named by {field!r} of NATS context {name!r} does not exist",
            f"correct it with: nats context edit {name}",
        )
    return str(path)


def _selected(root: Path, origin: str) -> str:
    try:
        name = (root / "context.txt").read_text().strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    if not name:
        raise _error(f"{origin} asks for the selected NATS context, and none is selected", "run: nats context select")
    return name


def _nats_directory(env: Mapping[str, str]) -> Path:
    xdg = env.get("XDG_CONFIG_HOME", "")
    if xdg.startswith("/"):
        return Path(xdg) / "nats"
    home = env.get("HOME")
    return (Path(home) if home else Path.home()) / ".config" / "nats"


def _error(message: str, hint: str) -> ConfigurationError:
    return ConfigurationError(message, field="nats_context", hint=hint)
