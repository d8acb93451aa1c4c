"""Reading log files that somebody else writes."""

from __future__ import annotations

import re
from pathlib import Path

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class LogTail:
    """Yields each line of a growing file once, from its beginning; a line without its end waits."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0
        self._incomplete = b""

    def new_lines(self) -> list[str]:
        """The lines since the last call, without colours and blank lines."""
        try:
            with self._file.open("rb") as log:
                if log.seek(0, 2) < self._offset:  # supervisord has started a new file
                    self._offset, self._incomplete = 0, b""
                log.seek(self._offset)
                data = log.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._incomplete = (self._incomplete + data).replace(b"\r", b"\n").split(b"\n")
        return [line for line in map(_clean, lines) if line]


def last_lines(file: Path, num_lines: int) -> list[str]:
    """The end of a log, without colours and blank lines; nothing where there is no log."""
    try:
        lines = file.read_bytes().replace(b"\r", b"\n").split(b"\n")
    except FileNotFoundError:
        return []
    return [line for line in map(_clean, lines) if line][-num_lines:]


def shown(path: Path) -> Path:
    """As somebody in the checkout would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _clean(line: bytes) -> str:
    return _COLOURS.sub("", line.decode(errors="replace")).rstrip()
