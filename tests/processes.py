"""Real servers and real scripts for tests: each on a free port of loopback, each stopped by who started it."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import httpx

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DYNAMO = version("ai-dynamo-runtime")
MODEL = "models/SmolLM2-135M-Instruct"
LOOPBACK = "127.0.0.1"
SHORT_LEASE = {"ETCD_LEASE_TTL": "2"}  # in seconds, for those whose end etcd shall notice soon: Dynamo's default is 10
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


_claims: list[socket.socket] = []


def free_port() -> int:
    """A port for a server that is started later, and once more after that: below those that the kernel hands out, and
    nobody else's who asks here, in other processes either, as long as this one lives.
    """
    while True:
        port = random.randrange(15_000, 32_768)
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe, contextlib.suppress(OSError):
            claim.bind(f"\0tests-port-{port}")  # no file: the name is free again when the process ends
            probe.bind((LOOPBACK, port))
            _claims.append(claim)
            return port
        claim.close()


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Poll until true; returns the seconds it took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - started


def cpu_s(action: Callable[[], object]) -> float:
    """The CPU time that it takes: to be compared with that of something like it, as machines are not equally fast."""
    started = time.process_time()
    action()
    return time.process_time() - started


def accepts(port: int, address: str = LOOPBACK) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


@dataclass
class Process:
    """One child in a process group of its own, with its output in a file."""

    name: str
    command: Sequence[str]
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    popen: "subprocess.Popen[bytes] | None" = None
    _num_old_characters: int = 0

    def start(self) -> "Process":
        self._num_old_characters = len(self.log)
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **self.env},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    @property
    def running(self) -> "subprocess.Popen[bytes]":
        assert self.popen is not None, f"{self.name} was not started"
        return self.popen

    @property
    def pid(self) -> int:
        return self.running.pid

    @property
    def is_alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    @property
    def log(self) -> str:
        return _ANSI.sub("", self.log_path.read_text(errors="replace")) if self.log_path.exists() else ""

    @property
    def log_since_start(self) -> str:
        """Without what it said before it was last started."""
        return self.log[self._num_old_characters :]

    def terminate(self, timeout_s: float = 30) -> int:
        """SIGTERM, then the exit code."""
        self.running.send_signal(signal.SIGTERM)
        return self.running.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL for it and its children."""
        if self.popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait(30)

    def stop(self) -> None:
        if self.is_alive:
            self.running.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.running.wait(10)
        self.kill()


