"""Master keys, and the file that keeps them.

``{"v": 1, "active": "k2", "keys": {"k1": {"key": "<base64 of 32 bytes>", "created_at": "<RFC 3339>"}, "k2": …}}``

The file is its owner's alone (mode 0600, else it is refused), and is replaced as a whole: temporary file, fsync,
rename, fsync of the directory.  Changes are made under a lock on the directory, so that no two of them lose a key.
No message, log line or repr holds a key.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec

from holdfast.schemas.errors import ConfigurationError, EncryptionKeyError
from holdfast.schemas.undecodable import UNDECODABLE

KEY_BYTES: Final = 32
KEY_ID_CHARS: Final = 64
FILE_MODE: Final = 0o600

_FILE_BYTES: Final = 1024 * 1024
"""Some ten thousand keys; a file over this is something else."""

_KEY_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_VERSION: Final = 1

Stamp = tuple[int, int, int, int] | None
"""Inode, times and size of a file as it was read; None when there was none.  Another stamp: perhaps other keys."""


@dataclass(frozen=True, slots=True)
class MasterKey:
    """A key that envelope keys are derived from.  ``origin`` says where it was read."""

    id: str
    secret: bytes = field(repr=False)
    origin: str
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class KeySet:
    """Keys by id, and the id of the one that new bodies are sealed with; None when there is no key at all."""

    keys: Mapping[str, MasterKey]
    active: str | None = None


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    key: bytes
    created_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    v: int
    active: str
    keys: dict[str, _Entry]


_DECODER: Final = msgspec.json.Decoder(_File)


def check_key_id(key_id: str, origin: str) -> str:
    """Returns ``key_id`` when it is 1 to 64 of ``[A-Za-z0-9_-]``; raises ConfigurationError naming ``origin``."""
    if _KEY_ID.match(key_id):
        return key_id
    raise ConfigurationError(
        # Not the id itself: where a key was put in its place, that would show it.
        f"a key id in {origin} is not 1 to {KEY_ID_CHARS} of the characters A-Z a-z 0-9 _ -",
        field="key_id",
        limit=KEY_ID_CHARS,
    )


def check_secret(secret: bytes, what: str) -> bytes:
    """Returns a key's bytes when there are 32 of them; raises ConfigurationError naming ``what`` otherwise."""
    if len(secret) == KEY_BYTES:
        return secret
    raise ConfigurationError(
        f"{what} has {len(secret)} bytes, not {KEY_BYTES}",
        field="keys",
        limit=KEY_BYTES,
        hint="make one with: openssl rand -base64 32",
    )


def new_key_id(at: datetime) -> str:
    """Returns an id for a new key: its day, and enough chance that rings of two machines do not share an id."""
    return f"k{at:%Y%m%d}-{secrets.token_hex(4)}"


def stamp_of(path: Path) -> Stamp:
    """Returns the stamp of a file as it stands now."""
    try:
        return _stamp(path.stat())
    except OSError:
        return None


def read_key_file(path: Path) -> tuple[KeySet, Stamp]:
    """Returns the keys of a file and its stamp; no keys when there is no file.

    Raises ConfigurationError when others may read or write it, and when it is not of the form above.
    """
    try:
        # Non-blocking, so that a pipe in the file's place is told and does not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return KeySet({}), None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"key file {path} is not a file", field="keys")
        # What was opened is asked, not its name: in between another file could have taken the name.
        if status.st_mode & 0o077:
            raise ConfigurationError(
                f"key file {path} may be used by others: its mode is {stat.S_IMODE(status.st_mode):04o}",
                field="keys",
                hint=f"chmod 600 {path}; if others could read it, run 'holdfast encryption rotate' as well",
            )
        with os.fdopen(descriptor, "rb", closefd=False) as opened:
            raw = opened.read(_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)
    return parse_key_file(raw, str(path)), _stamp(status)


