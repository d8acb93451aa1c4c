"""Runs programs under supervisord, in the foreground of whoever asks.

supervisord starts them, restarts one that dies without touching the others, and stops them in reverse order:
SIGTERM, a generous wait for streams to drain, SIGKILL to what is left of its process group. SIGTERM goes to the
program alone, not to its children: an engine that drains still needs its scheduler.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import subprocess
import sys
import time
import xmlrpc.client
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from supervisor.xmlrpc import SupervisorTransport

from launch.command import LaunchError
from launch.logs import LogTail, last_lines, shown
from launch.processes import descendants, die_with_parent, kill, session
from launch.supervisor_config import DRAIN_S, Program, config_text, logs_folder, socket_file

START_S = 20
MAX_DEATHS = 3
NUM_LINES_OF_CULPRIT = 25
_EVENT = re.compile(r" (?P<event>(?P<kind>exited|spawned|stopped|success|gave up): '?(?P<name>[\w-]+).*)$")


class SupervisorError(LaunchError):
    """supervisord or a program under it cannot run; the message says why."""


@dataclass(frozen=True)
class ProgramState:
    """What supervisord knows of a program; `state` is in its words, `pid` 0 where none runs."""

    name: str
    state: str
    pid: int
    spawn_error: str

    @property
    def is_given_up(self) -> bool:
        """It died again and again right after its start, and is not restarted any more."""
        return self.state == "FATAL"


class Supervisor:
    """A context: the programs are started on entry, and none of their processes is left on exit.

    Args:
        folder: holds the configuration, the socket, and `logs/<program>.log`.
        environ: what supervisord and the programs see.
        directory: where the programs run.
    """

    def __init__(
        self, folder: Path, programs: Sequence[Program], *, environ: Mapping[str, str], directory: Path
    ) -> None:
        self.folder = folder
        self.programs = programs
        self.config_file = folder / "supervisord.conf"
        self._socket_file = socket_file(folder)
        self.num_deaths: Counter[str] = Counter()
        self._environ = dict(environ)
        self._directory = directory
        self._log = LogTail(self.log_file("supervisord"))
        self._exits = ExitStack()

    def log_file(self, name: str) -> Path:
        return logs_folder(self.folder) / f"{name}.log"

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            logs_folder(self.folder).mkdir(parents=True, exist_ok=True)
            exits.enter_context(lock(self.folder))
            for log in logs_folder(self.folder).iterdir():
                log.unlink()  # a launch's logs are its own: an error of the last one must not be quoted
            self._socket_file.unlink(missing_ok=True)
            self.config_file.write_text(config_text(self.folder, self.programs, self._directory))
            self._start(exits)
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """supervisord stops the programs; what escaped from them is killed."""
        self._exits.close()

    def _start(self, exits: ExitStack) -> None:
        output = logs_folder(self.folder) / "supervisord.out"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.config_file)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.folder,
                env=self._environ,
                start_new_session=True,  # Ctrl-C is ours alone: we decide who stops when
                preexec_fn=die_with_parent,
            )
        exits.callback(self._stop, process)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.states()
                return
            except SupervisorError:
                if process.poll() is not None or time.monotonic() > deadline:
                    said = " ".join(last_lines(output, 3))
                    raise SupervisorError(f"supervisord does not start: {said}") from None
            time.sleep(0.05)

    def states(self) -> dict[str, ProgramState]:
        """Ask supervisord.

        Raises:
            SupervisorError: it is not there.
        """
        transport = SupervisorTransport(None, None, f"unix://{self._socket_file}")
        try:
            with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as server:
                found: Any = server.supervisor.getAllProcessInfo()
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise SupervisorError(f"supervisord does not answer: {error}") from error
        return {
            info["name"]: ProgramState(info["name"], info["statename"], info["pid"], info["spawnerr"]) for info in found
        }

    def events(self) -> list[str]:
        """What happened since the last call, in supervisord's words: "exited: engine (...)"."""
        events = []
        for line in self._log.new_lines():
            match = _EVENT.search(line)
            if match is None:
                continue
            events.append(match["event"])
            if match["kind"] == "exited":
                self.num_deaths[match["name"]] += 1
        return events

    def require_alive(self) -> None:
        """Give up on a program that does not stay up, and say what it said last.

        Raises:
            SupervisorError: supervisord gave it up, or it died MAX_DEATHS times.
        """
        self.events()
        for name, state in self.states().items():
            if state.is_given_up or self.num_deaths[name] >= MAX_DEATHS:
                end = "".join(f"\n  {line}" for line in last_lines(self.log_file(name), NUM_LINES_OF_CULPRIT))
                why = f": {state.spawn_error}" if state.spawn_error else ""
                raise SupervisorError(f"{name} keeps dying{why}. The end of {shown(self.log_file(name))}:{end}")

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """A second Ctrl-C while this waits ends the patience with programs that drain."""
        family = descendants(process.pid)
        try:
            process.terminate()
            process.wait(DRAIN_S * len(self.programs) + 10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill(family | session(process.pid))
            process.wait()
            self._socket_file.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one launch.

    Raises:
        SupervisorError: another launch uses it, and which.
    """
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SupervisorError(
                f"{shown(folder)} is in use by another launch (pid {file.read().strip()}): stop it,"
                " or give this one a folder with DATA_DIR and ports of its own"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
