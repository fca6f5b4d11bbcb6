"""The key ring: the master keys that bodies are sealed and opened with, and where they come from.

The keys to seal with come from the first of these that there is:

1. ``HOLDFAST_KEYS``: ``id=key,id2=key2`` (base64 of 32 bytes each), of which the first is the active one; or, when it
   begins with ``/``, ``.`` or ``~``, the path of a key file.  No id begins so: the two cannot be confused.
2. ``HOLDFAST_KEYS_FILE``: the path of a key file (:mod:`holdfast.client.key_file`).  One of 1 and 2 may be set.
3. ``$XDG_CONFIG_HOME/holdfast/keys.json``, by default ``~/.config/holdfast/keys.json``.
4. ``CONTEXT_ENCRYPTION_KEY``: 32 characters, from which a key and its id are derived by scrypt.  It is weaker than a
   random key, by as much as its characters are less random than 32 bytes.  Where 1, 2 or 3 gives keys, this one still
   opens what was sealed with it.

Keys in variables are read once.  A key file is looked at (one ``stat``) before every sealing and whenever a key id is
unknown, and read again when it has changed: a rotation is seen without a restart, by sealers at once.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

from holdfast.client.key_file import (
    KEY_BYTES,
    KeySet,
    MasterKey,
    check_key_id,
    check_secret,
    read_key_file,
    stamp_of,
)
from holdfast.schemas.errors import ConfigurationError, EncryptionKeyError

logger = logging.getLogger(__name__)

KEYS_VARIABLE: Final = "HOLDFAST_KEYS"
KEYS_FILE_VARIABLE: Final = "HOLDFAST_KEYS_FILE"
CONTEXT_KEY_VARIABLE: Final = "CONTEXT_ENCRYPTION_KEY"
BY_DEFAULT_VARIABLE: Final = "CONTEXT_ENCRYPTION_ENABLED"

PASSPHRASE_CHARS: Final = 32

_PATH_BEGINS: Final = ("/", ".", "~")
_YES: Final = ("true", "1", "yes", "on")
_NO: Final = ("false", "0", "no", "off", "")

# 32 MiB and some 80 ms, once a process: dear enough to make guessing a typed phrase slow.
_SCRYPT_N: Final = 2**15
_SCRYPT_R: Final = 8
_SCRYPT_P: Final = 1
_SCRYPT_SALT: Final = b"holdfast-enc-1"  # the same in every process: all have to come to the same key


class KeySource(Protocol):
    """Where a ring has its keys from."""

    @property
    def origin(self) -> str:
        """Names it, for messages."""
        ...

    def stamp(self) -> object:
        """Tells cheaply whether the keys may have changed: equal stamps mean that they have not."""
        ...

    def read(self) -> tuple[KeySet, object]:
        """Returns the keys and the stamp they were read under; raises ConfigurationError."""
        ...


class KeyRing:
    """Master keys by id, and the active one, which seals.  Reads its source at the first use; safe among threads."""

    def __init__(self, source: KeySource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._read: tuple[KeySet, object] | None = None

    @classmethod
    def of(cls, keys: Mapping[str, bytes], active: str) -> KeyRing:
        """Returns a ring of keys in hand: 32 bytes each, by id."""
        origin = "the keys given"
        known = {
            check_key_id(key_id, origin): MasterKey(key_id, check_secret(secret, f"key {key_id!r}"), origin)
            for key_id, secret in keys.items()
        }
        if active not in known:
            raise EncryptionKeyError(f"the active key {active!r} is not among the keys given", key_id=active)
        return cls(_FixedKeys(origin, KeySet(known, active)))

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Returns the ring that a key file holds; a change of the file is noticed."""
        return cls(_FileKeys(path, is_named=True))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> KeyRing:
        """Returns the ring that the variables name, else that of the default key file; nothing is read yet."""
        return cls(_EnvironmentKeys(os.environ if environ is None else environ))

    @property
    def origin(self) -> str:
        """Where the keys come from, for messages."""
        return self._source.origin

    def active_key(self) -> MasterKey:
        """Returns the key to seal with, as its source has it now.

        Raises EncryptionKeyError when there is none, ConfigurationError when the source cannot be read (any more):
        rather no sealing than with a key that may be gone.
        """
        keys = self.current()
        if keys.active is None:
            raise EncryptionKeyError(
                "there is no key to encrypt with",
                hint=f"make one with 'holdfast encryption init', or set {KEYS_VARIABLE}",
            )
        return keys.keys[keys.active]

    def key(self, key_id: str, *, what: str = "a body") -> MasterKey:
        """Returns the key of an id, which ``what`` is encrypted with.

        Raises EncryptionKeyError naming both when the ring has no such key, as its source has it now.
        """
        read = self._read
        found = None if read is None else read[0].keys.get(key_id)
        if found is None:
            found = self.current().keys.get(key_id)
        if found is None:
            raise EncryptionKeyError(
                f"{what} is encrypted with key {key_id!r}, which is not in the key ring ({self.origin})",
                key_id=key_id,
                hint="add the key to the ring; what was encrypted with a lost key cannot be read",
            )
        return found

    def current(self) -> KeySet:
        """Returns all keys as their source has them now; raises ConfigurationError when it cannot be read."""
        with self._lock:
            if self._read is None or self._source.stamp() != self._read[1]:
                self._read = self._source.read()
                keys = self._read[0]
                logger.debug(
                    "key ring read",
                    extra={
                        "action": "key_ring_read",
                        "origin": self.origin,
                        "active": keys.active,
                        "keys": [*keys.keys],
                    },
                )
            return self._read[0]

    def __repr__(self) -> str:
        return f"KeyRing({self.origin})"


