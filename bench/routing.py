"""Which engine answers: each policy of the router, and none, on SGLang's own loads of prompts that begin alike.

One pipeline stays up; from load to load only the router changes. Beside it, on two GPUs, are SGLang's own router and
`dynamo.frontend` with engines of their own; the SGLang schedulers of all but one are stopped. No two loads have a
prompt in common. Fake engines have a cache, take their time for each block that is not in it, and compute one prompt
after the other.
"""

import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import httpx

from bench.peers import QUIET, DynamoPeer, Peer, Setting, dynamo_frontend
from bench.processes import PYTHONPATH, free_port, frozen, wait_until
from bench.serving import BenchServing

POLICIES = ("none", "round-robin", "least-loaded", "kv")  # of ours
FAKE_ENGINE = ("tests/fake_engine.py", "--kv-events", "--cache-blocks", "1200", "--ms-per-block", "4")
_STOP_S = 10.0


def workload(
    num_groups: int, prompts_per_group: int, *, shared: int, own: int, new: int, at_once: int, turns: int = 1
) -> list[str]:
    """For `sglang.benchmark.serving`. shared, own, new: tokens of a group, of each question, of each answer.

    It does not count the tokens of its prompts, which would take longer than to answer them.
    """
    return (
        f"--dataset-name generated-shared-prefix --gsp-num-groups {num_groups} --gsp-prompts-per-group "
        f"{prompts_per_group} --gsp-system-prompt-len {shared} --gsp-question-len {own} --gsp-output-len {new} "
        f"--gsp-num-turns {turns} --gsp-fast-prepare --max-concurrency {at_once}"
    ).split()


ON_FAKES = {
    "shared prefix": workload(24, 8, shared=1024, own=64, new=8, at_once=32),
    "conversations": workload(32, 1, shared=512, own=128, new=16, at_once=16, turns=4),
    "nothing shared": workload(96, 1, shared=1024, own=64, new=8, at_once=32),
}
ON_GPUS = {
    "shared prefix": workload(64, 16, shared=4096, own=128, new=64, at_once=128),
    "conversations": workload(128, 1, shared=2048, own=256, new=64, at_once=64, turns=5),
    "nothing shared": workload(256, 1, shared=2048, own=128, new=64, at_once=128),
}


@dataclass(frozen=True)
class Figures:
    """hit_rate: of the prompts' tokens."""

    requests_per_s: float
    ttft_p50_ms: float
    hit_rate: float
    num_completed: int


class Replicas(Peer):
    """Some engines behind one URL. metrics_ports: where each of them counts the prompt tokens that were cached."""

    policies: ClassVar[tuple[str, ...]]

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        num_engines = 4 if setting.is_engine_fake else 2
        self.metrics_ports = [free_port() % 16_384 + 16_384 for _ in range(num_engines)]  # Dynamo's are 15 bits

    def engine(self, port: int) -> list[str]:
        """The command of an engine with this port for its metrics."""
        raise NotImplementedError

    def start_engines(self, **env: str) -> None:
        for number, port in enumerate(self.metrics_ports):
            own = {"CUDA_VISIBLE_DEVICES": str(number), "DYN_SYSTEM_PORT": str(port), "PYTHONPATH": PYTHONPATH}
            self.child(f"engine{number}", self.engine(port), **env, **own)

    def module(self, name: str, *args: str) -> list[str]:
        """The command of an engine or a server around it that is a module of SGLang or Dynamo."""
        model = ("--model-path", self.setting.model, "--page-size", "16", "--enable-metrics")
        return [sys.executable, "-m", name, *model, *self.setting.engine_args, *args]

    def prompt_tokens(self) -> tuple[float, float]:
        """Those that were cached, and all, as the engines have counted."""
        found = [_counted(port) for port in self.metrics_ports]
        return sum(cached for cached, _ in found), sum(num for _, num in found)

    def measure(self, _policy: str, args: Sequence[str], bench_serving: BenchServing) -> Figures:
        cached, num = self.prompt_tokens()
        serving = bench_serving.run([*args, "--model", self.setting.model, "--base-url", self.url])
        cached_now, num_now = self.prompt_tokens()
        hit_rate = (cached_now - cached) / ((num_now - num) or float("nan"))
        return Figures(serving["request_throughput"], serving["median_ttft_ms"], hit_rate, serving["completed"])


