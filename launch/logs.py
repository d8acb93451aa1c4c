"""The programs' logs: what is new in them, what of that is shown, and how far an engine's start has come."""

import asyncio
import os
import re
from pathlib import Path

from launch.settings import say

POLL_S = 0.5
MAX_LINE_WIDTH = 200
NUM_LINES_OF_PHASE = 50
SHOWN = re.compile(r" ERROR |Traceback|: (request|serving|waiting for|stopping|left etcd)\b")
"""The components' own lines about requests and about themselves; SGLang's and Dynamo's stay in the logs."""

# What SGLang 0.5.16's lines mean to somebody who waits for the engine.
PHASES = (
    ("platform plugin activated", "no GPU here: SGLang on PyTorch's own operators"),
    ("server_args=ServerArgs", "starting SGLang's scheduler"),
    ("Init torch distributed", "the scheduler builds the model"),
    ("Load weight begin", "loading the weights"),
    ("Load weight end", "allocating the KV cache"),
    ("Capture cuda graph begin", "capturing CUDA graphs"),
    ("KV Cache is allocated", "starting to serve"),
    ("serving inference/engine/generate", "registered"),
)
FIRST_PHASE = "importing SGLang"
_PROGRESS_BAR = re.compile(r"\d+%[ |].*\d+/\d+")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


async def show_new_lines(name: str, log: Path) -> None:
    """Print what is worth showing of all that is written from now on, until cancelled."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        while True:
            if file.tell() > os.fstat(file.fileno()).st_size:  # the log has begun anew
                file.seek(0)
            line = file.readline()
            if not line.endswith(b"\n"):  # its end is still to come
                file.seek(-len(line), os.SEEK_CUR)
                await asyncio.sleep(POLL_S)
            elif text := worth_showing(name, _clean(line)):
                say(f"{name}: {text}"[:MAX_LINE_WIDTH])


def last_lines(log: Path, num_lines: int) -> list[str]:
    """The end of a log, without colours and blank lines; nothing where there is no log."""
    lines = log.read_bytes().replace(b"\r", b"\n").split(b"\n") if log.exists() else []
    return [text for line in lines if (text := _clean(line))][-num_lines:]


def _clean(line: bytes) -> str:
    return _COLOURS.sub("", line.decode(errors="replace")).rstrip()


def worth_showing(name: str, line: str) -> str | None:
    """A line of a component's log as it is shown, or None."""
    if SHOWN.search(line):
        return line
    return phase_of(line) if name == "engine" else None


def phase_of(line: str) -> str | None:
    """What the engine does from this line on, if the line tells. A bar of a download speaks for itself."""
    if _PROGRESS_BAR.search(line):
        return line.strip()
    return next((phase for marker, phase in PHASES if marker in line), None)


def current_phase(log: Path) -> str:
    """What the engine does, by the last line of its log that tells."""
    phases = [phase for line in last_lines(log, NUM_LINES_OF_PHASE) if (phase := phase_of(line))]
    return phases[-1] if phases else FIRST_PHASE
