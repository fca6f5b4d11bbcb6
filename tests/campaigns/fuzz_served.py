"""Fuzzes a whole system through a real server: requests to every endpoint, messages on every stream.

A request is answered, or refused with a typed error, within a second of the resolver's time; a message of a stream
becomes a row or a dead letter; afterwards every worker runs and serves, and health tells nothing that was not there
before.  Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import Holdfast, connect
from holdfast.schemas import errors
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import HOT_PREFIX, STREAM_OF_TABLE
from holdfast.workers.control import archiver_status, flush
from tests.campaigns import fuzz_inputs as make
from tests.campaigns.fuzz import Outcome, Report, Violation, literal
from tests.campaigns.fuzz_targets import REQUESTS, header_block, make_envelope, make_version, request_value
from tests.campaigns.fuzz_targets.messages import _EVENT_MEMBERS, _event_value
from tests.running import running, settings_in
from tests.support import LIMIT_S, OwnServer, plain_client, raw_publish

if TYPE_CHECKING:
    from nats.aio.client import Client

SLOW_S: Final = 1.0
_TOGETHER: Final = 16
"""Requests under way at once."""

_EVERY: Final = 500
_LARGEST: Final = 900_000
_INBOX: Final = "_INBOX.fuzz."
_CODES: Final = frozenset(
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HoldfastError)
) - {"error"}
"""Codes of typed errors: the root's own is what an unexpected exception is told as."""

_NOT_IN_SUBJECT: Final = bytes.maketrans(b" \t\r\n", b"____")


