"""What is measured: each peer is started, says when it is ready, takes a load, and is stopped."""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import httpx
import psutil

from bench.client import Load, Outcome, Reply, run_load
from bench.processes import PYTHONPATH, Child, Infra, free_port, wait_until
from bench.serving import BenchServing, load_args, outcome_of

# SGLang's own server and Dynamo's processes log lines for every request; ours keep their default of one line each.
QUIET = {"DYN_LOG": "error"}
_GRACE_S = 1.5  # for a process to end by itself; there is nothing left to lose


@dataclass(frozen=True)
class Setting:
    """What all peers of a run have in common.

    engine_args: SGLang's flags. is_engine_fake: run `bench.fake_sglang` in SGLang's place. bench_serving: what puts the
    load on servers; None: our own client.
    """

    model: str
    folder: Path
    engine_args: Sequence[str] = ()
    is_engine_fake: bool = False
    bench_serving: BenchServing | None = None

    def script(self, path: str, *args: str) -> list[str]:
        return [sys.executable, path, *args]

    def engine_script(self, path: str, *args: str) -> list[str]:
        launcher = ["-m", "bench.fake_sglang"] if self.is_engine_fake else []
        return [sys.executable, *launcher, path, "--model-path", self.model, *self.engine_args, *args]


class Peer:
    """A server that speaks OpenAI's chat completions."""

    name: ClassVar[str]
    title: ClassVar[str]
    least_concurrency: ClassVar[int] = 0  # not measured below

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.folder = setting.folder / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.children: list[Child] = []

    def start(self) -> None:
        raise NotImplementedError

    def child(self, name: str, command: Sequence[str], **env: str) -> Child:
        child = Child(name, command, self.folder / f"{name}.log", env)
        self.children.append(child.start())
        return child

    def is_ready(self) -> bool:
        """It is when it answers a chat.

        Raises:
            RuntimeError: one of its processes has ended.
        """
        for child in self.children:
            child.check()
        body = {"model": self.setting.model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
        with suppress(httpx.HTTPError):
            return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).is_success
        return False

    def take(self, load: Load) -> Outcome:
        if self.setting.bench_serving is None:
            return run_load(self.url, self.setting.model, load)
        where = ["--base-url", self.url, "--model", self.setting.model]
        return outcome_of(self.setting.bench_serving.run([*where, *load_args(load)]), load)

    def schedulers(self) -> list[psutil.Process]:
        """SGLang's processes that burn a core while they wait."""
        return [each for child in self.children for each in child.family()[1:] if _is_scheduler(each)]

    def bring_up(self, timeout_s: float) -> None:
        """Raises:
        Exception: it did not come up; what had started is stopped again.
        """
        try:
            self.start()
            wait_until(self.is_ready, timeout_s, f"{self.name} to be ready")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for child in self.children:
            child.terminate()
        for child in self.children:
            child.stop(_GRACE_S)


def _is_scheduler(process: psutil.Process) -> bool:
    try:
        return "scheduler" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


class DynamoPeer(Peer):
    """One that needs NATS and etcd; its own ones, so that peers cannot see each other."""

    def start(self) -> None:
        self.infra = Infra(self.folder)
        self.infra.start()
        self.children += self.infra.children
        self.start_scripts()

    def start_scripts(self) -> None:
        raise NotImplementedError


class Ours(DynamoPeer):
    name, title = "ours", "frontend.py, processor.py, engine.py"
    num_processors = num_frontends = 1
    is_pinned = False
    engine = "engine.py"

    def command(self, _name: str, command: list[str]) -> list[str]:
        """What is run of a script's command."""
        return command

    def start_scripts(self) -> None:
        """With the log as it is by default."""
        script = self.setting.script
        commands = {"engine": self.setting.engine_script(self.engine)}
        for number in range(self.num_processors):
            commands[f"processor{number or ''}"] = script("processor.py", "--model", self.setting.model)
        for number in range(self.num_frontends):
            shared = ["--share-port"] if self.num_frontends > 1 else []
            commands[f"frontend{number or ''}"] = script("frontend.py", "--port", str(self.port), *shared)
        env = {**self.infra.env, "DYN_LOG": ""}
        for number, (name, command) in enumerate(commands.items()):
            pinned = {"DYN_CHAT_CPUS": str(number % (psutil.cpu_count() or 1))} if self.is_pinned else {}
            self.child(name, self.command(name, command), **env, **pinned)


