"""How a launch ends: by which signals, with which last line and exit status."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TextIO

from common.dynamo.servers import ServersMissing

IGNORE_REPEATS_S = 2.0
"""make passes on a SIGTERM that we may have got already: only a later one is meant as "now"."""


class LaunchError(Exception):
    """A launch cannot start or go on. The message is one line for the person at the terminal, then quotes of logs.

    SettingsError     a variable holds something that cannot be
    PortTaken         somebody listens where we must
    SupervisorError   supervisord or a program under it does not run
    ModelError        the embedded model cannot be made
    WrongAnswer       everything runs, and does not do what the chapter says
    """


def run_command(name: str, launch: Callable[[], None], *, status_when_stopped: int = 0) -> int:
    """Run until it is done or stopped. Exit status 1 and the reason on stderr where it cannot."""
    stop_on_signals()
    try:
        launch()
    except KeyboardInterrupt:
        _say(f"{name}: stopped", file=sys.stdout)
        return status_when_stopped
    except (LaunchError, ServersMissing, OSError) as error:  # OSError: a full disk, or a closed terminal
        _say(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def _say(line: str, *, file: TextIO) -> None:
    with suppress(OSError):  # nobody may be there to read it
        print(line, file=file, flush=True)


def stop_on_signals() -> None:
    """Ctrl-C, SIGTERM and a closed terminal raise KeyboardInterrupt, and so does one more of them later."""
    stopped_at: float | None = None

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal stopped_at
        now = time.monotonic()
        if stopped_at is None or now - stopped_at > IGNORE_REPEATS_S:
            stopped_at = now
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
