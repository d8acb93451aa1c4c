"""Python's log records, through Dynamo's logger or, with DYN_LOGGING_JSONL, as JSON lines with fields of their own.

Dynamo would make JSON of our records as well, but only of their text. Here a record about a request has its id, its
trace and its token counts as fields, and the other keys are Dynamo's, so that one query reads all lines.
"""

import logging
import os
import sys
from datetime import UTC, datetime

import orjson

from common.environment import is_on


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
        return orjson.dumps(line | getattr(record, "fields", {}), default=str).decode()


def log_json_lines() -> None:
    """Write Python's log records as JSON lines, where DYN_LOGGING_JSONL asks for that."""
    if not is_on("DYN_LOGGING_JSONL"):
        return
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.setLevel(_level())
    logging.getLogger().handlers = [handler]


def _level() -> int:
    """What DYN_LOG says of everything that it does not name: `info` in `info,dynamo_runtime=debug`."""
    general = next((part for part in os.environ["DYN_LOG"].split(",") if "=" not in part), "info").strip().upper()
    return logging.getLevelNamesMapping().get(general, logging.DEBUG if general == "TRACE" else logging.INFO)
