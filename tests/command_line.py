"""Shared by the tests of the command line: runs the real thing as a process, as a user would.

Holds no tests itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from holdfast.ops.cli.app import run
from tests.support import LIMIT_S

if TYPE_CHECKING:
    import pytest

MODULE: Final = (sys.executable, "-m", "holdfast.ops.cli")
_OURS: Final = ("HOLDFAST_", "NATS_")


class Outcome:
    """How a command ended: its status, what it wrote, and that read as JSON lines."""

    def __init__(self, done: subprocess.CompletedProcess[bytes]) -> None:
        self.status = done.returncode
        self.raw = done.stdout
        self.err = done.stderr.decode()

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def lines(self) -> list[Any]:
        """Each line of stdout as JSON."""
        return [json.loads(line) for line in self.raw.splitlines()]

    @property
    def json(self) -> Any:
        """The one line of stdout as JSON."""
        (line,) = self.lines
        return line

    @property
    def error(self) -> Any:
        """The ``error`` of the last line of stderr."""
        return json.loads(self.err.splitlines()[-1])["error"]


class CommandLine:
    """Runs commands on one data directory, without any variable of the surroundings."""

    def __init__(self, data: Path, **variables: str) -> None:
        self.data = data
        self.environment = environment(HOLDFAST_DATA=str(data), **variables)

    def __call__(self, *arguments: str, status: int = 0, stdin: bytes = b"") -> Outcome:
        """Runs a command and returns its outcome; it must end with ``status``."""
        done = subprocess.run(
            [*MODULE, *arguments],
            input=stdin,
            capture_output=True,
            env=self.environment,
            cwd=self.data.parent,
            timeout=2 * LIMIT_S,
            check=False,
        )
        outcome = Outcome(done)
        assert outcome.status == status, f"{arguments}: status {outcome.status}\n{outcome.out}\n{outcome.err}"
        assert "Traceback" not in outcome.err, outcome.err
        return outcome

    def start(self, *arguments: str) -> Service:
        """Starts a command that runs until it is stopped."""
        return Service([*MODULE, *arguments], self.environment, self.data.parent)

    @contextlib.contextmanager
    def up(self, *arguments: str) -> Generator[Service]:
        """Runs ``holdfast up`` and yields when it serves; drains it at the end."""
        service = self.start("up", "--json", *arguments)
        try:
            service.read_line()
            yield service
            service.stop()
        finally:
            service.kill()


class InProcess:
    """Runs commands in this process: ten times faster, by the same entry point.  Made by :func:`in_process`."""

    def __init__(self, data: Path, capture: pytest.CaptureFixture[bytes]) -> None:
        self.data = data
        self._capture = capture

    def __call__(self, *arguments: str, status: int = 0, stdin: bytes = b"") -> Outcome:
        """Runs a command and returns its outcome; it must end with ``status``."""
        self._capture.readouterr()
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
        try:
            found = run(list(arguments))
        finally:
            sys.stdin = before
        sys.stdout.flush()
        written = self._capture.readouterr()
        done = subprocess.CompletedProcess(list(arguments), found, written.out, written.err)
        outcome = Outcome(done)
        assert outcome.status == status, f"{arguments}: status {outcome.status}\n{outcome.out}\n{outcome.err}"
        return outcome


@contextlib.contextmanager
def in_process(
    data: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[bytes], **variables: str
) -> Generator[InProcess]:
    """Yields what runs commands on one data directory, without any variable of the surroundings."""
    for name in os.environ:
        if name.startswith(_OURS):
            monkeypatch.delenv(name)
    for name, value in {"HOLDFAST_DATA": str(data), "COLUMNS": "200", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(data.parent)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield InProcess(data, capture)
    finally:
        # The entry point owns the log of its process: here it is pytest's.
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("holdfast").setLevel(logging.NOTSET)


class Service:
    """A command that runs until it is stopped."""

    def __init__(self, command: Sequence[str], variables: dict[str, str], directory: Path) -> None:
        self.ready: Any = None
        self._stderr = (directory / f"stderr-{time.monotonic_ns()}").open("w+b")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._stderr, env=variables, cwd=directory
        )

    def read_line(self) -> Any:
        """Returns the first line that it writes to stdout, as JSON."""
        stdout = self.process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            assert selector.select(LIMIT_S), f"nothing on stdout: {self.err}"
        line = stdout.readline()
        assert line, f"ended with {self.process.wait(LIMIT_S)}: {self.err}"
        self.ready = json.loads(line)
        return self.ready

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def wait(self) -> int:
        """Returns its exit status."""
        return self.process.wait(LIMIT_S)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status, which is expected to be 0."""
        self.process.send_signal(number)
        status = self.wait()
        assert status == 0, f"status {status}: {self.err}"
        return status

    def kill(self) -> None:
        """Makes sure that it is gone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._stderr.close()


def environment(**variables: str) -> dict[str, str]:
    """Returns the variables of this process without Holdfast's and NATS's, and with some more."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return kept | variables