class OursScaled(Ours):
    name, title = "ours3", "the same, three processors, two frontends"
    num_processors, num_frontends = 3, 2


class OursPinned(OursScaled):
    name, title = "pinned", f"{OursScaled.title}, each on one CPU"
    is_pinned = True


class OursOnDicts(Ours):
    name, title = "dicts", "frontend.py and processor.py on the chapter's engine, a dict per token"
    engine = "docs/chapter-1/engine_step_1.py"


class Chapter(DynamoPeer):
    name, title = "chapter", "the chapter, taken literally"

    def start_scripts(self) -> None:
        env = self.infra.env | QUIET
        script, model = self.setting.script, self.setting.model
        self.child("engine", self.setting.engine_script("docs/chapter-1/engine_step_1.py"), **env)
        self.child("processor", script("docs/chapter-1/processor.py", "--model", model), **env)
        self.child("frontend", script("docs/chapter-1/frontend.py", "--port", str(self.port)), **env)


def dynamo_frontend(port: int) -> list[str]:
    return [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]


class Dynamo(DynamoPeer):
    name, title = "dynamo", "`dynamo.frontend` + `dynamo.sglang`"
    least_concurrency = 64  # it takes a minute for what others do in ten seconds

    def worker(self) -> list[str]:
        return ["-m", "dynamo.sglang", "--model-path", self.setting.model, *self.setting.engine_args]

    def start_scripts(self) -> None:
        env = self.infra.env | QUIET
        self.child("worker", [sys.executable, *self.worker()], **env)
        self.child("frontend", dynamo_frontend(self.port), **env)


class DynamoMocker(Dynamo):
    name, title = "mocker", "`dynamo.frontend` + `dynamo.mocker`"
    least_concurrency = 0

    def worker(self) -> list[str]:
        return ["-m", "dynamo.mocker", "--model-path", self.setting.model, "--speedup-ratio", "1000000"]


class SGLangServer(Peer):
    name, title = "sglang", "`sglang.launch_server`"

    def start(self) -> None:
        args = ["--model-path", self.setting.model, "--host", "127.0.0.1", "--port", str(self.port)]
        quiet = ["--log-level", "warning"]
        self.child("server", [sys.executable, "-m", "sglang.launch_server", *args, *quiet, *self.setting.engine_args])


class EngineAlone(Peer):
    """`sglang.Engine` in one process with the load itself: no server at all. It reads loads and writes outcomes."""

    name, title = "engine", "`sglang.Engine` in process"

    def start(self) -> None:
        command = self.setting.engine_script("bench/engine_alone.py")
        env, log_path = {"PYTHONPATH": PYTHONPATH}, self.folder / "engine.log"
        self.children.append(Child("engine", command, log_path, env, subprocess.PIPE, subprocess.PIPE).start())

    def is_ready(self) -> bool:
        self.children[0].check()
        stdout = self.children[0].popen.stdout
        return bool(select.select([stdout], [], [], 1.0)[0]) and stdout.readline() == b"ready\n"

    def take(self, load: Load) -> Outcome:
        engine = self.children[0].popen
        engine.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        engine.stdin.flush()
        found = json.loads(engine.stdout.readline())
        return Outcome([Reply(**reply) for reply in found["replies"]], found["seconds"])


class Instant(Peer):
    """No server to measure, but the client."""

    name, title = "instant", "a server that answers at once"

    def start(self) -> None:
        self.child("server", [sys.executable, "-m", "bench.instant_server", str(self.port)])


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        EngineAlone, SGLangServer, Dynamo, DynamoMocker, Chapter, Ours, OursScaled, OursPinned, OursOnDicts, Instant,
    )
}  # fmt: skip
