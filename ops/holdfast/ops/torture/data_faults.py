"""Faults that are in what is sent or stored: repetitions, garbage, streams that are not what they were."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
from typing import Any, Final

import nats
import nats.errors

from holdfast.ops.torture.faults import register
from holdfast.ops.torture.ground import Ground
from holdfast.ops.torture.plain import STREAMS
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.connection import open_connection
from holdfast.streams.retry import call_with_retry
from holdfast.workers.control import accept_gap, archiver_status, evict, flush, trim

POISONED: Final = "poisoned"
"""The namespace of what nobody can decode: not one that a checker reads."""

_AGAIN: Final = 200
_TIMEOUT_S: Final = 3.0
_SETTLE_S: Final = 60.0


@register("duplicate", "events published again, in another order, some without the id that the server knows them by")
async def duplicate(ground: Ground, choice: random.Random) -> None:
    """Publishes some of the newest events again, as a confused relay would."""
    client = await nats.connect(ground.rig.url, connect_timeout=5)
    try:
        found = await _newest(client, STREAMS["events"], choice.randint(20, _AGAIN))
        choice.shuffle(found)
        js = client.jetstream(timeout=_TIMEOUT_S)
        for subject, payload, headers in found:
            sent = dict(headers)
            if b'"id":' in payload and choice.random() < 0.5:
                # The event says its id itself: without the header, the server takes it for another one.
                sent.pop("Nats-Msg-Id", None)
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await js.publish(subject, payload, headers=sent)
                ground.count("published again")
    finally:
        await client.close()


async def _newest(client: Any, stream: str, count: int) -> list[tuple[str, bytes, dict[str, str]]]:
    info = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=_TIMEOUT_S)).data)
    last, first = info["state"]["last_seq"], info["state"]["first_seq"]
    found: list[tuple[str, bytes, dict[str, str]]] = []
    for seq in range(max(first, last - count), last + 1):
        reply = await client.request(
            f"$JS.API.DIRECT.GET.{stream}", json.dumps({"seq": seq}).encode(), timeout=_TIMEOUT_S
        )
        headers = dict(reply.headers or {})
        if "Nats-Subject" in headers:
            own = {name: value for name, value in headers.items() if name == "Nats-Msg-Id" or name[:3] == "Hf-"}
            found.append((headers["Nats-Subject"], reply.data, own))
    return found


@register("evict", "everything archived leaves the hot tier, and old versions of keys", needs=("workers",))
async def evict_archived(ground: Ground, choice: random.Random) -> None:
    """Evicts by the archiver; one that does not answer just then is let be."""
    async with open_connection(ground.rig.url) as connection:
        try:
            if choice.random() < 0.5:
                await flush(connection, timeout_s=_SETTLE_S)
            ground.count("evicted", (await evict(connection, 0.0, timeout_s=_SETTLE_S)).purged > 0)
            if choice.random() < 0.5:
                await trim(connection, 1, timeout_s=_SETTLE_S)
        except HoldfastError:
            ground.count("evict put off")


@register("poison", "messages that nobody can decode, on every stream")
async def poison(ground: Ground, choice: random.Random) -> None:
    """Publishes garbage: the archiver is to file it away and go on."""
    client = await nats.connect(ground.rig.url, connect_timeout=5)
    garbage = (b"", b"\xff\xfe\x00", b'{"v":', b"[" * 5_000, b'{"version":-1,"op":"put"}', b'{"timestamp":"\\ud800"}')
    subjects = (f"ctx.{POISONED}.event.nobody.bad", f"$KV.ctx-hot.{POISONED}.k", f"$KV.ctx-keys.{POISONED}.k")
    try:
        js = client.jetstream(timeout=_TIMEOUT_S)
        for _ in range(choice.randint(1, 12)):
            subject = f"{choice.choice(subjects)}{choice.randrange(10**6)}"
            headers = choice.choice((None, {"Hf-Enc": "zstd"}, {"Hf-Kind": "plan"}, {"Hf-Form": "manifest"}))
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await js.publish(subject, choice.choice(garbage), headers=headers)
                ground.count("poisoned")
    finally:
        await client.close()


@register("oversize", "a message over the server's limit, and a subject over the protocol's")
async def oversize(ground: Ground, choice: random.Random) -> None:
    """Sends more than may be, on a connection of its own, which the server closes."""
    size = choice.choice((1_048_577, 2_000_000))
    frame = (
        b"PUB ctx.%b.event.nobody.large %d\r\n" % (POISONED.encode(), size) + b"x" * size + b"\r\n"
        if choice.random() < 0.5
        else b"PUB ctx.%b.event.%b 2\r\n{}\r\n" % (POISONED.encode(), b"y" * 5_000)
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", ground.rig.port)
    try:
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(b'CONNECT {"verbose":false}\r\n' + frame)
            await asyncio.wait_for(writer.drain(), _TIMEOUT_S)
            async with asyncio.timeout(_TIMEOUT_S):
                while await reader.read(4_096):
                    pass
        ground.count("oversized")
    finally:
        writer.close()


@register("lost-tail", "a log that begins again where it was some seconds ago, all of it archived", needs=("workers",))
async def lost_tail(ground: Ground, choice: random.Random) -> None:
    """Puts the server's files back to what they were: what was stored since is in the lake alone.

    The producers pause while the two states are taken: what nobody has archived would be lost rightly.
    """
    rig = ground.rig
    kept = rig.directory / "kept-nats"
    shutil.rmtree(kept, ignore_errors=True)
    try:
        await rig.pause_producers()
        await rig.kill_server()
        await asyncio.to_thread(shutil.copytree, rig.nats_data, kept)
        await rig.start_server(with_streams=False)
        rig.resume_producers()
        await asyncio.sleep(choice.uniform(0.3, 1.5))
        await rig.pause_producers()
        await _archive_all(ground)
        await rig.kill_server()
        await asyncio.to_thread(shutil.rmtree, rig.nats_data)
        await asyncio.to_thread(shutil.move, kept, rig.nats_data)
        await rig.start_server(with_streams=False)
        await _accept(ground)
    finally:
        rig.resume_producers()
        await asyncio.to_thread(shutil.rmtree, kept, ignore_errors=True)


@register("recreated-stream", "a stream that is deleted and made anew, all of it archived", needs=("workers",))
async def recreated_stream(ground: Ground, choice: random.Random) -> None:
    """Deletes one stream, whose content is in the lake, and has it made anew by an operator who accepts that."""
    rig = ground.rig
    stream = choice.choice(list(STREAMS.values()))
    try:
        await rig.pause_producers()
        await _archive_all(ground)
        await rig.stop(*ground.worker_names)
        client = await nats.connect(rig.url, connect_timeout=5)
        try:
            await client.jetstream(timeout=_TIMEOUT_S).delete_stream(stream)
        finally:
            await client.close()
        ground.count(f"recreated {stream}")
        for name in ground.worker_names:
            await ground.start_worker(name, accept_lost_streams=True)
        await _accept(ground)
    finally:
        rig.resume_producers()


async def _archive_all(ground: Ground) -> None:
    async with open_connection(ground.rig.url) as connection:
        await call_with_retry(lambda: flush(connection, timeout_s=_SETTLE_S), deadline_s=_SETTLE_S)


async def _accept(ground: Ground) -> None:
    """Does what the alarm asks of an operator, until nothing is wrong any more."""
    until = asyncio.get_running_loop().time() + _SETTLE_S
    told: list[str] = []
    async with open_connection(ground.rig.url) as connection:
        while asyncio.get_running_loop().time() < until:
            try:
                await flush(connection, timeout_s=_SETTLE_S)
                told = [problem.what for problem in (await archiver_status(connection)).problems]
                if not told:
                    return
                for table in STREAMS:
                    await accept_gap(connection, table)  # type: ignore[arg-type]  # the names are those of the tables
            except HoldfastError as error:
                told = [str(error)]
                with contextlib.suppress(HoldfastError):
                    for table in STREAMS:
                        await accept_gap(connection, table)  # type: ignore[arg-type]
            await asyncio.sleep(0.2)
    ground.problems.append(f"after {_SETTLE_S:.0f} s and what the alarm asks for there is still: {told}")
