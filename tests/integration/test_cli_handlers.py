"""The command line about handlers: who is there, how they stand, and letting go of one."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from pathlib import Path

import pytest

from holdfast.client import Event, connect
from tests.command_line import CommandLine, InProcess, Service, in_process


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Path, Service]]:
    directory = tmp_path_factory.mktemp("handlers") / "data"
    with CommandLine(directory).up() as service:
        yield directory, service


@pytest.fixture
def holdfast(
    running: tuple[Path, Service],
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Generator[InProcess]:
    with in_process(running[0], monkeypatch, capfdbinary, HOLDFAST_NAMESPACE=namespace) as commands:
        yield commands


def test_handlers_are_listed_with_how_they_stand_and_forgotten(
    holdfast: InProcess, running: tuple[Path, Service], namespace: str
) -> None:
    url = running[1].ready["nats_url"]

    async def handle_one_and_leave_two() -> None:
        done = asyncio.Event()
        async with connect(url, namespace, "shop") as hf:

            @hf.on("order:*", name="shop.check")
            async def check(_: Event) -> None:
                done.set()

            await hf.emit("order:placed")
            await done.wait()
        async with connect(url, namespace, "customer") as hf:
            for _ in range(2):
                await hf.emit("order:placed")

    assert "no handlers" in holdfast("handler", "list").err
    asyncio.run(handle_one_and_leave_two())
    [listed] = holdfast("handler", "list", "--json").lines
    assert (listed["name"], listed["pattern"], listed["pending"]) == ("shop.check", "order:*", 2)
    assert "shop.check" in holdfast("handler").out
    assert holdfast("stats", "--json").json["handlers"][0]["name"] == "shop.check"
    assert holdfast("handler", "forget", "shop.check", "--json").json == {"handler": "shop.check", "forgotten": True}
    assert holdfast("handler", "list", "--json").lines == []
    assert holdfast("handler", "forget", "shop.check", "--json", status=4).error["code"] == "not_found"