async def trial_served(count: int, report: Report, *, say: Callable[[str], None]) -> None:
    """Sends ``count`` inputs through a server with every worker and adds what came of them to the report."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-fuzz-"))
    server = OwnServer(folder / "nats")
    rng = random.Random(f"{report.seed}-served")
    outcome = Outcome()
    seen: Counter[str] = Counter()
    started = time.perf_counter()
    try:
        await server.start()
        async with (
            running(server.url, settings_in(folder)) as workers,
            plain_client(server.url) as plain,
            connect(server.url, "fuzz", "tester", cache_bytes=0) as hf,
        ):
            info = json.loads((await plain.request("$SRV.INFO.holdfast", timeout=LIMIT_S)).data)
            # What each of these costs is no part of what its input does: they take none.
            endpoints = sorted(
                (endpoint["name"], endpoint["subject"])
                for endpoint in info["endpoints"]
                if endpoint["name"] not in ("health", "metrics", "stats")
            )
            while outcome.inputs < count and not report.violations:
                size = min(_TOGETHER, count - outcome.inputs)
                if rng.random() < 0.6:
                    given = [_request(rng, endpoints) for _ in range(size)]
                    found = await asyncio.gather(*(_ask(plain, *request) for request in given))
                    for request, (became, spent_s, wrong) in zip(given, found, strict=True):
                        seen[became] += 1
                        outcome.slowest_s = max(outcome.slowest_s, spent_s)
                        if wrong:
                            report.violations.append(Violation("served", outcome.inputs, wrong, literal(request)))
                else:
                    frames = [_frame(rng) for _ in range(size)]
                    await _send(server.url, frames, report, outcome.inputs)
                    seen["published"] += size
                outcome.inputs += size
                if outcome.inputs // _EVERY > (outcome.inputs - size) // _EVERY:
                    await _check_well(hf, workers, report, outcome.inputs)
                    say(
                        f"served     {outcome.inputs:9,} inputs, {len(report.violations)} violations, "
                        f"{dict(seen.most_common(4))}"
                    )
            await _check_well(hf, workers, report, outcome.inputs)
    finally:
        await server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = round(time.perf_counter() - started, 3)
    outcome.outcomes = dict(seen.most_common(20))
    outcome.digest = f"{rng.getrandbits(64):016x}"
    report.targets["served"] = outcome
    report.served = outcome.inputs


def _request(rng: random.Random, endpoints: list[tuple[str, str]]) -> tuple[str, bytes]:
    endpoint, pattern = rng.choice(endpoints)
    kind = rng.choice(REQUESTS) if rng.random() < 0.1 else _request_of(endpoint)
    payload = make.payload(rng, lambda rng: _well_formed(rng, kind))
    namespace = "fuzz" if rng.random() < 0.9 else make.token(rng).replace(".", "")[:200] or "fuzz"
    subject = pattern.replace("*", namespace, 1)
    if not all(0x21 <= ord(character) < 0x7F for character in subject) or "*" in subject or ">" in subject:
        subject = pattern.replace("*", "fuzz", 1)
    return subject, payload[:_LARGEST]


def _request_of(endpoint: str) -> type[msgspec.Struct] | None:
    wanted = endpoint.replace("_", "").lower()
    return next((kind for kind in REQUESTS if kind.__name__.removesuffix("Request").lower() == wanted), None)


def _well_formed(rng: random.Random, kind: type[msgspec.Struct] | None) -> bytes:
    """A request with every member that it must have, most of them as they should be."""
    if kind is None:
        return make.members(rng, ("ref", "event_id", "key", "limit", "cursor", "session_id"), _request_value)
    chosen = [field.name for field in msgspec.structs.fields(kind) if field.required or rng.random() < 0.2]
    return b"{" + b",".join(b'"' + name.encode() + b'":' + _request_value(rng, name) for name in chosen) + b"}"


def _request_value(rng: random.Random, name: str) -> bytes:
    if rng.random() < 0.15:
        return request_value(rng, name)
    match name:
        case "key" | "prefix":
            return b'"k%d"' % rng.randrange(9)
        case "refs":
            return b'["ctx_note_' + b"a" * 32 + b'"]'
        case "digests":
            return b'["' + b"a" * 32 + b'"]'
        case "fields" | "tags" | "deletes":
            return b"[]"
        case "kind":
            return b'"note"'
        case "event_id" | "root_event_id" | "parent_event_id" | "session_id" | "agent_id" | "correlation_id":
            return b'"' + make.good_name(rng).encode() + b'"'
        case "body_text" | "changed_by" | "change_type" | "name":
            return b'"x"'
        case "body_base64":
            return b'"eA=="'
        case "limit" | "version" | "v1" | "v2" | "before":
            return b"%d" % rng.randrange(1, 9)
        case "expected_version":
            return b"%d" % rng.randrange(3)
        case _:
            return request_value(rng, name)


async def _ask(plain: Client, subject: str, payload: bytes) -> tuple[str, float, str | None]:
    """Returns what a request became, how long it took, and what is wrong with that, if anything."""
    started = time.perf_counter()
    try:
        reply = await plain.request(subject, payload, timeout=LIMIT_S)
    except Exception as error:  # noqa: BLE001  no reply, whatever the client calls it
        return "none", time.perf_counter() - started, f"{subject}: no answer: {type(error).__name__}"
    spent_s = time.perf_counter() - started
    code = (reply.headers or {}).get("Nats-Service-Error-Code")
    if code is None:
        return "answered", spent_s, None
    try:
        told: dict[str, Any] = json.loads(reply.data)["error"]
    except (ValueError, KeyError, TypeError):
        return "refused", spent_s, f"{subject}: an error reply that is none: {reply.data[:200]!r}"
    wrong = None
    if told["code"] not in _CODES or not told["message"]:
        wrong = f"{subject}: refused with {told}"
    return told["code"], spent_s, wrong


def _frame(rng: random.Random) -> bytes:
    """A message for one of the streams, as bytes of the client protocol: no client library would send it."""
    kind = rng.random()
    if kind < 0.5:
        name = (
            make.text(rng).encode("utf-8", "surrogatepass")[:500]
            if rng.random() < 0.3
            else make.token(rng).encode("utf-8", "replace")
        )
        subject = b"ctx.fuzz.event." + make.good_name(rng).encode() + b"." + name
        payload = make.payload(rng, lambda rng: make.members(rng, _EVENT_MEMBERS, _event_value))
    elif kind < 0.75:
        given = make_version(rng)
        subject, payload = given[0].encode("utf-8", "replace")[:1_000], given[2]
    else:
        form, value = make_envelope(rng)
        payload = value[2] if form == "stored" else value
        digest = value[0] if form == "stored" else "a" * 32
        subject = f"{HOT_PREFIX}fuzz.{digest}".encode("utf-8", "replace")[:1_000]
    subject = subject.translate(_NOT_IN_SUBJECT).replace(b"..", b".x").strip(b".") or b"ctx.fuzz.event.a.b"
    # Wildcards are literal characters of a subject that is published to, so they stay.
    payload = payload[:_LARGEST]
    block = b"NATS/1.0\r\n"
    if rng.random() < 0.4:
        block = header_block(rng)
        block = block if block.startswith(b"NATS/1.0") and block.endswith(b"\r\n\r\n") else b"NATS/1.0\r\n\r\n"
    elif kind >= 0.75:
        block += b"Hf-Kind: note\r\nHf-Enc: zstd\r\n\r\n" if rng.random() < 0.3 else b"Hf-Kind: note\r\n\r\n"
    else:
        return b"PUB %b %d\r\n%b\r\n" % (subject, len(payload), payload)
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (subject, len(block), len(block) + len(payload), block, payload)


async def _send(url: str, frames: list[bytes], report: Report, number: int) -> None:
    try:
        await raw_publish(url, b"".join(frames))
    except TimeoutError:
        report.violations.append(Violation("served", number, "the server took no more messages", literal(frames)))
    except (AssertionError, OSError):
        # The server itself refused one of them and closed the connection: singly, the others arrive.
        for frame in frames:
            with contextlib.suppress(AssertionError, OSError):
                await raw_publish(url, frame)


async def _check_well(hf: Holdfast, workers: Any, report: Report, number: int) -> None:
    """Everything published is archived or a dead letter, every worker runs, and good requests work."""

    def wrong(what: str) -> None:
        report.violations.append(Violation("served", number, what, f"seed {report.seed}"))

    failed = asyncio.ensure_future(workers.wait_failed())
    await asyncio.sleep(0)
    if failed.done():
        wrong(f"a worker ended: {failed.exception()!r}")
        return
    failed.cancel()
    try:
        ref = await hf.put({"good": number})
        event = await hf.emit("all:well", {"n": number}, context=ref)
        await hf.keys.put("all.well", {"n": number})
        # What comes after, as a janitor's word that a key has expired, is no part of the flush.
        before = {stream: (await stream_info(hf.connection, stream)).last_seq for stream in STREAM_OF_TABLE.values()}
        await flush(hf.connection)
        if (await hf.resolve(ref)).body != {"good": number}:
            wrong("another body was served")
        found = [item.event_id async for item in hf.query(event_id=event.event_id)]
        if found != [event.event_id]:
            wrong(f"a good event is there {len(found)} times")
        status = await archiver_status(hf.connection)
        for table, stream in STREAM_OF_TABLE.items():
            if status.tables[table].watermark < before[stream]:
                wrong(f"{stream} is archived up to {status.tables[table].watermark} of {before[stream]}")
        problems = [problem for problem in (await hf.health())["problems"] if problem["object"] != "CTX_DEAD"]
        if problems:
            wrong(f"health tells {problems[0]}")
        failures = sum(counts["failed"] for counts in workers.counters()["resolver"].values())
        if failures:
            wrong(f"{failures} requests failed unexpectedly: see the log")
    except HoldfastError as error:
        wrong(f"the system is not well: {type(error).__name__}: {error}")


__all__ = ["trial_served"]
