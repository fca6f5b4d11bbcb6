"""The error hierarchy: what a caller can do is told by class, by code and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

import holdfast.client
from holdfast.client.cold import error_of
from holdfast.schemas import errors
from holdfast.schemas.errors import (
    ConfigurationError,
    DriftError,
    EncryptionKeyError,
    HoldfastError,
    InputError,
    IntegrityError,
    RetryError,
    VersionConflictError,
)
from holdfast.streams.service import ErrorBody

if TYPE_CHECKING:
    from collections.abc import Iterator

BRANCHES = (RetryError, InputError, ConfigurationError, IntegrityError)


def classes(root: type[HoldfastError] = HoldfastError) -> Iterator[type[HoldfastError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


ALL = [each for each in dict.fromkeys(classes()) if each.__module__ == errors.__name__]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [each.code for each in ALL]
    assert len(codes) == len(set(codes))
    for each in ALL:
        assert "code" in vars(each), f"{each.__name__} inherits its code"
        assert each.code.replace("_", "").isalpha()
        assert each.code == each.code.lower()
        assert 400 <= each.status < 600


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_is_on_one_branch(error: type[HoldfastError]) -> None:
    assert sum(issubclass(error, branch) for branch in BRANCHES) == (0 if error is HoldfastError else 1)
    assert error.__doc__


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_is_drawn_in_the_tree(error: type[HoldfastError]) -> None:
    assert f" {error.__name__}" in (errors.__doc__ or "")


def test_the_text_ends_with_what_to_do() -> None:
    error = InputError("it is too red", hint="paint it blue", field="colour", limit=3)
    assert str(error) == "it is too red; paint it blue"
    assert (error.message, error.hint, error.field, error.limit) == ("it is too red", "paint it blue", "colour", 3)
    assert str(InputError("it is too red")) == "it is too red"
    drift = DriftError("differs", differences={"a": (1, 2)}, hint="set it back")
    assert (str(drift), drift.differences) == ("differs; set it back", {"a": (1, 2)})


@pytest.mark.parametrize("error", [each for each in ALL if each is not DriftError], ids=lambda error: error.__name__)
def test_every_code_comes_back_as_its_class(error: type[HoldfastError]) -> None:
    again = error_of(ErrorBody(code=error.code, message="m", field="f", limit=1, hint="h"))
    assert type(again) is error
    assert (again.message, again.field, again.limit, again.hint) == ("m", "f", 1, "h")


def test_what_an_error_carries_travels_with_it() -> None:
    conflict = VersionConflictError("m", key="a.b", expected=3, actual=5, hint="h")
    again = error_of(msgspec.json.decode(msgspec.json.encode(ErrorBody.of(conflict)), type=ErrorBody))
    assert isinstance(again, VersionConflictError)
    assert (again.key, again.expected, again.actual, again.hint) == ("a.b", 3, 5, "h")
    lost = error_of(ErrorBody.of(EncryptionKeyError("m", key_id="k1")))
    assert isinstance(lost, EncryptionKeyError)
    assert lost.key_id == "k1"


def test_what_the_client_can_raise_is_exported_by_it() -> None:
    # The others belong to whoever runs a server or the lake.
    inner = {"DriftError", "DurabilityError", "DataDirectoryError", "FenceError"}
    exported = set(holdfast.client.__all__)
    assert {each.__name__ for each in ALL} - exported == inner


def test_every_exported_name_is_there_and_described() -> None:
    for name in holdfast.client.__all__:
        assert hasattr(holdfast.client, name), name
    assert list(holdfast.client.__all__) == sorted(holdfast.client.__all__)
    for name in ("Holdfast", "Context", "Event", "Resolved", "connect"):
        assert getattr(holdfast.client, name).__doc__
    for name, member in vars(holdfast.client.Holdfast).items():
        if not name.startswith("_") and callable(member):
            assert member.__doc__, name
