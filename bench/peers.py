"""What is measured: each peer is started, says when it is ready, takes a load, and is stopped."""

import json
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil

from bench.http_client import Reply
from bench.infra import Infra
from bench.load import Load, Outcome, run_load
from bench.processes import Child, Usage, answers, free_port, wait_until

# SGLang's own server and Dynamo's processes log lines for every request; ours keep their default of one line each.
_QUIET = {"DYN_LOG": "error"}
_GRACE_S = 1.5  # for a process to end by itself; there is nothing left to lose


@dataclass(frozen=True)
class Setting:
    """What all peers of a run have in common.

    engine_args: SGLang's flags. is_engine_fake: run `bench.fake_sglang` in SGLang's place.
    """

    model: str
    folder: Path
    engine_args: Sequence[str] = ()
    is_engine_fake: bool = False
    num_client_processes: int = 1

    def script(self, path: str, *args: str) -> list[str]:
        return [sys.executable, path, *args]

    def engine_script(self, path: str, *args: str) -> list[str]:
        launcher = ["-m", "bench.fake_sglang"] if self.is_engine_fake else []
        return [sys.executable, *launcher, path, "--model-path", self.model, *self.engine_args, *args]


class Peer:
    """A server that speaks OpenAI's chat completions. `path_ready` answers 200 once it does."""

    name: ClassVar[str]
    title: ClassVar[str]

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
        return answers(f"{self.url}/v1/chat/completions", json.dumps(body).encode())

    def answer(self, load: Load, executor: Executor) -> Outcome:
        load = replace(load, url=self.url, model=self.setting.model)
        return run_load(load, executor, self.setting.num_client_processes)

    def usage(self) -> Usage:
        return Usage.of(self.children)

    def schedulers(self) -> list[psutil.Process]:
        """SGLang's processes that burn a core while they wait."""
        found = []
        for child in self.children:
            for process in child.family()[1:]:
                try:
                    if "scheduler" in " ".join(process.cmdline()):
                        found.append(process)
                except psutil.NoSuchProcess:
                    pass
        return found

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

    def env(self) -> dict[str, str]:
        """With the log as it is by default, and the request plane left to the scripts."""
        return {name: value for name, value in self.infra.env.items() if name != "DYN_REQUEST_PLANE"} | {"DYN_LOG": ""}

    def start_scripts(self) -> None:
        env = self.env()
        self.child("engine", self.setting.engine_script("engine.py"), **env)
        self.child("processor", self.setting.script("processor.py", "--model", self.setting.model), **env)
        self.child("frontend", self.setting.script("frontend.py", "--port", str(self.port)), **env)


class OursScaled(Ours):
    """The same three scripts, with as many processors and frontends as one engine needs under full load."""

    name, title = "ours3", "the same, three processors, two frontends"
    num_processors, num_frontends = 3, 2

    def start_scripts(self) -> None:
        env = self.env()
        script = self.setting.script
        self.child("engine", self.setting.engine_script("engine.py"), **env)
        for number in range(self.num_processors):
            self.child(f"processor{number}", script("processor.py", "--model", self.setting.model), **env)
        for number in range(self.num_frontends):
            self.child(f"frontend{number}", script("frontend.py", "--port", str(self.port), "--share-port"), **env)


class OursPinned(OursScaled):
    """Each of those processes on a CPU of its own."""

    name, title = "pinned", f"{OursScaled.title}, each on one CPU"

    def child(self, name: str, command: Sequence[str], **env: str) -> Child:
        if name not in ("nats", "etcd"):
            env["DYN_CHAT_CPUS"] = str(len(self.children) % (psutil.cpu_count() or 1))
        return super().child(name, command, **env)


class Variant(OursScaled):
    """Ours scaled, with other environment variables or engine flags: to see what they change, in one run."""

    changes: ClassVar[Mapping[str, str]] = {}
    more_engine_args: ClassVar[Sequence[str]] = ()

    def __init__(self, setting: Setting) -> None:
        super().__init__(replace(setting, engine_args=[*setting.engine_args, *self.more_engine_args]))

    def env(self) -> dict[str, str]:
        return super().env() | dict(self.changes)


def add_variant(text: str) -> str:
    """Make a peer of `NAME: VARIABLE=VALUE ... --engine-flag ...`; its name."""
    name, _, rest = text.partition(":")
    words = rest.split()
    flags_at = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    PEERS[name] = type(
        name,
        (Variant,),
        {
            "name": name,
            "title": f"{OursScaled.title}; {rest.strip()}",
            "changes": dict(word.split("=", 1) for word in words[:flags_at]),
            "more_engine_args": words[flags_at:],
        },
    )
    return name


class Chapter(DynamoPeer):
    name, title = "chapter", "the chapter, taken literally"

    def start_scripts(self) -> None:
        env = self.infra.env | _QUIET
        script, model = self.setting.script, self.setting.model
        self.child("engine", self.setting.engine_script("docs/chapter-1/engine_step_1.py"), **env)
        self.child("processor", script("docs/chapter-1/processor.py", "--model", model), **env)
        self.child("frontend", script("docs/chapter-1/frontend.py", "--port", str(self.port)), **env)


class Dynamo(DynamoPeer):
    name, title = "dynamo", "`dynamo.frontend` + `dynamo.sglang`"

    def worker(self) -> list[str]:
        return ["-m", "dynamo.sglang", "--model-path", self.setting.model, *self.setting.engine_args]

    def start_scripts(self) -> None:
        env = self.infra.env | _QUIET
        self.child("worker", [sys.executable, *self.worker()], **env)
        frontend = ["-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(self.port)]
        self.child("frontend", [sys.executable, *frontend], **env)


class DynamoMocker(Dynamo):
    name, title = "mocker", "`dynamo.frontend` + `dynamo.mocker`"

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
        launcher = ["-m", "bench.engine_alone", self.setting.model, *self.setting.engine_args]
        self.process = Child(
            "engine", [sys.executable, *launcher], self.folder / "engine.log", stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.children.append(self.process.start())

    def is_ready(self) -> bool:
        self.process.check()
        stdout = self.process.popen.stdout
        assert stdout is not None
        return bool(select.select([stdout], [], [], 1.0)[0]) and self._read() == "ready"

    def answer(self, load: Load, executor: Executor) -> Outcome:
        stdin = self.process.popen.stdin
        assert stdin is not None
        stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        stdin.flush()
        outcome = json.loads(self._read())
        return Outcome([Reply(**reply) for reply in outcome["replies"]], outcome["started_at"], 0.0)

    def _read(self) -> str:
        assert self.process.popen.stdout is not None
        return self.process.popen.stdout.readline().decode().strip()


class Instant(Peer):
    """No server to measure, but the client."""

    name, title = "instant", "a server that answers at once"

    def start(self) -> None:
        self.child("server", [sys.executable, "-m", "bench.instant_server", str(self.port)])


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        EngineAlone, SGLangServer, Dynamo, DynamoMocker, Chapter, Ours, OursScaled, OursPinned, Instant,
    )
}  # fmt: skip
