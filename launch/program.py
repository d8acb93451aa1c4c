"""One program that a launch runs: its command and ports, its process, and the end of that and of all its children."""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launch.command import LaunchError
from launch.model import ROOT
from launch.settings import LOOPBACK

GRACE_S = 2.0
POLL_S = 0.1
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True)
class Program:
    """`ports` of loopback are those that it listens on, each by the variable that moves it."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    ports: Mapping[str, int] = field(default_factory=dict)

    def require_free_ports(self) -> None:
        """Look before it is started: its own complaint would be a line in a log.

        Raises:
            LaunchError: names the port, its holder where known, and the variable that moves it.
        """
        for variable, port in self.ports.items():
            try:
                socket.create_server((LOOPBACK, port)).close()
            except OSError as error:
                raise LaunchError(
                    f"port {port}, for {self.name}, is taken by {_holder(port)}:"
                    f" stop that, or choose another port with {variable}"
                ) from error

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """In a session of its own, because Ctrl-C is the launcher's alone: it decides who stops when."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env=self.environ,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )


def _die_with_parent() -> None:
    """Called in a new child: even a kill -9 of its parent sends it a SIGTERM."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN
            if is_listening and connection.pid and connection.laddr and connection.laddr.port == port:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass  # another user's process: only its owner may know
    return "another process"


async def ended(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Wait for a process, and then a moment for the rest of its process group; kill what does not end."""
    try:
        await _wait(lambda: process.poll() is not None, patience_s)
        if process.returncode is not None:
            await _wait(lambda: not _has_group(process), GRACE_S)
    finally:
        kill_group(process)


async def _wait(condition: Callable[[], bool], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)


def _has_group(process: subprocess.Popen[bytes]) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 0)
        return True
    return False


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(GRACE_S)


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    verb = "stopped" if process.returncode in (0, -signal.SIGTERM) else "died"
    if process.returncode < 0:
        return f"{verb} (terminated by {signal.Signals(-process.returncode).name})"
    return f"{verb} (exit status {process.returncode})"
