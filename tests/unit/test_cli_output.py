"""What commands print: values of DuckDB as JSON, bodies by content type, errors in one line, log lines."""

from __future__ import annotations

import json
import logging
import math
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest

from holdfast.client import Context
from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.context_commands import context_json, guess_content_type
from holdfast.ops.cli.sql_command import plain
from holdfast.ops.log_output import JsonFormatter, TextFormatter
from holdfast.schemas import errors
from holdfast.schemas.bodies import BINARY, TEXT
from holdfast.schemas.refs import JSON, compute_digest
from holdfast.schemas.rows import ContextRow


def context(body: bytes, content_type: str) -> Context:
    digest = compute_digest("default", "plan", body, content_type=content_type)
    row = ContextRow(
        namespace="default",
        kind="plan",
        digest=digest,
        content_type=content_type,
        body=body,
        size=len(body),
        stored_at_ms=1_769_851_800_125,
        epoch="e",
        seq=1,
    )
    return Context(row, "hot")


@pytest.mark.parametrize(
    ("raw", "content_type"),
    [(b'{"a": 1}', JSON), (b" [1, 2]\n", JSON), (b"{not json", TEXT), (b"17", TEXT), (b"", TEXT), (b"\xff\x00", BINARY),
     (b'{"a": NaN}', TEXT), (b"[" * 100 + b"]" * 100, TEXT)],
)  # fmt: skip
def test_content_type_is_guessed_from_the_bytes(raw: bytes, content_type: str) -> None:
    assert guess_content_type(raw) == content_type


def test_a_json_body_is_printed_with_its_numbers_as_they_were_written(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    output.write_json(context_json(context(b'{"n": 1.10,\n "big": 123456789012345678901234567890}', JSON)))
    output.flush()
    line = capfdbinary.readouterr().out
    assert line.count(b"\n") == 1
    assert b'"n":1.10' in line
    assert b"123456789012345678901234567890" in line


def test_a_body_is_text_or_base64_where_it_is_no_json() -> None:
    assert context_json(context("grüße".encode(), TEXT))["body"] == "grüße"
    assert context_json(context(b"\xff", BINARY))["body_base64"] == b"\xff"
    # Said to be JSON, by whatever client, and is none.
    assert context_json(context(b"{oops", JSON))["body"] == "{oops"


def test_a_resolved_context_has_the_members_of_the_contract() -> None:
    shown = context_json(context(b"{}", JSON))
    assert list(shown) == ["ref", "kind", "body", "tier", "size", "created_at"]
    assert shown["created_at"] == "2026-01-31T09:30:00.125Z"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (datetime(2026, 1, 31, 9, 30), "2026-01-31T09:30:00"),  # noqa: DTZ001  as DuckDB returns TIMESTAMP
        (date(2026, 1, 31), "2026-01-31"),
        (math.nan, None),
        (math.inf, None),
        ({"a": [date(2026, 1, 31)]}, {"a": ["2026-01-31"]}),
        (None, None),
    ],
)
def test_values_of_duckdb_become_json(value: object, expected: object) -> None:
    assert plain(value) == expected


def test_numbers_and_ids_of_duckdb_are_written_exactly(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output.write_json({"d": Decimal("1.50"), "h": 2**100, "u": uuid.UUID(int=1), "b": b"\x00"})
    output.flush()
    assert capfdbinary.readouterr().out == (
        b'{"d":1.50,"h":1267650600228229401496703205376,"u":"00000000-0000-0000-0000-000000000001","b":"AA=="}\n'
    )


def test_an_error_is_one_line_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.TooLargeError("body has\n9 bytes", hint="split it", field="body", limit=8)
    output.report_error(error, as_json=False)
    assert capsys.readouterr().err == "error: body has 9 bytes; split it\n"
    output.report_error(error, as_json=True)
    assert json.loads(capsys.readouterr().err) == {
        "error": {"code": "too_large", "message": "body has\n9 bytes", "field": "body", "limit": 8, "hint": "split it"}
    }


def test_an_unexpected_error_shows_no_traceback_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(output.DEBUG_VARIABLE, raising=False)
    output.report_error(ValueError("odd"), as_json=False)
    assert "Traceback" not in (err := capsys.readouterr().err)
    assert "ValueError: odd" in err
    monkeypatch.setenv(output.DEBUG_VARIABLE, "1")
    try:
        raise ValueError("odd")
    except ValueError as error:
        output.report_error(error, as_json=False)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidFieldError("x"), exit_codes.USAGE),
        (errors.TooLargeError("x"), exit_codes.USAGE),
        (errors.NotFoundError("x"), exit_codes.NOT_FOUND),
        (errors.UnavailableError("x"), exit_codes.UNAVAILABLE),
        (errors.DataDirectoryError("x"), exit_codes.UNAVAILABLE),
        (errors.DigestMismatchError("x"), exit_codes.VIOLATION),
        (KeyboardInterrupt(), exit_codes.INTERRUPTED),
        (errors.HoldfastError("x"), exit_codes.ERROR),
        (ValueError("x"), exit_codes.ERROR),
    ],
)
def test_the_status_says_what_the_caller_can_do(error: BaseException, status: int) -> None:
    assert exit_codes.exit_code_of(error) == status


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("holdfast.x", logging.INFO, "", 1, "stream purged", None, None)
    made.created = datetime(2026, 1, 31, 9, 30, tzinfo=UTC).timestamp()
    vars(made).update(fields)
    return made


def test_log_lines_carry_their_fields() -> None:
    made = record(action="purged", messages=3, reason="two words")
    assert TextFormatter().format(made) == "09:30:00.000 INFO    stream purged messages=3 reason='two words'"
    assert json.loads(JsonFormatter().format(made)) == {
        "time": "2026-01-31T09:30:00.000+00:00",
        "level": "info",
        "logger": "holdfast.x",
        "message": "stream purged",
        "action": "purged",
        "messages": 3,
        "reason": "two words",
    }
