"""Which NATS server to talk to, and how to prove who one is: the answer of discovery, ready for ``nats.connect``."""

from __future__ import annotations

import importlib.util
import re
import ssl
from typing import Final, Literal, TypedDict
from urllib.parse import urlsplit

import msgspec

from holdfast.schemas.errors import ConfigurationError

Durability = Literal["durable", "fast"]
"""``durable``: every acknowledged write is fsynced first.  ``fast``: up to two minutes may be lost at a power cut."""

SCHEMES: Final = ("nats", "tls", "ws", "wss")

_USERINFO: Final = re.compile(r"\A([A-Za-z]+://)?.*@", re.DOTALL)
_MASK: Final = "***"


class ConnectOptions(TypedDict, total=False):
    """Keyword arguments of ``nats.connect``: only those that were set, so that its own defaults stay in force."""

    servers: list[str]
    user: str
    password: str
    token: str
    user_credentials: str
    nkeys_seed: str
    inbox_prefix: str
    tls: ssl.SSLContext
    tls_handshake_first: bool


class ConnectionTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A NATS server, its credentials, and where they were found.

    ``url`` may name several servers of one cluster, divided by commas.  ``repr`` shows no secret.
    """

    url: str
    origin: str
    """Where this was found, in words for a person: ``--nats-url``, ``NATS_URL``, ``NATS context 'prod'`` …"""
    creds: str | None = None
    """Path of a credentials file (JWT and nkey seed)."""
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey: str | None = None
    """Path of a file that holds an nkey seed."""
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    tls_first: bool = False
    inbox_prefix: str | None = None
    monitor_url: str | None = None
    """The server's monitoring address, when it is known: that of a local server is.  Of a cluster those of its nodes,
    divided by commas."""
    durability: Durability | None = None
    """What a local server was started with; None when it is for the caller to find out."""

    def __repr__(self) -> str:
        return f"ConnectionTarget(url={mask_url(self.url)!r}, origin={self.origin!r}, creds={self.creds!r})"

    @property
    def monitor_urls(self) -> tuple[str, ...]:
        """Every monitoring address that is known."""
        return tuple(part.strip() for part in (self.monitor_url or "").split(",") if part.strip())

    def connect_options(self) -> ConnectOptions:
        """Returns the arguments for ``nats.connect``.

        Reads the TLS files, so it may block for some milliseconds.  Raises ConfigurationError when a TLS file
        cannot be used, or when credentials need the ``nkeys`` package and it is not installed.
        """
        options: ConnectOptions = {"servers": split_servers(self.url, self.origin)}
        if self.user is not None:
            options["user"] = self.user
        if self.password is not None:
            options["password"] = self.password
        if self.token is not None:
            options["token"] = self.token
        if self.inbox_prefix is not None:
            options["inbox_prefix"] = self.inbox_prefix
        if self.creds is not None or self.nkey is not None:
            _require_nkeys(self.origin)
        if self.creds is not None:
            options["user_credentials"] = self.creds
        if self.nkey is not None:
            options["nkeys_seed"] = self.nkey
        if self.ca is not None or self.cert is not None:
            options["tls"] = self._tls_context()
        if self.tls_first:
            options["tls_handshake_first"] = True
        return options

    def _tls_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except OSError as error:  # ssl.SSLError is one too
            raise ConfigurationError(
                f"TLS files of {self.origin} cannot be used: {error}",
                field="nats_url",
                hint="check the ca, cert and key paths",
            ) from error
        return context


def split_servers(url: str, origin: str) -> list[str]:
    """Returns the servers that ``url`` names, each with its scheme; ``origin`` is for the message.

    Raises ConfigurationError when one of them is no NATS address.  The message shows no password.
    """
    servers = [_with_scheme(part.strip()) for part in url.split(",") if part.strip()]
    if not servers:
        raise _not_an_address(url, origin, "it is empty")
    for server in servers:
        try:
            parts = urlsplit(server)
            port = parts.port
        except ValueError as error:
            raise _not_an_address(url, origin, "its host or port cannot be read") from error
        if parts.scheme not in SCHEMES:
            raise _not_an_address(url, origin, f"scheme {parts.scheme!r} is not one of {', '.join(SCHEMES)}")
        if not parts.hostname:
            raise _not_an_address(url, origin, "it names no host")
        if port == 0:
            raise _not_an_address(url, origin, "port 0 is not an address to connect to")
    return servers


def mask_url(url: str) -> str:
    """Returns ``url`` without user, password or token: whatever stands before the ``@`` of each address."""
    return ",".join(_USERINFO.sub(rf"\g<1>{_MASK}@", part) for part in url.split(","))


def _with_scheme(server: str) -> str:
    return server if "://" in server else f"nats://{server}"


def _not_an_address(url: str, origin: str, reason: str) -> ConfigurationError:
    # A comma inside a password splits it: here, unlike in mask_url, everything before the last @ is hidden.
    shown = _USERINFO.sub(rf"\g<1>{_MASK}@", url)
    return ConfigurationError(
        f"nats url {shown[:120]!r} from {origin} is not an address: {reason}",
        field="nats_url",
        hint="write it like nats://host:4222, special characters of a password as %xx",
    )


def _require_nkeys(origin: str) -> None:
    if importlib.util.find_spec("nkeys") is None:
        raise ConfigurationError(
            f"credentials of {origin} need the nkeys package, which is not installed",
            field="nats_creds",
            hint="run: pip install 'nats-py[nkeys]'",
        )
