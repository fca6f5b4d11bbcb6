"""What the fuzz campaign found, one case each: a typed error where something else left."""

from __future__ import annotations

from pathlib import Path

import pytest
from nats.aio.msg import Msg

from holdfast.client.cold import _refusal
from holdfast.client.handler_control import decode_instruction
from holdfast.client.lineage_context import HEADER, from_headers, to_headers
from holdfast.ops.settings import load_settings
from holdfast.schemas.errors import (
    MESSAGE_CHARS,
    ConfigurationError,
    HoldfastError,
    IntegrityError,
    InvalidFieldError,
    InvalidNameError,
    UnavailableError,
)
from holdfast.streams.messages import message_of_delivery, parse_time_ms
from holdfast.streams.tolerant_client import TolerantClient
from holdfast.streams.wire import parse_event_subject, parse_key_subject


@pytest.mark.parametrize("text", ["a = " + "9" * 5_000, "a = " + "[" * 100_000], ids=["long number", "deep"])
def test_a_settings_file_that_toml_cannot_hold_is_told_as_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "holdfast.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="is not TOML"):
        load_settings(config=path, environ={}, cwd=tmp_path)


@pytest.mark.parametrize("reply", ["$JS.ACK.", "$JS.ACK.....", "$JS.ACK.s.c.1.x.1.1.1", "$JS.ACK." + "9" * 5_000])
def test_a_delivery_that_the_server_did_not_write_is_refused(reply: str) -> None:
    with pytest.raises(UnavailableError):
        message_of_delivery("a", {}, b"", reply, "e")


@pytest.mark.parametrize("text", ["2026W05", "2026-01-31T09:30:00", "", "x"])
def test_a_time_without_a_zone_is_no_time_of_the_server(text: str) -> None:
    with pytest.raises(IntegrityError):
        parse_time_ms(text)


def test_an_instruction_that_is_not_utf8_is_none() -> None:
    assert decode_instruction(b'{"do":"\xed"') is None


def test_a_name_has_one_subject() -> None:
    with pytest.raises(InvalidNameError):
        parse_event_subject("ctx.a.event.b.x--c_3ad")
    with pytest.raises(InvalidNameError):
        parse_key_subject("$KV.ctx-keys.a.x--c_2ed")
    with pytest.raises(InvalidNameError):
        parse_key_subject("$KV.ctx-keys.a." + ".".join("k" * 33))


def test_a_subject_in_a_header_keeps_its_last_character() -> None:
    read = TolerantClient._parse_header_lines(b"Nats-Subject: $KV.ctx-keys.a.plan\x0b \r\n")
    assert read == {"Nats-Subject": "$KV.ctx-keys.a.plan\x0b"}


def test_a_lineage_travels_in_printable_characters() -> None:
    assert all(" " <= character <= "~" for value in to_headers({"x": "\x7f\x1fé"}).values() for character in value)


def test_a_message_of_an_error_is_bounded() -> None:
    assert len(HoldfastError("x" * 1_000_000).message) == MESSAGE_CHARS + 1


def test_a_refusal_of_a_thousand_brackets_is_told_as_one() -> None:
    error = _refusal(Msg(_client=None, data=b'{"a":' * 5_000))  # type: ignore[arg-type]
    assert isinstance(error, UnavailableError)


@pytest.mark.parametrize("text", ["\ud800", '{"a":' * 5_000], ids=["surrogate", "deep"])
def test_a_lineage_header_that_is_no_json_is_told_as_one(text: str) -> None:
    with pytest.raises(InvalidFieldError, match="is not a JSON object"):
        from_headers({HEADER: text})
