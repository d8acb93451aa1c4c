"""Keeps programs running, in the foreground of whoever asks.

One that ends is started again, and the others are left alone: so a SIGTERM restarts one, and `make status` and
`make restart-NAME` need no more than pids. In the end they are stopped in reverse order: SIGTERM, time to drain, and
SIGKILL for what is left of the process group. SIGTERM goes to the program alone: an engine that drains still needs its
scheduler.
"""

import asyncio
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil

from common.environment import DRAIN_TIMEOUT_S
from launch.logs import last_lines
from launch.settings import LOOPBACK, ROOT, LaunchError, say, shown

POLL_S = 0.1
GRACE_S = 2.0
STOP_S = DRAIN_TIMEOUT_S + 30.0
"""How long a program may take to end after SIGTERM: a script leaves etcd, drains, and takes down what it runs on."""

MIN_LIFE_S = 2.0
"""One that ends sooner is started again after a pause, which grows up to MAX_PAUSE_S."""

MAX_PAUSE_S = 5.0
MAX_DEATHS = 3
NUM_LINES_OF_CULPRIT = 25
MAX_LOG_BYTES = 20_000_000
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
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
                self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, env=self.environ,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip


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


class Supervisor:
    """Programs, in the order in which they start. In `folder` are `logs/<program>.log` and `<program>.pid`."""

    def __init__(self, folder: Path, programs: Sequence[Program]) -> None:
        self.folder = folder
        self.programs = programs
        self._num_deaths: Counter[str] = Counter()
        self._restarting: set[str] = set()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._keepers: list[asyncio.Task[None]] = []

    def log_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, the programs run; afterwards, none of their processes is left.

        Raises:
            LaunchError: another launch uses the folder, or somebody one of the ports.
            OSError: a program cannot be started.
        """
        for program in self.programs:
            program.require_free_ports()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            self._remove_files("logs/*")  # a launch's logs are its own: no error of the last one is quoted
            self._remove_files("*.pid")
            try:
                for program in self.programs:
                    self.start(program)
                yield
            finally:
                await self._stop_all()

    def start(self, program: Program) -> None:
        """One of the programs, or one that joins them."""
        self._start(program)
        self._keepers.append(asyncio.create_task(self._keep(program)))

    def require_alive(self) -> None:
        """Give up on a program that does not stay up, and say what it said last.

        Raises:
            LaunchError: one has ended MAX_DEATHS times.
        """
        for name, num_deaths in self._num_deaths.items():
            if num_deaths >= MAX_DEATHS:
                raise LaunchError(f"{name} keeps dying.{self.end_of_log(name, NUM_LINES_OF_CULPRIT)}")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it. Raises what `require_alive` raises."""
        while not condition():
            self.require_alive()
            await asyncio.sleep(POLL_S)

    def end_of_log(self, name: str, num_lines: int) -> str:
        """To be quoted in an error."""
        log = self.log_file(name)
        return "\n  ".join([f" The end of {shown(log)}:", *last_lines(log, num_lines)])

    async def keep_running(self) -> None:
        """Until cancelled. Raises what keeps a program from being started again, such as an OSError."""
        await asyncio.gather(*self._keepers)

    def restart(self, name: str) -> None:
        """Ask a program that was started to end, and start it again. Never a second SIGTERM: that would mean "now"."""
        if (process := self._processes.get(name)) and name not in self._restarting:
            self._restarting.add(name)
            process.terminate()
            asyncio.get_running_loop().call_later(STOP_S, _kill_if_up, process)

    async def _keep(self, program: Program) -> None:
        pause_s, name = 0.0, program.name
        while True:
            started_at = time.monotonic()
            while (process := self._processes[name]).poll() is None:
                await asyncio.sleep(POLL_S)
                _rotate(self.log_file(name))
            pause_s = 0.0 if time.monotonic() - started_at > MIN_LIFE_S else min(pause_s + 1.0, MAX_PAUSE_S)
            if name not in self._restarting:
                self._report_death(name, process, pause_s)
            await ended(process, 0)
            # At once when somebody asks for a restart meanwhile: what kept it from staying up is mended, perhaps.
            await _wait(lambda: name in self._restarting, pause_s)
            self._restarting.discard(name)
            self._start(program)
            say(f"supervisor: {name} started, pid {self._processes[name].pid}")

    def _report_death(self, name: str, process: subprocess.Popen[bytes], pause_s: float) -> None:
        self._num_deaths[name] += 1
        when = f" in {pause_s:.0f} s" if pause_s else ""
        say(f"supervisor: {name} {how_it_ended(process)}; it is started again{when}, the others are left alone")
        if process.returncode > 0:
            say(f"supervisor: its last line: {''.join(last_lines(self.log_file(name), 1))}")

    def _start(self, program: Program) -> None:
        process = self._processes[program.name] = program.start(self.log_file(program.name))
        (self.folder / f"{program.name}.pid").write_text(str(process.pid))

    async def _stop_all(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        try:
            for process in reversed(self._processes.values()):
                process.terminate()
                await ended(process, STOP_S)
        finally:  # a second Ctrl-C ends the patience with programs that drain
            for process in self._processes.values():
                _kill_if_up(process)
            self._remove_files("*.pid")

    def _remove_files(self, pattern: str) -> None:
        for file in self.folder.glob(pattern):
            file.unlink()


def _kill_if_up(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        kill_group(process)


def _rotate(log: Path) -> None:
    """The program appends to its log, so that after this its next line is the first one."""
    with suppress(OSError):  # deleted, or a full disk
        if log.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one launch, whose pid is in `lock`."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LaunchError(
                f"{shown(folder)} is in use by another launch (pid {file.read().strip()}): stop it,"
                " or give this one a folder with DATA_DIR and ports of its own"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


# What another terminal does, with the pids alone


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
    if not (programs := find(folder)):
        say("nothing runs here: `make run` starts it")
    for name, process in programs.items():
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
        if psutil.wait_procs([old], STOP_S)[1]:
            os.killpg(old.pid, signal.SIGKILL)
        say(f"{name}: stopped")
    deadline = time.monotonic() + MAX_PAUSE_S + MIN_LIFE_S
    while (new := find(folder).get(name)) in (None, old) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if new is None or new == old or psutil.wait_procs([new], MIN_LIFE_S)[0]:
        raise LaunchError(f"{name} does not stay up: see {shown(folder)}/logs/{name}.log")
    say(f"{name}: started")
