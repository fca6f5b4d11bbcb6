"""``holdfast encryption``: the keys that bodies are encrypted with.  Needs no server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.ids import iso_from_ms, ms_from_utc

if TYPE_CHECKING:
    from holdfast.client.key_file import KeySet


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(add_completion=False)
    command(
        group,
        "encryption",
        examples=("holdfast encryption init", "holdfast encryption rotate", "holdfast encryption status --json"),
        default_of_group=True,
    )(encryption)
    command(
        group, "init", examples=("holdfast encryption init", "HOLDFAST_KEYS_FILE=./keys.json holdfast encryption init")
    )(init)
    command(group, "rotate", examples=("holdfast encryption rotate", "holdfast encryption status"))(rotate)
    command(group, "status", examples=("holdfast encryption status", "holdfast encryption status --json"))(status)
    app.add_typer(group, name="encryption")


def encryption(invocation: Invocation) -> None:
    """Keys of client-side encryption: make a key file, rotate, see which keys there are.

    The keys are read from HOLDFAST_KEYS or HOLDFAST_KEYS_FILE, else from ~/.config/holdfast/keys.json.
    """
    status(invocation)


def init(invocation: Invocation) -> None:
    """Make a key file with one random key.

    Keep a copy of it in a safe place: what is encrypted with a lost key cannot be read by anybody.
    """
    from holdfast.client.key_file import create_key_file
    from holdfast.client.key_ring import key_file_path

    path = key_file_path()
    active = create_key_file(path)
    if invocation.json:
        output.write_json({"active": active, "path": str(path)})
        return
    output.write_line(f"key {active} is active, in {path}")
    output.remark("keep a copy of the file: what is encrypted with a lost key cannot be read by anybody")


def rotate(invocation: Invocation) -> None:
    """Add a random key to the key file and encrypt with it from now on.

    The older keys stay in the file, and what they encrypted stays readable: nothing is rewritten. Processes that run
    take the new key at their next write.
    """
    from holdfast.client.key_file import rotate_key_file
    from holdfast.client.key_ring import key_file_path

    path = key_file_path()
    previous, active = rotate_key_file(path)
    if invocation.json:
        output.write_json({"active": active, "previous": previous, "path": str(path)})
        return
    output.write_line(f"key {active} is active, in {path}; {previous} stays for reading")
    output.remark("keep a copy of the file: what is encrypted with a lost key cannot be read by anybody")


def status(invocation: Invocation) -> None:
    """List the keys, which of them encrypts, and where they come from; never the keys themselves."""
    from holdfast.client.key_ring import KeyRing

    ring = KeyRing.from_environment()
    keys = ring.current()
    if invocation.json:
        output.write_json({"active": keys.active, "origin": ring.origin, "keys": _lines(keys)})
        return
    if not keys.keys:
        output.remark(f"no keys in {ring.origin}; make one with 'holdfast encryption init'")
        return
    rows = [
        (line["key_id"], "active" if line["active"] else "", line["created_at"], line["origin"])
        for line in _lines(keys)
    ]
    output.write_table(("key", "", "created at", "origin"), rows)


def _lines(keys: KeySet) -> list[dict[str, Any]]:
    return [
        {
            "key_id": key.id,
            "active": key.id == keys.active,
            "created_at": None if key.created_at is None else iso_from_ms(ms_from_utc(key.created_at)),
            "origin": key.origin,
        }
        for key in keys.keys.values()
    ]
