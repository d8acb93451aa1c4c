"""`make status` and `make restart-NAME`: looks at what `make run` runs, and asks one of it to end.

Its supervisor starts again whatever ends, so that a restart is a SIGTERM and some patience.
"""

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
from launch.supervisor import MAX_PAUSE_S, MIN_LIFE_S, STOP_S

POLL_S = 0.1


def find(folder: Path) -> dict[str, psutil.Process | None]:
    """The programs of a launch that is up, by name; None for one that does not run just now."""
    return {file.stem: _child(folder, file) for file in sorted(folder.glob("*.pid"))}


def _child(folder: Path, pid_file: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(pid_file.read_text()))
        is_its_own = process.ppid() == int((folder / "lock").read_text())  # a pid may be in use again
        return process if is_its_own and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError, ValueError):
        return None


def show_status(folder: Path) -> None:
    for name, process in find(folder).items():
        if process is None:
            say(f"{name:<12}DOWN")
        else:
            uptime = timedelta(seconds=int(time.time() - process.create_time()))
            say(f"{name:<12}RUNNING   pid {process.pid}, uptime {uptime}")


def restart(folder: Path, name: str) -> None:
    """Return once a new process has stayed up for a moment.

    Raises:
        LaunchError: there is no such program, or it does not stay up.
    """
    programs = find(folder)
    if not any(programs.values()) or name not in programs:
        raise LaunchError(f"no {name} runs here; {', '.join(programs) or 'nothing'} does")
    old = programs[name]
    if old is not None:
        old.terminate()
        if not _ends_within(old, STOP_S):
            os.killpg(old.pid, signal.SIGKILL)
        say(f"{name}: stopped")
    deadline = time.monotonic() + MAX_PAUSE_S + MIN_LIFE_S
    while (new := find(folder).get(name)) in (None, old) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if new is None or new == old or _ends_within(new, MIN_LIFE_S):
        raise LaunchError(f"{name} does not stay up: see {shown(folder)}/logs/{name}.log")
    say(f"{name}: started")


def _ends_within(process: psutil.Process, timeout_s: float) -> bool:
    gone, _ = psutil.wait_procs([process], timeout_s)
    return bool(gone)


def main() -> None:
    """`python -m launch.control [NAME]`, behind `make status` and `make restart-NAME`."""
    folder = Settings.from_environ(os.environ).data_folder / "run"
    if len(sys.argv) > 1:
        restart(folder, sys.argv[1])
    elif find(folder):
        show_status(folder)
    else:
        say("nothing runs here: `make run` starts it")


if __name__ == "__main__":
    try:
        main()
    except (LaunchError, psutil.Error) as error:
        sys.exit(f"launch: {error}")
