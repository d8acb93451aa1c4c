"""What SGLang 0.5.16's log lines mean to somebody who waits for the engine."""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def phase_of(line: str) -> str | None:
    """What the engine does from this line on, if the line tells. A bar of a download speaks for itself."""
    if _PROGRESS_BAR.search(line):
        return line.strip()
    return next((phase for marker, phase in PHASES if marker in line), None)


def current_phase(lines: Iterable[str]) -> str:
    """The last phase that the lines tell of."""
    phases = [phase for line in lines if (phase := phase_of(line))]
    return phases[-1] if phases else FIRST_PHASE