class _FixedKeys:
    """Keys that do not change as long as the process lives."""

    def __init__(self, origin: str, keys: KeySet) -> None:
        self.origin = origin
        self._keys = keys

    def stamp(self) -> object:
        return None

    def read(self) -> tuple[KeySet, object]:
        return self._keys, None


class _FileKeys:
    """Keys of a file.  One that was named must be there; the default one need not."""

    def __init__(self, path: Path, *, is_named: bool) -> None:
        self.origin = str(path)
        self._path = path
        self._is_named = is_named

    def stamp(self) -> object:
        return stamp_of(self._path)

    def read(self) -> tuple[KeySet, object]:
        keys, stamp = read_key_file(self._path)
        if stamp is None and self._is_named:
            raise ConfigurationError(
                f"there is no key file at {self._path}", field="keys", hint="make one with 'holdfast encryption init'"
            )
        return keys, stamp


class _EnvironmentKeys:
    """What the variables name, and behind it the key of a passphrase; taken apart when it is first needed."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._parts: list[KeySource] | None = None

    @property
    def origin(self) -> str:
        try:
            parts = self._sources()
        except ConfigurationError:  # told by whoever reads the keys; a name in a message must not raise
            return "the environment"
        return ", ".join(part.origin for part in parts)

    def stamp(self) -> object:
        return tuple(part.stamp() for part in self._sources())

    def read(self) -> tuple[KeySet, object]:
        keys: dict[str, MasterKey] = {}
        active: str | None = None
        stamps: list[object] = []
        for part in self._sources():
            found, stamp = part.read()
            stamps.append(stamp)
            keys = {**found.keys, **keys}
            active = found.active if active is None else active
        return KeySet(keys, active), tuple(stamps)

    def _sources(self) -> list[KeySource]:
        if self._parts is None:
            parts = [_main_source(self._environ)]
            if passphrase := self._environ.get(CONTEXT_KEY_VARIABLE):
                key = derive_passphrase_key(passphrase)
                parts.append(_FixedKeys(CONTEXT_KEY_VARIABLE, KeySet({key.id: key}, key.id)))
            self._parts = parts
        return self._parts


def key_file_path(environ: Mapping[str, str] | None = None) -> Path:
    """Returns the key file that the variables name, else the default one, whether it exists or not.

    Raises ConfigurationError when ``HOLDFAST_KEYS`` holds the keys themselves: then no file is used.
    """
    env = os.environ if environ is None else environ
    listed, named = env.get(KEYS_VARIABLE, ""), env.get(KEYS_FILE_VARIABLE, "")
    if listed and named:
        raise ConfigurationError(
            f"{KEYS_VARIABLE} and {KEYS_FILE_VARIABLE} are both set", field="keys", hint="keep one of them"
        )
    if listed and not listed.startswith(_PATH_BEGINS):
        raise ConfigurationError(
            f"the keys come from {KEYS_VARIABLE}, not from a file",
            field="keys",
            hint=f"to rotate, put a new id=key first in {KEYS_VARIABLE} and keep the others behind it "
            "(make a key with: openssl rand -base64 32)",
        )
    try:
        if chosen := listed or named:
            return Path(chosen).expanduser().absolute()
        xdg = env.get("XDG_CONFIG_HOME", "")
        # The XDG base directory specification: a relative path is invalid and to be ignored.
        home = Path(env["HOME"]) if env.get("HOME") else Path.home()
        return (Path(xdg) if xdg.startswith("/") else home / ".config") / "holdfast" / "keys.json"
    except RuntimeError as error:  # no home directory, or ~nobody-of-that-name
        raise ConfigurationError(
            "the path of the key file has no home directory", field="keys", hint=f"set {KEYS_FILE_VARIABLE}"
        ) from error


def encryption_by_default(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``CONTEXT_ENCRYPTION_ENABLED`` asks that bodies be encrypted where their writer does not say.

    Raises ConfigurationError when it is neither true nor false.
    """
    value = (os.environ if environ is None else environ).get(BY_DEFAULT_VARIABLE, "").strip().lower()
    if value in _YES or value in _NO:
        return value in _YES
    raise ConfigurationError(
        f"{BY_DEFAULT_VARIABLE} is neither true nor false", field=BY_DEFAULT_VARIABLE, hint="set it to true or false"
    )


