"""Child processes of a measurement: started, waited for, watched, stopped; NATS and etcd among them."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
# For processes whose script is in another folder.
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))
# engine.py switches our SGLang plugins on by itself. Everybody else runs as it came, whatever the shell has exported.
_AS_IT_CAME = {"DYN_CHAT_SGLANG_PLUGINS": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
                self.command, cwd=ROOT, env=self.environ, stdin=self.stdin, stderr=log, start_new_session=True,
                stdout=log if self.stdout is None else self.stdout,
            )  # fmt: skip
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
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.popen.pid)
            return [parent, *parent.children(recursive=True)]
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

    def usage(self) -> tuple[float, float]:
        """CPU seconds so far, and MiB that are resident now, of the whole family."""
        cpu_s = rss = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                # The last two are those of children that have ended and were waited for.
                cpu_s += sum(process.cpu_times()[:4])
                rss += process.memory_info().rss / 2**20
        return cpu_s, rss


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


def _binary(name: str) -> str:
    return shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))) or name


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Infra:
    """NATS and etcd of one peer's own: from the wheels beside this Python, or from the PATH."""

    def __init__(self, folder: Path) -> None:
        self._ports = nats_port, etcd_port = free_port(), free_port()
        client_url = f"http://127.0.0.1:{etcd_port}"
        self.env = {
            "NATS_SERVER": f"nats://127.0.0.1:{nats_port}",
            "ETCD_ENDPOINTS": client_url,
            "DYN_REQUEST_PLANE": "nats",
            "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        }
        nats = [_binary("nats-server"), "-a", "127.0.0.1", "-p", str(nats_port), "-js", "-sd", str(folder / "nats")]
        etcd = [
            _binary("etcd"), "--data-dir", str(folder / "etcd"), "--log-level", "warn", "--unsafe-no-fsync",
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", "http://127.0.0.1:0",
        ]  # fmt: skip
        self.children = [Child("nats", nats, folder / "nats.log"), Child("etcd", etcd, folder / "etcd.log")]

    def start(self) -> None:
        for child in self.children:
            child.start()
        wait_until(lambda: all(map(_accepts, self._ports)), 30, "NATS and etcd")
