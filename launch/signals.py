"""Ctrl-C, SIGTERM and a closed terminal all mean: stop in order."""

from __future__ import annotations

import signal
import time
from types import FrameType

IGNORE_REPEATS_S = 2.0
"""make passes on a SIGTERM that we may have got already: only a later one is meant as "now"."""


def stop_on_signals() -> None:
    """Turn the first signal into a KeyboardInterrupt, and one that comes later into another."""
    stopped_at: float | None = None

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal stopped_at
        now = time.monotonic()
        if stopped_at is None or now - stopped_at > IGNORE_REPEATS_S:
            stopped_at = stopped_at or now
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