def parse_key_file(raw: bytes, origin: str) -> KeySet:
    """Returns the keys that the content of a key file holds; raises ConfigurationError naming ``origin``."""
    return _key_set(_decode(raw, origin), origin)


def create_key_file(path: Path, at: datetime | None = None) -> str:
    """Creates a key file with one random key and returns the key's id; raises ConfigurationError where one is."""
    path = path.resolve()
    with _locked_directory(path):
        if path.exists():
            raise ConfigurationError(
                f"there is a key file at {path} already",
                field="keys",
                hint="'holdfast encryption rotate' adds a key to it",
            )
        file = _File(v=_VERSION, active="", keys={})
        key_id = _add_key(file, at)
        _replace(path, file)
    return key_id


def rotate_key_file(path: Path, at: datetime | None = None) -> tuple[str, str]:
    """Adds a random key to a key file and makes it the active one; returns the ids of the one before and of it.

    The older keys stay: what was sealed with them stays readable.  Raises EncryptionKeyError where there is no file.
    """
    path = path.resolve()
    _, found = read_key_file(path)
    if found is None:
        raise EncryptionKeyError(f"there is no key file at {path}", hint="make one with 'holdfast encryption init'")
    with _locked_directory(path):
        # Again, now that nobody else changes it.
        read_key_file(path)
        file = _decode(path.read_bytes(), str(path))
        before = file.active
        after = _add_key(file, at)
        _replace(path, file)
    return before, after


def _add_key(file: _File, at: datetime | None) -> str:
    created_at = (datetime.now(UTC) if at is None else at).replace(microsecond=0)
    key_id = new_key_id(created_at)
    file.keys[key_id] = _Entry(secrets.token_bytes(KEY_BYTES), created_at)
    file.active = key_id
    return key_id


def _decode(raw: bytes, origin: str) -> _File:
    if len(raw) > _FILE_BYTES:
        raise ConfigurationError(
            f"key file {origin} has over {_FILE_BYTES} bytes", field="keys", limit=_FILE_BYTES, hint="is it one?"
        )
    try:
        # What msgspec says names the member and never its value.
        return _DECODER.decode(raw)
    except UNDECODABLE as error:
        reason = str(error)
        raise ConfigurationError(
            f"key file {origin} cannot be read: {reason[:1].lower() + reason[1:]}",
            field="keys",
            hint='it reads {"v": 1, "active": "<id>", "keys": {"<id>": {"key": "<base64 of 32 bytes>"}}}',
        ) from error


def _key_set(file: _File, origin: str) -> KeySet:
    if file.v != _VERSION:
        raise ConfigurationError(
            f"key file {origin} has version {file.v}, this release reads {_VERSION}", field="v", hint="upgrade holdfast"
        )
    keys = {
        check_key_id(key_id, origin): MasterKey(
            key_id, check_secret(entry.key, f"key {key_id!r} in {origin}"), origin, entry.created_at
        )
        for key_id, entry in file.keys.items()
    }
    if file.active not in keys:
        raise ConfigurationError(
            f"key file {origin} names an active key that is not in it", field="active", hint="name one of its keys"
        )
    return KeySet(keys, file.active)


@contextmanager
def _locked_directory(path: Path) -> Generator[None]:
    """Makes the directory of ``path`` where it is missing, and keeps others from changing files there meanwhile."""
    directory = path.parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        # Held for as long as a small file takes to be written; closing gives it up.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, file: _File) -> None:
    raw = msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(raw)
                opened.flush()
                os.fsync(descriptor)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise _unwritable(path, error) from error


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _unreadable(path: Path, error: OSError) -> ConfigurationError:
    reason = (error.strerror or "not readable").lower()
    return ConfigurationError(f"key file {path} cannot be read: {reason}", field="keys", hint="check its owner")


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    reason = (error.strerror or "not writable").lower()
    return ConfigurationError(
        f"key file {path} cannot be written: {reason}", field="keys", hint="name another with HOLDFAST_KEYS_FILE"
    )
