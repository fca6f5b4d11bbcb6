"""``holdfast dead``: messages that could not be processed, and events that handlers gave up."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import InvalidFieldError, NotFoundError
from holdfast.schemas.ids import iso_from_ms

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.streams.dead import DeadLetter

_BEFORE: Final = 64
"""How far before a letter its second half may stand: several workers may bury at once."""


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(add_completion=False)
    command(
        group,
        "dead",
        examples=("holdfast dead", "holdfast dead --json", "holdfast dead show 17", "holdfast dead replay 17"),
        default_of_group=True,
    )(list_dead)
    command(
        group, "show", examples=("holdfast dead show 17", "holdfast dead show 17 --raw > message", "holdfast dead")
    )(show)
    command(group, "replay", examples=("holdfast dead replay 17", "holdfast dead replay 17 --json", "holdfast dead"))(
        replay
    )
    app.add_typer(group, name="dead")


async def list_dead(invocation: Invocation) -> None:
    """List dead letters, oldest first: what could not be processed, why, and where it came from.

    Nothing is thrown away: each keeps the whole message.
    """
    from holdfast.ops.system import open_system
    from holdfast.streams.dead import read_dead_letters

    rows: list[tuple[object, ...]] = []
    async with open_system(invocation.loaded) as system, system.open_connection() as connection:
        async for seq, letter in read_dead_letters(connection):
            if invocation.json:
                output.write_json(letter_json(seq, letter))
            else:
                rows.append(
                    (seq, _origin(letter), letter.seq, letter.code, letter.reason, iso_from_ms(letter.died_at_ms))
                )
    if invocation.json:
        return
    if not rows:
        output.remark("no dead letters")
    else:
        output.write_table(("seq", "stream", "origin seq", "code", "reason", "died at"), rows, right=("seq",))


async def show(
    invocation: Invocation,
    seq: Annotated[int, typer.Argument(min=1, help="Its sequence, as 'holdfast dead' lists it.")],
    raw: Annotated[bool, typer.Option("--raw", help="Write the exact bytes of the message and nothing else.")] = False,
) -> None:
    """Show one dead letter with the message as it came."""
    from holdfast.ops.system import open_system

    async with open_system(invocation.loaded) as system, system.open_connection() as connection:
        letter = await _find(connection, seq)
    if raw:
        output.write_bytes(letter.payload)
    elif invocation.json:
        output.write_json({**letter_json(seq, letter), "headers": letter.headers, **_payload(letter.payload)})
    else:
        _write_letter(seq, letter)


async def replay(
    invocation: Invocation,
    seq: Annotated[int, typer.Argument(min=1, help="Its sequence, as 'holdfast dead' lists it.")],
) -> None:
    """Hand an event once more to the handler that gave it up.

    That handler alone is handed it, as if for the first time; when none of its name runs, it waits for one. The letter
    stays.
    """
    from holdfast.client.handler_control import redelivery_of
    from holdfast.ops.system import open_system
    from holdfast.streams.events import EventLog

    async with open_system(invocation.loaded) as system, system.open_connection() as connection:
        letter = await _find(connection, seq)
        event = redelivery_of(letter)
        if event is None or letter.handler is None:
            raise InvalidFieldError(
                f"dead letter {seq} is not an event that a handler gave up: there is nobody to hand it to",
                field="seq",
                hint=f"write its bytes with 'holdfast dead show {seq} --raw', mend them and publish them again",
            )
        log = EventLog(connection)
        await log.publish_many([event])
        await log.close()
    if invocation.json:
        output.write_json({"seq": seq, "handler": letter.handler.name, "namespace": event.namespace})
    else:
        output.remark(f"handed to the handler {letter.handler.name} again")


async def _find(connection: Connection, seq: int) -> DeadLetter:
    from holdfast.streams.dead import read_dead_letters

    # From a little before: the second half of a letter that was cut in two stands before it.
    async with aclosing(read_dead_letters(connection, after_seq=max(0, seq - _BEFORE))) as letters:
        async for found, letter in letters:
            if found == seq:
                return letter
            if found > seq:
                break
    raise NotFoundError(f"there is no dead letter {seq}", field="seq", hint="list them with 'holdfast dead'")


def _origin(letter: DeadLetter) -> str:
    return letter.stream if letter.handler is None else f"handler {letter.handler.name}"


def letter_json(seq: int, letter: DeadLetter) -> dict[str, Any]:
    """Returns a dead letter as ``--json`` lists it: all but the message itself."""
    return {
        "seq": seq,
        "stream": letter.stream,
        "epoch": letter.epoch,
        "origin_seq": letter.seq,
        "subject": letter.subject,
        "code": letter.code,
        "reason": letter.reason,
        "stored_at": iso_from_ms(letter.stored_at_ms),
        "died_at": iso_from_ms(letter.died_at_ms),
        "size": len(letter.payload),
        **({} if letter.handler is None else {"handler": letter.handler.name}),
    }


def _payload(payload: bytes) -> dict[str, Any]:
    try:
        return {"payload": payload.decode()}
    except UnicodeDecodeError:
        return {"payload_base64": payload}


def _write_letter(seq: int, letter: DeadLetter) -> None:
    for name, value in letter_json(seq, letter).items():
        output.write_line(f"{name:<11} {value}")
    for name, value in letter.headers.items():
        output.write_line(f"header      {name}: {value}")
    output.write_line()
    try:
        output.write_line(letter.payload.decode())
    except UnicodeDecodeError:
        output.write_line(f"({len(letter.payload)} bytes that are no text; --raw writes them)")
