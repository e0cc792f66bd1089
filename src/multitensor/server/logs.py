"""Logs on stderr: a line of text, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

_ACCESS_FIELDS = ("client", "method", "path", "http_version", "status")  # the arguments of uvicorn's access log


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "message", ...}; requests with their fields apart."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.name == "uvicorn.access" and isinstance(record.args, tuple):
            entry |= dict(zip(_ACCESS_FIELDS, record.args, strict=False))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def say(form: Literal["text", "json"], message: str, level: int = logging.INFO) -> None:
    """A line of the command itself, which no level leaves out: where it serves, what it warns of, why it ended."""
    if form == "json":
        record = logging.LogRecord("multitensor.serve", level, __file__, 0, message, None, None)
        line = JsonFormatter().format(record)
    else:
        line = f"multitensor: {'warning: ' if level == logging.WARNING else ''}{message}"
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def set_up(form: Literal["text", "json"], level: str) -> None:
    """For the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(
        max(logging.WARNING, logging.getLogger().level)
    )  # its own start-up talk