class Infra:
    """nats-server and etcd from their wheels.

    launcher: what starts them, such as a command that enters a network namespace; address: theirs there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nats_args: Sequence[str] = (),
        etcd_args: Sequence[str] = (),
        launcher: Sequence[str] = (),
        address: str = LOOPBACK,
    ) -> None:
        self.folder = folder
        self.launcher, self.address = launcher, address
        folder.mkdir(parents=True, exist_ok=True)
        self.nats_port, self.etcd_port, self.peer_port = free_port(), free_port(), free_port()
        nats_command = [
            *launcher, str(BIN / "nats-server"), "-a", address, "-p", str(self.nats_port),
            "-js", "-sd", str(folder / "jetstream"), *nats_args,
        ]  # fmt: skip
        self.nats = Process("nats", nats_command, folder / "nats.log")
        self.etcd_args = etcd_args
        self.etcd = self._etcd("etcd-data")

    def _etcd(self, data: str) -> Process:
        client, peer = f"http://{self.address}:{self.etcd_port}", f"http://{self.address}:{self.peer_port}"
        command = [
            *self.launcher, str(BIN / "etcd"), "--data-dir", str(self.folder / data), "--log-level", "warn",
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}", "--unsafe-no-fsync", *self.etcd_args,
        ]  # fmt: skip
        return Process("etcd", command, self.folder / "etcd.log")

    def forget(self) -> None:
        """The next etcd starts with an empty store."""
        self.etcd = self._etcd(f"etcd-data-{free_port()}")

    def start(self) -> "Infra":
        self.nats.start()
        self.etcd.start()
        ports = (self.nats_port, self.etcd_port)
        wait_until(lambda: all(accepts(port, self.address) for port in ports), 60, "nats and etcd")
        return self

    def stop(self) -> None:
        self.nats.kill()
        self.etcd.kill()

    @property
    def env(self) -> dict[str, str]:
        return {
            "NATS_SERVER": f"nats://{self.address}:{self.nats_port}",
            "ETCD_ENDPOINTS": f"http://{self.address}:{self.etcd_port}",
        }

    def etcdctl(self, *args: str) -> str:
        command = [str(BIN / "etcdctl"), "--endpoints", f"{self.address}:{self.etcd_port}", *args]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "ETCDCTL_API": "3"}
        )
        return done.stdout

    def instance_keys(self, of: str = "") -> list[str]:
        """The keys of all registered instances, or of those of one endpoint, such as "engine/generate"."""
        lines = self.etcdctl("get", "--prefix", "", "--keys-only").splitlines()
        return [line for line in lines if "instances/" in line and of in line]


class Pipeline:
    """Scripts on one infra. Each started process is stopped at the end, whatever happened.

    address: the frontend's. launcher: what starts the scripts that are started next; see `Infra`.
    """

    def __init__(
        self, infra: Infra, folder: Path, *, env: Mapping[str, str] | None = None, address: str = LOOPBACK
    ) -> None:
        self.address = address
        self.launcher: Sequence[str] = ()
        self.infra = infra
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.env = {**infra.env, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        self.processes: list[Process] = []
        self._num_started = 0
        self.http_port = free_port()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.http_port}"

    def script(self, name: str, *args: str, env: Mapping[str, str] | None = None) -> Process:
        self._num_started += 1
        log_path = self.folder / f"{self._num_started}-{Path(name).stem}.log"
        process = Process(name, [*self.launcher, sys.executable, name, *args], log_path, {**self.env, **(env or {})})
        self.processes.append(process)
        return process.start()

    def frontend(self, *args: str, env: Mapping[str, str] | None = None) -> Process:
        return self.script("frontend.py", "--host", self.address, "--port", str(self.http_port), *args, env=env)

    def processor(self, *args: str, env: Mapping[str, str] | None = None) -> Process:
        return self.script("processor.py", "--model", MODEL, *args, env=env)

    def engine(self, *args: str) -> Process:
        return self.script("engine.py", "--model-path", MODEL, *args)

    def fake_engine(
        self,
        *args: str,
        token_ids: Sequence[int] = tuple(range(1000, 1100)),
        env: Mapping[str, str] | None = None,
    ) -> Process:
        return self.script("tests/fake_engine.py", "--token-ids", ",".join(map(str, token_ids)), *args, env=env)

    def router(self, *args: str, env: Mapping[str, str] | None = None) -> Process:
        return self.script("router.py", *args, env=env)

    def wait_ready(self, timeout_s: float = 180, *, processors: int = 1, engines: int = 1) -> float:
        def is_ready() -> bool:
            for process in self.processes:
                if not process.is_alive and process.popen is not None and process.popen.poll() not in (0, -9, -15):
                    raise RuntimeError(f"{process.name} ended:\n{process.log[-3000:]}")
            try:
                answer = httpx.get(f"{self.url}/ready", timeout=2)
            except httpx.HTTPError:
                return False
            body = answer.json()
            return answer.status_code == 200 and body["processors"] >= processors and body["engines"] >= engines

        return wait_until(is_ready, timeout_s, "the pipeline to be ready")

    def logs(self) -> str:
        return "\n".join(f"--- {process.name}\n{process.log[-4000:]}" for process in self.processes)

    def stop_all_but(self, num_kept: int) -> None:
        """Back to the first `num_kept` processes; whatever was killed is gone from etcd at once."""
        stopped, self.processes = self.processes[num_kept:], self.processes[:num_kept]
        for process in stopped:
            process.running.send_signal(signal.SIGTERM)
        for process in stopped:  # no second signal: that would end a drain at once
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.running.wait(10)
            process.kill()

    def stop(self) -> None:
        self.stop_all_but(0)


class Stoppable(Protocol):
    def stop(self) -> None: ...


@contextlib.contextmanager
def running(thing: Stoppable) -> Iterator[None]:
    try:
        yield
    finally:
        thing.stop()


@contextlib.contextmanager
def new_pipeline(
    folder: Path, *, env: Mapping[str, str] | None = None, nats_args: Sequence[str] = ()
) -> Iterator[Pipeline]:
    """NATS and etcd, and no script yet: those that the block starts are stopped at its end, as the servers are."""
    infra = Infra(folder / "infra", nats_args=nats_args)
    with running(infra), running(pipeline := Pipeline(infra, folder / "scripts", env=env)):
        infra.start()
        yield pipeline
