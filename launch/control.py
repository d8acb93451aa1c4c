"""`make status` and `make restart-NAME`: looks at what `make run` runs, and asks one of it to end.

Its supervisor starts again whatever ends, so that a restart is a SIGTERM and some patience.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil

from launch.command import LaunchError, say
from launch.logs import shown
from launch.settings import Settings


def find(folder: Path) -> dict[str, psutil.Process | None]:
    """The programs of a launch that is up, by name; None for one that does not run just now."""
    return {file.stem: _child(folder, file) for file in sorted(folder.glob("*.pid"))}


def _child(folder: Path, pid_file: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(pid_file.read_text()))
        is_its_own = process.ppid() == int((folder / "lock").read_text())  # a pid may be in use again
    except (psutil.Error, OSError, ValueError):
        return None
    return process if is_its_own else None


def show_status(folder: Path) -> None:
    programs = find(folder)
    if not any(programs.values()):
        say("nothing runs here: `make run` starts it")
    for name, process in programs.items():
        uptime = timedelta(seconds=int(time.time() - process.create_time())) if process else None
        say(f"{name:<12}RUNNING   pid {process.pid}, uptime {uptime}" if process else f"{name:<12}DOWN")


def restart(folder: Path, name: str) -> None:
    """Return once a new process has stayed up for a moment.

    Raises:
        LaunchError: there is no such program, or it does not stay up.
    """
    from launch.supervisor import (  # imports Dynamo, which `make status` need not wait for
        MAX_PAUSE_S,
        MIN_LIFE_S,
        STOP_S,
    )

    programs = find(folder)
    if not any(programs.values()) or name not in programs:
        raise LaunchError(f"no {name} runs here; {', '.join(programs) or 'nothing'} does")
    if old := programs[name]:
        old.terminate()
        if not _ends_within(old, STOP_S):
            os.killpg(old.pid, signal.SIGKILL)
            old.wait()
        say(f"{name}: stopped")
    deadline = time.monotonic() + MAX_PAUSE_S + MIN_LIFE_S
    while (new := find(folder).get(name)) in (None, old) and time.monotonic() < deadline:
        time.sleep(0.1)
    if new is None or new == old or _ends_within(new, MIN_LIFE_S):
        raise LaunchError(f"{name} does not stay up: see {shown(folder)}/logs/{name}.log")
    say(f"{name}: started")


def _ends_within(process: psutil.Process, timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired:
        return False
    return True


if __name__ == "__main__":
    try:
        folder = Settings.from_environ(os.environ).data_folder / "run"
        restart(folder, sys.argv[1]) if len(sys.argv) > 1 else show_status(folder)
    except (LaunchError, psutil.Error) as error:
        sys.exit(f"launch: {error}")
