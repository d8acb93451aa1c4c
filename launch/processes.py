"""Processes of Linux: who belongs to whom, and who must not outlive whom."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

import psutil

PR_SET_PDEATHSIG = 1
KILL_S = 5


def die_with_parent() -> None:
    """Called in a new child: even a kill -9 of its parent sends it a SIGTERM."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def session(session_id: int) -> set[psutil.Process]:
    """Whoever was started in supervisord's session, though its parent may be gone."""
    return {process for process in psutil.process_iter() if _session_of(process.pid) == session_id}


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def kill(processes: set[psutil.Process]) -> None:
    """Return once they are gone. One whose pid is in use again is left alone: psutil compares start times."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=KILL_S)
