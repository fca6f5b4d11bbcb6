"""Nothing of an encrypted body is in any file of the data directory, nor in the log: looked for by planted canaries.

Each way of storing something is a function in ``PLANTS``.  It is run twice: by a client that encrypts, whose canaries
must be nowhere, and by one that does not, whose canaries must be found, for a scan that cannot fail proves nothing.
"""

from __future__ import annotations

import base64
import json
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from backports import zstd

from holdfast.client import ContextClient, EncryptionKeyError, Holdfast, Ref, connect
from holdfast.client.encryption import SEALED
from holdfast.client.key_ring import KeyRing
from holdfast.schemas.policies import KeyPolicy
from holdfast.schemas.refs import JSON, parse_ref
from holdfast.streams.codec import reseal
from holdfast.streams.hot import HotTier
from holdfast.streams.wire import HOT_PREFIX
from holdfast.workers.control import flush
from tests.running import dead_letters, own_server, running, settings_in
from tests.support import plain_client

pytestmark = pytest.mark.asyncio

RING = KeyRing.of({"k1": secrets.token_bytes(32)}, "k1")
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


class Planter:
    """What a plant needs: a client, whether it is to encrypt, the canary, and a place for the references."""

    def __init__(self, hf: Holdfast, url: str, canary: str, *, encrypt: bool) -> None:
        self.hf = hf
        self.url = url
        self.canary = canary
        self.encrypt = encrypt
        self.stored: dict[Ref, Any] = {}

    async def put(self, body: Any, **options: Any) -> Ref:
        ref = await self.hf.put(body, encrypt=self.encrypt, **options)
        self.stored[ref] = body
        return ref


Plant = Callable[[Planter], Awaitable[None]]


async def small(planter: Planter) -> None:
    await planter.put({"note": planter.canary})


async def text_that_compresses(planter: Planter) -> None:
    await planter.put(f"{planter.canary} all work and no play " * 200)


async def chunked(planter: Planter) -> None:
    noise = random.Random(planter.canary).randbytes(300_000)
    await planter.put(noise + planter.canary.encode() + noise + planter.canary.encode())


async def many(planter: Planter) -> None:
    bodies = [{"n": n, "text": f"{n} {planter.canary}"} for n in range(50)]
    refs = await planter.hf.put_many(bodies, encrypt=planter.encrypt)
    planter.stored |= dict(zip(refs, bodies, strict=True))


async def expiring(planter: Planter) -> None:
    await planter.put([planter.canary], expires_at=datetime.now(UTC) + timedelta(days=1))


async def told_by_an_event(planter: Planter) -> None:
    ref = await planter.put({"result": planter.canary})
    await planter.hf.emit("step:done", {"n": 1}, context=ref, session="s1")


async def dead_letter(planter: Planter) -> None:
    """A stored form under a key that is none: the archiver cannot make anything of it and keeps it whole."""
    await bury(planter, f"{HOT_PREFIX}{planter.hf.namespace}.no-digest-{planter.encrypt}")


async def damaged(planter: Planter) -> None:
    """A stored form under the key of another: it fails its check, and that is told with a reason."""
    await bury(planter, f"{HOT_PREFIX}{planter.hf.namespace}.{'a' * 31}{'e' if planter.encrypt else 'p'}")


async def bury(planter: Planter, subject: str) -> None:
    ref = await planter.put({"lost": planter.canary})
    row = await HotTier(planter.hf.connection).get_stored(planter.hf.namespace, parse_ref(ref).digest)
    assert row is not None
    headers, payload = reseal(row)
    async with plain_client(planter.url) as client:
        await client.jetstream().publish(subject, payload, headers=headers)


async def named(planter: Planter) -> None:
    """Every way of changing a key, on one that was begun encrypted: it stays so."""
    keys = planter.hf.keys
    key = f"secret.{planter.encrypt}"
    await keys.put(key, {"a": planter.canary}, encrypt=planter.encrypt)
    await keys.patch(key, {"b": f"{planter.canary} patched"})
    await keys.update(key, lambda body: {**body, "c": [planter.canary] * 3})
    await keys.put(key, f"{planter.canary} again", encrypt=planter.encrypt)
    await keys.rollback(key, 2)
    await keys.delete(key)
    await keys.commit({f"{key}.{n}": [n, planter.canary] for n in range(3)}, encrypt=planter.encrypt)


