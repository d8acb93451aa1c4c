"""`python -m launch COMMAND`, behind the Makefile's targets: how each ends, with which last line and exit status."""

import asyncio
import math
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress

import psutil

from common.dynamo.network import ServersMissing
from launch import run, supervisor
from launch.dev import dev
from launch.model import ensure_model
from launch.settings import EMBEDDED_MODEL, LaunchError, Settings, say

IGNORE_REPEATS_S = 2.0
"""make passes on a SIGTERM that we may have got already: only a later one is meant as "now"."""

LAUNCHES = {"infra": run.infra, "run": run.run, "dev": dev, "chapter-1": run.chapter_1}


def main(command: str, *names: str) -> int:
    """Run it until it is done or stopped. Exit status 1 and the reason on stderr where it cannot."""
    try:
        if command == "model":
            ensure_model(os.environ.get("MODEL") or EMBEDDED_MODEL)
        elif command == "status":
            supervisor.show_status(Settings.from_environ(os.environ).run_folder)
        elif command == "restart":
            supervisor.restart(Settings.from_environ(os.environ).run_folder, *names)
        else:
            asyncio.run(_cancelled_by_signals(LAUNCHES[command](Settings.from_environ(os.environ))))
    except asyncio.CancelledError:
        say(f"{command}: stopped")
    except KeyboardInterrupt:
        return 130
    except (LaunchError, ServersMissing, psutil.Error, OSError) as error:  # OSError: a full disk, a missing program
        with suppress(OSError):
            print(f"{'launch' if command in ('status', 'restart') else command}: {error}", file=sys.stderr)
        return 1
    return 0


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


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
