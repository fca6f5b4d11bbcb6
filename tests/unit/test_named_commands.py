"""Commands that messages and documents tell the user to run: each exists, with the options that are named."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from holdfast.ops.cli.app import app

ROOT = Path(__file__).parents[2]
_IN_MESSAGES = re.compile(r"'(holdfast [^'\n]+)'")
_IN_DOCUMENTS = re.compile(r"`(holdfast [^`\n|]+)`")
_PLACEHOLDER = re.compile(r"\{[^}]*\}")


def named() -> Iterator[tuple[str, str]]:
    """Yields each place and the words that it names."""
    for package in ("schemas", "streams", "workers", "ops"):
        for path in (ROOT / package / "holdfast").rglob("*.py"):
            for words in _IN_MESSAGES.findall(path.read_text()):
                yield f"{path.relative_to(ROOT)}", words.rstrip("\\ ")
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for words in _IN_DOCUMENTS.findall(path.read_text()):
            yield f"{path.relative_to(ROOT)}", words


NAMED = sorted(set(named()))


def wrong_in(words: str) -> str | None:
    """What of a command line does not exist, or None."""
    found = typer.main.get_command(app)
    _, *rest = shlex.split(_PLACEHOLDER.sub("X", words))
    for word in rest:
        if word.startswith("-") and word != "-":  # that is a file: the standard input
            options = {name for param in found.params for name in param.opts} | {"--help"}
            if word.partition("=")[0] not in options:
                return f"option {word} of {found.name}"
            continue
        commands = getattr(found, "commands", {})
        if word in commands:
            found = commands[word]
        elif word not in ("X", "COMMAND") and not any(param.param_type_name == "argument" for param in found.params):
            takes_value = any(not getattr(param, "is_flag", True) for param in found.params)
            if commands or not takes_value:
                return f"command {word} of {found.name}"
    return None


@pytest.mark.parametrize(("place", "words"), NAMED)
def test_what_users_are_told_to_run_exists(place: str, words: str) -> None:
    assert wrong_in(words) is None


def test_what_does_not_exist_is_found() -> None:
    assert len(NAMED) > 80
    assert wrong_in("holdfast dead list") == "command list of dead"
    assert wrong_in("holdfast vrify") is not None
    assert wrong_in("holdfast verify --shallow") == "option --shallow of verify"
    assert wrong_in("holdfast worker {name}") is None