def parse_key_list(text: str, origin: str = KEYS_VARIABLE) -> KeySet:
    """Returns the keys of ``id=base64,id2=base64``, the first active; raises ConfigurationError, never with a key."""
    keys: dict[str, MasterKey] = {}
    for number, part in enumerate(text.split(","), start=1):
        # By its number, never by its id: where the id was forgotten, the key stands in its place.
        what = f"entry {number} of {origin}"
        key_id, equals, encoded = part.strip().partition("=")
        if not equals:
            raise ConfigurationError(
                f"{what} is not of the form id=key",
                field="keys",
                hint="write id=<base64 of 32 bytes>, or the path of a key file as /path, ./path or ~/path",
            )
        check_key_id(key_id, what)
        try:
            secret = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise ConfigurationError(
                f"{what} is not base64", field="keys", hint="make a key with: openssl rand -base64 32"
            ) from error
        if key_id in keys:
            raise ConfigurationError(f"{what} has the id of an earlier one", field="keys", hint="keep one of them")
        keys[key_id] = MasterKey(key_id, check_secret(secret, what), origin)
    return KeySet(keys, next(iter(keys)))


def derive_passphrase_key(passphrase: str) -> MasterKey:
    """Returns the key of a passphrase of 32 characters; its id is derived from the key.

    Raises ConfigurationError when it has another length.  The first call for a passphrase takes some 80 ms.
    """
    if len(passphrase) != PASSPHRASE_CHARS:
        raise ConfigurationError(
            f"{CONTEXT_KEY_VARIABLE} has {len(passphrase)} characters, not {PASSPHRASE_CHARS}",
            field=CONTEXT_KEY_VARIABLE,
            limit=PASSPHRASE_CHARS,
            hint=f"make one with: openssl rand -hex 16; or unset it and use {KEYS_VARIABLE}",
        )
    return _derived(passphrase)


@lru_cache(maxsize=4)  # every client of the process has a ring of its own, of the same passphrase
def _derived(passphrase: str) -> MasterKey:
    secret = hashlib.scrypt(
        passphrase.encode("utf-8", "surrogateescape"),
        salt=_SCRYPT_SALT,
        n=_SCRYPT_N,
        r=_SCRYPT_R,
        p=_SCRYPT_P,
        maxmem=2 * 128 * _SCRYPT_N * _SCRYPT_R,
        dklen=KEY_BYTES,
    )
    mark = hashlib.blake2b(secret, digest_size=4, person=b"holdfast-kid-1").hexdigest()
    key = MasterKey(f"phrase-{mark}", secret, CONTEXT_KEY_VARIABLE)
    logger.warning(
        "a key from a passphrase is weaker than a random one",
        extra={"action": "weak_key", "variable": CONTEXT_KEY_VARIABLE, "key_id": key.id},
    )
    return key


def _main_source(environ: Mapping[str, str]) -> KeySource:
    listed, named = environ.get(KEYS_VARIABLE, ""), environ.get(KEYS_FILE_VARIABLE, "")
    if listed and not named and not listed.startswith(_PATH_BEGINS):
        return _FixedKeys(KEYS_VARIABLE, parse_key_list(listed))
    return _FileKeys(key_file_path(environ), is_named=bool(listed or named))
