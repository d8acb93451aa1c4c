"""Python's log records, through Dynamo's logger or, with DYN_LOGGING_JSONL, as JSON lines with fields of their own.

Dynamo would make JSON of our records as well, but only of their text. Here a record about a request has its id, its
trace and its token counts as fields, and the other keys are Dynamo's, so that one query reads all lines.
Either way nothing that a client or a worker sent begins a line.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.environment import is_on


def one_line(text: str) -> str:
    """`text` with all that does not print, line breaks and terminal codes included, as Python would escape it."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class OneLineFormatter(logging.Formatter):
    """The text of a record in one line. Those of a traceback follow, indented, which no record's first line is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:
        return "\n".join(f"    {one_line(line)}" for line in super().formatException(exc_info).split("\n"))


class JsonFormatter(logging.Formatter):
    """One line of JSON a record. `extra={"fields": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.replace("WARNING", "WARN"),
            "file": record.pathname,
            "line": record.lineno,
            "target": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), default=str, separators=(",", ":"))


def format_records() -> None:
    """Set the formats of Python's log records, where Dynamo has just set its own."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(OneLineFormatter())
    if not is_on("DYN_SKIP_SGLANG_LOG_FORMATTING") and (path := os.environ.get("SGLANG_LOGGING_CONFIG_PATH")):
        # Dynamo's file of settings for SGLang, which all of its processes read.
        config = json.loads(Path(path).read_text())
        config["formatters"]["simple"] = {"()": f"{__name__}.{OneLineFormatter.__name__}"}
        Path(path).write_text(json.dumps(config))
    if is_on("DYN_LOGGING_JSONL"):
        logging.captureWarnings(True)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
        handler.setLevel(_level())
        logging.getLogger().handlers = [handler]


def _level() -> int:
    """What DYN_LOG says of everything that it does not name: `info` in `info,dynamo_runtime=debug`."""
    general = next((part for part in os.environ["DYN_LOG"].split(",") if "=" not in part), "info").strip().upper()
    return logging.getLevelNamesMapping().get(general, logging.DEBUG if general == "TRACE" else logging.INFO)