class Ours(Replicas, DynamoPeer):
    name, title = "ours", "frontend.py, processor.py, router.py or none, and engine.py"
    policies = POLICIES

    def engine(self, port: int) -> list[str]:
        if self.setting.is_engine_fake:
            return self.setting.script(*FAKE_ENGINE)
        return self.setting.engine_script("engine.py", "--kv-events", "--page-size", "16")

    def start_scripts(self) -> None:
        script, self._env = self.setting.script, {**self.infra.env, "DYN_LOG": ""}
        self.start_engines(**self._env)
        self.child("processor", script("processor.py", "--model", self.setting.model), **self._env)
        self.child("frontend", script("frontend.py", "--port", str(self.port)), **self._env)

    def is_ready(self) -> bool:
        return super().is_ready() and f'"engines":{len(self.metrics_ports)}' in httpx.get(f"{self.url}/ready").text

    def prompt_tokens(self) -> tuple[float, float]:
        if not self.setting.is_engine_fake:
            return super().prompt_tokens()
        logs = [child.log_path.read_text() for child in self.children if child.name.startswith("engine")]
        found = [counts for log in logs for counts in re.findall(r"cached (\d+) of (\d+)", log)]
        return sum(float(cached) for cached, _ in found), sum(float(num) for _, num in found)

    def measure(self, policy: str, args: Sequence[str], bench_serving: BenchServing) -> Figures:
        if policy == "none":
            return super().measure(policy, args, bench_serving)
        router = self.child(f"router-{policy}", self.setting.script("router.py", "--policy", policy), **self._env)
        log, before = router.log_path, router.log_path.read_text().count("serving inference/router")
        wait_until(lambda: log.read_text().count("serving inference/router") > before, 60, "the router")
        figures = super().measure(policy, args, bench_serving)
        router.terminate()
        router.stop(_STOP_S)
        self.children.remove(router)
        return figures


class SGLangRouter(Replicas):
    name, title = "sglang", "`sglang_router` and `sglang.launch_server`"
    policies = ("cache_aware",)

    def engine(self, port: int) -> list[str]:
        where = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning")
        return self.module("sglang.launch_server", *where)

    def start(self) -> None:
        self.start_engines()
        urls = [f"http://127.0.0.1:{port}" for port in self.metrics_ports]
        router = ["-m", "sglang_router.launch_router", "--policy", "cache_aware", "--host", "127.0.0.1"]
        where = ["--port", str(self.port), "--prometheus-port", str(free_port()), "--worker-urls", *urls]
        self.child("router", [sys.executable, *router, *where])


class DynamoRouter(Replicas, DynamoPeer):
    name, title = "dynamo", "`dynamo.frontend --router-mode kv` and `dynamo.sglang`"
    policies = ("kv",)

    def engine(self, port: int) -> list[str]:
        events = {"publisher": "zmq", "topic": "kv-events", "endpoint": f"tcp://*:{free_port()}"}
        return self.module("dynamo.sglang", "--kv-events-config", json.dumps(events))

    def start_scripts(self) -> None:
        env = self.infra.env | QUIET
        self.start_engines(**env)
        kv = ["--router-mode", "kv", "--kv-cache-block-size", "16"]
        self.child("frontend", [*dynamo_frontend(self.port), *kv], **env)


ROUTED: dict[str, type[Replicas]] = {peer.name: peer for peer in (Ours, SGLangRouter, DynamoRouter)}


def _counted(port: int) -> tuple[float, float]:
    """How many prompt tokens were cached, and how many there were, by our metrics or SGLang's."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    pattern = r"^(?:dynamo_chat_|sglang:){}_total{{.*}} (\S+)$"
    cached, num = (
        sum(map(float, re.findall(pattern.format(name), text, re.MULTILINE)))
        for name in ("(?:cached_prompt_tokens|cached_tokens)", "prompt_tokens")
    )
    return cached, num


def measure_routing(
    setting: Setting, peers: Sequence[Replicas], policies: Sequence[str], *, num_rounds: int, until: float
) -> str:
    """A table: medians of the rounds. policies: of ours. until: as in `measure_all`."""
    loads = ON_FAKES if setting.is_engine_fake else ON_GPUS
    done: dict[tuple[str, str, str], list[Figures]] = {}
    bench_serving = BenchServing(setting.folder)
    contestants = [
        (peer, each) for peer in peers for each in peer.policies if peer.name != Ours.name or each in policies
    ]
    seed = itertools.count(1)
    try:
        for _, load, (peer, policy) in itertools.product(range(num_rounds), loads, contestants):
            if time.monotonic() < until:
                with frozen([process for other in peers if other is not peer for process in other.schedulers()]):
                    figures = peer.measure(policy, [*loads[load], "--seed", str(next(seed))], bench_serving)
                done.setdefault((load, peer.name, policy), []).append(figures)
                print(load, peer.name, policy, figures, flush=True)
    finally:
        bench_serving.close()
    return markdown(done)


def markdown(done: dict[tuple[str, str, str], list[Figures]]) -> str:
    """Ratios are to our taking turns, without a router."""
    rows = [
        "| load | server | policy | requests/s | ratio | TTFT p50, ms | hit rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for (load, name, policy), rounds in done.items():
        speed, ttft, hit_rate = (
            statistics.median(getattr(each, field) for each in rounds)
            for field in ("requests_per_s", "ttft_p50_ms", "hit_rate")
        )
        by_turns = [each.requests_per_s for each in done.get((load, Ours.name, "none"), [])]
        ratio = f"{speed / statistics.median(by_turns):.2f}" if by_turns else ""
        cells = (load, ROUTED[name].title, policy, f"{speed:.1f}", ratio, f"{ttft:.0f}", f"{hit_rate:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