async def grown(planter: Planter) -> None:
    """A conversation that would share its parts if it were not encrypted."""
    key = f"conversation.{planter.encrypt}"
    await planter.hf.keys.put(key, [], encrypt=planter.encrypt)
    for turn in range(12):
        await planter.hf.keys.append(key, {"turn": turn, "said": f"{planter.canary} {turn} " * 20})


async def by_policy(planter: Planter) -> None:
    """A prefix whose bodies are encrypted without the writer's doing."""
    prefix = f"policy.{planter.encrypt}."
    await planter.hf.keys.set_policy(prefix, KeyPolicy(encrypt=planter.encrypt))
    await planter.hf.keys.put(f"{prefix}a", {"secret": planter.canary})
    await planter.hf.keys.append(f"{prefix}b", planter.canary)


async def by_the_store(planter: Planter) -> None:
    async with ContextClient(client=planter.hf) as client:
        key = f"notes-{planter.encrypt}"
        await client.store(key, {"note": planter.canary}, {"encrypt": planter.encrypt})
        await client.update(key, {"more": planter.canary}, {"changeType": "merge"})


PLANTS: Final[tuple[Plant, ...]] = (
    named,
    grown,
    by_policy,
    by_the_store,
    small,
    text_that_compresses,
    chunked,
    many,
    expiring,
    told_by_an_event,
    dead_letter,
    damaged,
)


def forms(canary: str) -> Iterator[bytes]:
    """How a canary might be written: as it is, in hexadecimal, in base64 at each of the three offsets."""
    raw = canary.encode()
    yield raw
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for offset in range(3):
        # The first and the last characters depend on the neighbours.
        encoded = base64.b64encode(bytes(offset) + raw).rstrip(b"=")
        yield encoded[4 if offset else 0 : -4]
        yield base64.urlsafe_b64encode(bytes(offset) + raw).rstrip(b"=")[4 if offset else 0 : -4]


def contents(data: bytes) -> Iterator[bytes]:
    """A file's bytes, and what each zstd frame in them holds: bodies in streams, pages of Parquet, frames in frames."""
    yield data
    start = data.find(ZSTD_MAGIC)
    while start >= 0:
        try:
            yield from contents(zstd.ZstdDecompressor().decompress(memoryview(data)[start:]))
        except zstd.ZstdError:
            pass  # four bytes that look like the beginning of a frame
        start = data.find(ZSTD_MAGIC, start + 1)


def sightings(directory: Path, canaries: dict[str, str]) -> dict[str, set[str]]:
    """By name of a canary, the files that it is in."""
    needles = {name: set(forms(canary)) for name, canary in canaries.items()}
    seen: dict[str, set[str]] = {name: set() for name in canaries}
    for path in directory.rglob("*"):
        if not path.is_file():
            continue
        for content in contents(path.read_bytes()):
            for name, wanted in needles.items():
                if any(needle in content for needle in wanted):
                    seen[name].add(str(path.relative_to(directory)))
    return seen


