"""How a launch ends: by which signals, with which last line and exit status."""

import asyncio
import math
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress

from common.dynamo.servers import ServersMissing

IGNORE_REPEATS_S = 2.0
"""make passes on a SIGTERM that we may have got already: only a later one is meant as "now"."""


class LaunchError(Exception):
    """A launch cannot start or go on. The message is one line for the person at the terminal, then quotes of logs."""


def run_command(name: str, launch: Coroutine[None, None, None]) -> int:
    """Run until it is done or stopped. Exit status 1 and the reason on stderr where it cannot."""
    try:
        asyncio.run(_cancelled_by_signals(launch))
    except asyncio.CancelledError:
        say(f"{name}: stopped")
    except (LaunchError, ServersMissing, OSError) as error:  # OSError: a full disk, a program that is not there
        with suppress(OSError):
            print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def say(line: str) -> None:
    with suppress(OSError):  # a closed terminal is no reason not to stop in order
        print(line, flush=True)


async def _cancelled_by_signals(launch: Coroutine[None, None, None]) -> None:
    """Ctrl-C, SIGTERM and a closed terminal cancel `launch`, and one more of them later its clearing up."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(launch)
    stopped_at = -math.inf

    def stop() -> None:
        nonlocal stopped_at
        if loop.time() - stopped_at > IGNORE_REPEATS_S:
            stopped_at = loop.time()
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    await task
