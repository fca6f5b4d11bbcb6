"""Log lines of the command line and the workers: to stderr, as text or as JSON lines.

Handlers are set here and nowhere else, by the entry point; every module logs a constant message with its facts as
fields.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from holdfast.ops.settings import LogLevel

LogFormat = Literal["text", "json"]

_LEVELS: Final[dict[LogLevel, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# What every record has: the rest are the fields given with ``extra``.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Sends the log of this process to stderr; a second call replaces the first."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("holdfast").setLevel(_LEVELS[level])


class TextFormatter(logging.Formatter):
    """``12:30:01.250 INFO message key=value …``, with the traceback of an error below."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        clock = datetime.fromtimestamp(record.created, tz=UTC).strftime("%H:%M:%S.%f")[:-3]
        parts = [f"{clock} {record.levelname:<7} {record.getMessage()}"]
        parts.extend(f"{name}={_shown(value)}" for name, value in fields_of(record).items() if name != "action")
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Returns what was logged with ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text else text