async def test_E12_E32_E60_no_file_and_no_log_holds_what_was_encrypted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    settings = settings_in(tmp_path)
    canaries: dict[str, str] = {}
    sealed: dict[Ref, Any] = {}
    plain: dict[Ref, Any] = {}
    async with own_server(tmp_path) as server, running(server.url, settings), connect(server.url, key_ring=RING) as hf:
        for encrypt, stored in ((True, sealed), (False, plain)):
            for plant in PLANTS:
                name = f"{'sealed' if encrypt else 'plain'} {plant.__name__}"
                canaries[name] = f"canary{secrets.token_hex(16)}"
                planter = Planter(hf, server.url, canaries[name], encrypt=encrypt)
                await plant(planter)
                stored.update(planter.stored)
        await flush(hf.connection)
        letters = await dead_letters(hf)
        types = sorted(letter.headers.get("Hf-Type", JSON) for letter in letters)
        assert types == [JSON, JSON, SEALED, SEALED]

        async with connect(server.url, cache_bytes=0, key_ring=RING) as reader:
            found = (await reader.resolve_many([*sealed, *plain])).found
            assert {ref: context.body for ref, context in found.items()} == sealed | plain
            assert {context.key_id for ref, context in found.items() if ref in sealed} == {"k1"}
        # Who has no key gets the plain ones, and of the others a typed error each.
        async with connect(server.url, cache_bytes=0, key_ring=KeyRing.of({"k2": bytes(32)}, "k2")) as stranger:
            found = (await stranger.resolve_many([*sealed, *plain])).found
            assert {ref: found[ref].body for ref in plain} == plain
            for ref in sealed:
                with pytest.raises(EncryptionKeyError) as caught:
                    _ = found[ref].body
                assert caught.value.key_id == "k1"
        # The resolver has no key: it hands on what is stored.
        async with plain_client(server.url) as client:
            asked = json.dumps({"ref": next(iter(sealed))}).encode()
            answer = json.loads((await client.request("ctx.default.resolve", asked, timeout=20)).data)
        assert answer["content_type"] == SEALED
        assert base64.b64decode(answer["body_base64"]).startswith(b"HFE1\x02k1")
        assert "body" not in answer

    seen = sightings(tmp_path, canaries)
    assert {name: files for name, files in seen.items() if name.startswith("sealed") and files} == {}
    for plant in PLANTS:
        assert any(file.startswith("nats") for file in seen[f"plain {plant.__name__}"]), plant.__name__
        assert any(file.startswith("lake") for file in seen[f"plain {plant.__name__}"]), plant.__name__
    for plant in (dead_letter, damaged):
        assert any("CTX_DEAD" in file for file in seen[f"plain {plant.__name__}"])
    assert not [name for name, canary in canaries.items() if name.startswith("sealed") and canary in caplog.text]
    (tmp_path / "probe").write_text(base64.b64encode(b"x" + canaries["sealed small"].encode()).decode())
    assert sightings(tmp_path, {"small": canaries["sealed small"]}) == {"small": {"probe"}}


async def test_E32_the_near_cache_holds_the_envelope_and_never_the_body(nats_server: str, namespace: str) -> None:
    async with connect(nats_server, namespace, key_ring=RING) as hf:
        ref = await hf.put({"secret": "canary"}, kind="note", encrypt=True)
        context = await hf.resolve(ref)
        assert (context.tier, context.kind, context.body) == ("cache", "note", {"secret": "canary"})
        held = [row.body for *_, row in hf.cache._entries.values()]
        assert held == [context.stored[0]]
        assert b"canary" not in held[0]
        again = await hf.resolve(ref)
        assert (again.raw, again.content_type, again.size) == (msgspec.json.encode(context.body), JSON, 19)


async def test_E32_encrypting_the_same_twice_gives_two_references(nats_server: str, namespace: str) -> None:
    async with connect(nats_server, namespace, key_ring=RING) as hf:
        refs = [await hf.put("same", encrypt=True), *await hf.put_many(["same", "same"], encrypt=True)]
        assert len(set(refs)) == 3
        assert [(await hf.resolve(ref)).body for ref in refs] == ["same"] * 3
        # Handed on as it is, an envelope keeps its reference and opens as before.
        envelope, content_type = (await hf.resolve(refs[0])).stored
        assert await hf.put(envelope, content_type=content_type) == refs[0]


async def test_without_a_key_nothing_is_stored(
    nats_server: str, namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("HOLDFAST_KEYS", "HOLDFAST_KEYS_FILE", "CONTEXT_ENCRYPTION_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    async with connect(nats_server, namespace) as hf:
        with pytest.raises(EncryptionKeyError, match="holdfast encryption init"):
            await hf.put("secret", encrypt=True)
        assert len(hf.cache) == 0
        # The environment is read when a key is first needed, and the plain path never needs one.
        ref = await hf.put("open")
        monkeypatch.setenv("HOLDFAST_KEYS", f"k1={base64.b64encode(bytes(32)).decode()}")
    async with connect(nats_server, namespace) as hf:
        assert (await hf.resolve(ref)).encrypted is False
        assert (await hf.resolve(await hf.put("secret", encrypt=True))).key_id == "k1"
