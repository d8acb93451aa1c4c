"""Which engine answers: each policy of the router, and none, on SGLang's own loads of prompts that begin alike.

One pipeline stays up; from load to load only the router changes. No two loads have a prompt in common. Fake engines
have a cache, take their time for each block that is not in it, and compute one prompt after the other.
"""

import itertools
import re
import statistics
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from bench.peers import DynamoPeer, Setting
from bench.processes import free_port, wait_until
from bench.serving import BenchServing

POLICIES = ("none", "round-robin", "least-loaded", "kv")
FAKE_ENGINE = ("tests/fake_engine.py", "--kv-events", "--cache-blocks", "1200", "--ms-per-block", "4")
_STOP_S = 10.0


def workload(
    num_groups: int, prompts_per_group: int, *, shared: int, own: int, new: int, at_once: int, turns: int = 1
) -> list[str]:
    """For `sglang.benchmark.serving`. shared, own, new: tokens of a group, of each question, of each answer."""
    return (
        f"--dataset-name generated-shared-prefix --gsp-num-groups {num_groups} --gsp-prompts-per-group "
        f"{prompts_per_group} --gsp-system-prompt-len {shared} --gsp-question-len {own} --gsp-output-len {new} "
        f"--gsp-num-turns {turns} --max-concurrency {at_once}"
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


class Routed(DynamoPeer):
    name, title = "routed", "some engines with caches, a processor, a frontend, a router or none"

    def start_scripts(self) -> None:
        script, self._env = self.setting.script, {**self.infra.env, "DYN_REQUEST_PLANE": "", "DYN_LOG": ""}
        sglang = ("--model-path", self.setting.model, "--kv-events", "--page-size", "16", *self.setting.engine_args)
        command = script(*FAKE_ENGINE) if self.setting.is_engine_fake else script("engine.py", *sglang)
        num_engines = 4 if self.setting.is_engine_fake else 2
        self.metrics_ports = [free_port() % 16_384 + 16_384 for _ in range(num_engines)]  # Dynamo's are 15 bits
        for number, port in enumerate(self.metrics_ports):
            env = {"CUDA_VISIBLE_DEVICES": str(number), "DYN_SYSTEM_PORT": str(port), "PYTHONPATH": "."}
            self.child(f"engine{number}", command, **self._env, **env)
        self.child("processor", script("processor.py", "--model", self.setting.model), **self._env)
        self.child("frontend", script("frontend.py", "--port", str(self.port)), **self._env)

    def is_ready(self) -> bool:
        return super().is_ready() and f'"engines":{len(self.metrics_ports)}' in text_at(f"{self.url}/ready")

    def prompt_tokens(self) -> tuple[float, float]:
        """Those that were cached, and all, as the engines have counted."""
        if self.setting.is_engine_fake:
            logs = [child.log_path.read_text() for child in self.children if child.name.startswith("engine")]
            found = [counts for log in logs for counts in re.findall(r"cached (\d+) of (\d+)", log)]
        else:
            found = [_counted(port) for port in self.metrics_ports]
        return sum(float(cached) for cached, _ in found), sum(float(num) for _, num in found)

    def measure(self, policy: str, args: Sequence[str], bench_serving: BenchServing) -> "Figures":
        if policy != "none":
            router = self.child(f"router-{policy}", self.setting.script("router.py", "--policy", policy), **self._env)
            log, before = router.log_path, router.log_path.read_text().count("serving inference/router")
            wait_until(lambda: log.read_text().count("serving inference/router") > before, 60, "the router")
        cached, num = self.prompt_tokens()
        serving = bench_serving.run([*args, "--model", self.setting.model, "--base-url", self.url])
        cached_now, num_now = self.prompt_tokens()
        if policy != "none":
            router.terminate()
            router.stop(_STOP_S)
            self.children.remove(router)
        hit_rate = (cached_now - cached) / (num_now - num)
        return Figures(serving["request_throughput"], serving["median_ttft_ms"], hit_rate, serving["completed"])


@dataclass(frozen=True)
class Figures:
    """hit_rate: of the prompts' tokens."""

    requests_per_s: float
    ttft_p50_ms: float
    hit_rate: float
    num_completed: int


def text_at(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read(), "utf-8")


def _counted(port: int) -> tuple[str, str]:
    text = text_at(f"http://127.0.0.1:{port}/metrics")
    values = dict(re.findall(r"^dynamo_chat_((?:cached_)?prompt_tokens)_total{.*} (\S+)$", text, re.MULTILINE))
    return values["cached_prompt_tokens"], values["prompt_tokens"]


def measure_routing(setting: Setting, *, num_rounds: int, timeout_s: float) -> str:
    """A table: medians of the rounds."""
    loads = ON_FAKES if setting.is_engine_fake else ON_GPUS
    done: dict[tuple[str, str], list[Figures]] = {}
    routed, num_loads = Routed(setting), 0
    bench_serving = BenchServing(setting.folder)
    try:
        routed.bring_up(timeout_s)
        for _ in range(num_rounds):
            for load, policy in itertools.product(loads, POLICIES):
                num_loads += 1
                figures = routed.measure(policy, [*loads[load], "--seed", str(num_loads)], bench_serving)
                done.setdefault((load, policy), []).append(figures)
                print(load, policy, figures, flush=True)
    finally:
        routed.stop()
        bench_serving.close()
    return markdown(done)


def markdown(done: dict[tuple[str, str], list[Figures]]) -> str:
    """Ratios are to taking turns without a router."""
    rows = ["| load | router | requests/s | ratio | TTFT p50, ms | hit rate |", "|---|---|---|---|---|---|"]
    for (load, policy), rounds in done.items():
        speed, ttft, hit_rate = (
            statistics.median(getattr(each, name) for each in rounds)
            for name in ("requests_per_s", "ttft_p50_ms", "hit_rate")
        )
        by_turns = statistics.median(each.requests_per_s for each in done[load, "none"])
        rows.append(f"| {load} | {policy} | {speed:.1f} | {speed / by_turns:.2f} | {ttft:.0f} | {hit_rate:.2f} |")
    return "\n".join(rows) + "\n"
