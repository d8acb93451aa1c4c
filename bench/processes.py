"""Child processes of a measurement: started, waited for, watched, stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
_MIB = 2**20
# engine.py switches our SGLang plugins on by itself. Everybody else runs as it came, whatever the shell has exported.
_AS_IT_CAME = {"DYN_CHAT_SGLANG_PLUGINS": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str, body: bytes | None = None) -> bool:
    """Does this URL answer with 200? With a body, to a POST of it."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Raises:
    TimeoutError: it did not become true.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.1)


@dataclass
class Child:
    """A process in a session of its own, its output in a file."""

    name: str
    command: Sequence[str]
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: int = subprocess.DEVNULL
    stdout: int | None = None

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, **_AS_IT_CAME, **self.env}

    def start(self) -> "Child":
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environ,
                stdin=self.stdin,
                stdout=log if self.stdout is None else self.stdout,
                stderr=log,
                start_new_session=True,
            )
        return self

    def check(self) -> None:
        """Raises:
        RuntimeError: it has ended.
        """
        if self.popen.poll() is not None:
            text = self.log_path.read_text(errors="replace")
            raise RuntimeError(f"{self.name} ended with {self.popen.returncode}:\n{text[-3000:]}")

    def family(self) -> list[psutil.Process]:
        """The process and its descendants."""
        try:
            parent = psutil.Process(self.popen.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def terminate(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float) -> None:
        family = self.family()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(grace_s)
        for process in family:  # SGLang's children sit in groups of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.popen.wait(10)


def _label(child: Child, process: psutil.Process) -> str:
    if process.pid == child.popen.pid:
        return child.name
    title = (process.cmdline() or [""])[0]
    return f"{child.name}: {title.removeprefix('sglang::')}" if "::" in title else f"{child.name}: children"


@dataclass
class Usage:
    """CPU seconds and resident memory by process; memory is of the moment, the largest of a name's processes summed."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    rss_mib: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, children: Sequence[Child]) -> "Usage":
        usage = cls()
        for child in children:
            for process in child.family():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    times, name = process.cpu_times(), _label(child, process)
                    # children_*: those that have ended and were waited for; the living are in the family.
                    cpu_s = times.user + times.system + times.children_user + times.children_system
                    usage.cpu_s[name] = usage.cpu_s.get(name, 0.0) + cpu_s
                    usage.rss_mib[name] = usage.rss_mib.get(name, 0.0) + process.memory_info().rss / _MIB
        return usage

    def cpu_since(self, earlier: "Usage") -> dict[str, float]:
        return {name: max(0.0, spent - earlier.cpu_s.get(name, 0.0)) for name, spent in self.cpu_s.items()}


@contextlib.contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """SIGSTOP for the length of the block: an idle SGLang scheduler burns a core otherwise."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
