"""``holdfast put`` and ``holdfast resolve``."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas import limits
from holdfast.schemas.errors import (
    HoldfastError,
    InputError,
    IntegrityError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidRefError,
    NotFoundError,
)
from holdfast.schemas.refs import JSON, Ref, parse_ref

if TYPE_CHECKING:
    from holdfast.client import Context, Holdfast

_FIRST_WINDOW: Final = 64
_WINDOW_BYTES: Final = 16 * limits.MIB
"""References are asked for many at a time, but no more than about this many bytes of bodies are held at once."""


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(
        app,
        "put",
        examples=(
            'holdfast put \'{"goal": "book a flight"}\' --kind plan',
            "holdfast put --file report.md --content-type 'text/markdown; charset=utf-8'",
            "some-agent | holdfast put - --kind completion --json",
            "holdfast put --file secrets.json --encrypt",
        ),
    )(put)
    command(
        app,
        "resolve",
        examples=(
            "holdfast resolve ctx_plan_3q7…",
            "holdfast resolve ctx_report_7xa… --raw > report.md",
            "holdfast query --session s1 --json | jq -r .context_ref | holdfast resolve - --json",
        ),
    )(resolve)


async def put(
    invocation: Invocation,
    body: Annotated[str | None, typer.Argument(help="The body; - reads it from standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the body from a file.")] = None,
    kind: Annotated[str, typer.Option("--kind", "-k", help="What sort of thing it is; part of the reference.")] = (
        "context"
    ),
    content_type: Annotated[
        str | None,
        typer.Option("--content-type", help="Its type (JSON for an object or array, else text or bytes)."),
    ] = None,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Encrypt it with the active key of 'holdfast encryption'.")
    ] = False,
) -> None:
    """Store a context and print its reference, once it is stored durably.

    The bytes are stored exactly as they are given. An equal context is stored once: the same reference comes back.
    """
    from holdfast.ops.system import open_system

    raw = read_body(body, file)
    chosen = content_type or guess_content_type(raw)
    loaded = invocation.loaded
    async with open_system(loaded) as system, system.connect(loaded.settings.namespace) as hf:
        ref = await hf.put(raw, kind=kind, content_type=chosen, encrypt=encrypt)
    if invocation.json:
        output.write_json({"ref": ref})
    else:
        output.write_line(ref)


def read_body(body: str | None, file: Path | None) -> bytes:
    """Returns the body that a command is given: as an argument, on standard input (``-``) or in a file."""
    if (body is None) == (file is None):
        raise InvalidFieldError(
            "give the body as an argument, or with --file", field="body", hint="- as the argument reads standard input"
        )
    if file is not None:
        return read_file(file)
    if body == "-":
        return sys.stdin.buffer.read(limits.BODY_BYTES + 1)
    assert body is not None
    # As it was typed, whatever its encoding: the shell hands over bytes.
    return body.encode("utf-8", "surrogateescape")


def read_file(path: Path) -> bytes:
    """Returns a file's bytes, at most one more than a body may have; raises a typed error."""
    try:
        with path.open("rb") as opened:
            return opened.read(limits.BODY_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {str(path)!r}", field="file") from error
    except OSError as error:
        raise InvalidFieldError(f"{str(path)!r} cannot be read: {error.strerror}", field="file") from error


def guess_content_type(raw: bytes) -> str:
    """Returns JSON for what is a valid JSON object or array, text for other UTF-8, else that of plain bytes."""
    from holdfast.schemas.bodies import BINARY, TEXT, check_json

    if raw.lstrip()[:1] in (b"{", b"["):
        try:
            check_json(raw)
        except InputError:
            pass  # text that begins with a bracket
        else:
            return JSON
    try:
        raw.decode()
    except UnicodeDecodeError:
        return BINARY
    return TEXT


async def resolve(
    invocation: Invocation,
    refs: Annotated[list[str], typer.Argument(metavar="REF…", help="References; - reads them from standard input.")],
    raw: Annotated[bool, typer.Option("--raw", help="Write the exact bytes of the bodies and nothing else.")] = False,
) -> int:
    """Print contexts by their references, from the hot tier or the lake.

    Each body is checked against its reference. Unknown references are named on stderr, and the exit status is 4.
    """
    from holdfast.ops.system import open_system

    loaded = invocation.loaded
    namespace = loaded.settings.namespace
    status = exit_codes.OK
    async with open_system(loaded, ("resolver",)) as system, system.connect(namespace) as hf:
        async for outcome in resolve_all(hf, _given_refs(refs)):
            if isinstance(outcome, HoldfastError):
                output.report_error(outcome, as_json=invocation.json)
                # Damage outweighs a typing error, and that what is merely not there.
                status = max(status, exit_codes.exit_code_of(outcome), key=_severity)
            elif raw:
                output.write_bytes(outcome.raw)
            elif invocation.json:
                output.write_json(context_json(outcome))
            else:
                _write_context(outcome)
    return status


def _severity(status: int) -> int:
    order = (exit_codes.OK, exit_codes.NOT_FOUND, exit_codes.USAGE, exit_codes.UNAVAILABLE, exit_codes.VIOLATION)
    return order.index(status) if status in order else len(order)


def _given_refs(arguments: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        if argument != "-":
            yield argument
            continue
        for line in sys.stdin:
            yield from line.split()


async def resolve_all(hf: Holdfast, refs: Iterable[str]) -> AsyncIterator[Context | HoldfastError]:
    """Yields, in order, the context of each reference or why there is none; bounded in memory."""
    window = _FIRST_WINDOW
    pending: list[str] = []
    source = iter(refs)
    while True:
        for ref in source:
            pending.append(ref)
            if len(pending) >= window:
                break
        if not pending:
            return
        size = 0
        async for outcome in _resolve_window(hf, pending):
            size += 0 if isinstance(outcome, HoldfastError) else outcome.size
            yield outcome
        # The next window is as wide as bodies of this size allow.
        mean = max(1, size // len(pending))
        window = min(max(1, _WINDOW_BYTES // mean), limits.BATCH_REFS, 4 * window)
        pending = []


async def _resolve_window(hf: Holdfast, refs: list[str]) -> AsyncIterator[Context | HoldfastError]:
    errors: dict[str, HoldfastError] = {}
    for ref in refs:
        try:
            parse_ref(ref)
        except InvalidRefError as error:
            errors[ref] = error
    wanted = [ref for ref in refs if ref not in errors]
    try:
        found = (await hf.resolve_many(wanted)).found
    except IntegrityError:
        # One of them is damaged: the others are not to suffer for it.
        found = {}
        for ref in dict.fromkeys(wanted):
            try:
                found[Ref(ref)] = await hf.resolve(ref)
            except (IntegrityError, NotFoundError) as error:
                errors[ref] = error
    for ref in refs:
        context = found.get(Ref(ref))
        if context is None:
            yield errors.get(ref) or _unknown(hf.namespace, ref)
        else:
            yield _opening_error(context) or context


def _opening_error(context: Context) -> HoldfastError | None:
    """Opens an encrypted context, for its key may be lost; a plain one needs no opening."""
    try:
        _ = context.raw
    except HoldfastError as error:
        return error
    return None


def _unknown(namespace: str, ref: str) -> NotFoundError:
    return NotFoundError(
        f"no context {ref} in namespace {namespace!r}",
        field="ref",
        hint="it may have expired, or belong to another namespace",
    )


def context_json(context: Context) -> dict[str, Any]:
    """Returns a context as ``resolve --json`` prints it; bytes that are no text go into ``body_base64``."""
    import msgspec

    from holdfast.schemas.ids import iso_from_ms, ms_from_utc

    shown: dict[str, Any] = {"ref": context.ref, "kind": context.kind}
    if _is_json(context):
        # The numbers as they were written; only a pretty-printed body loses its line breaks.
        body = context.raw if b"\n" not in context.raw else msgspec.json.format(context.raw, indent=-1)
        shown["body"] = msgspec.Raw(body)
    else:
        try:
            shown["body"] = context.raw.decode()
        except UnicodeDecodeError:
            shown["body_base64"] = context.raw
    created_at = iso_from_ms(ms_from_utc(context.created_at))
    return {**shown, "tier": context.tier, "size": context.size, "created_at": created_at}


def _is_json(context: Context) -> bool:
    # Any client may have stored any bytes under application/json.
    from holdfast.schemas.bodies import check_json

    try:
        check_json(context.raw)
    except InputError:
        return False
    return context.content_type == JSON


def _write_context(context: Context) -> None:
    from holdfast.ops.cli.quantities import format_bytes

    created_at = f"{context.created_at:%Y-%m-%d %H:%M:%S} UTC"
    facts = (context.ref, context.content_type, format_bytes(context.size), context.tier, created_at)
    output.write_line("  ".join(facts))
    write_body(context)


def write_body(context: Context) -> None:
    """Writes a body for a person: JSON spread out, text as it is, of other bytes how many there are."""
    import msgspec

    if _is_json(context):
        output.write_bytes(msgspec.json.format(context.raw, indent=2) + b"\n")
        return
    try:
        text = context.body if context.content_type.startswith("text/") else context.raw.decode()
    except (InvalidBodyError, UnicodeDecodeError):
        output.write_line(f"({context.size} bytes that are no text; --raw writes them)")
    else:
        output.write_line(text)
