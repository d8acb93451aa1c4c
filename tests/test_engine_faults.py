"""What only the real SGLang can show: abandoned requests leave its batch, and a killed one's stream goes on."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.processes import MODEL, Infra, Pipeline, Process, running, wait_until
from tests.raw_http import open_request

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]

STORY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
    "temperature": 0,
}
READY_S = 300


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The real scripts, with an engine whose scheduler logs its batch at each step, and a patient processor."""
    folder = tmp_path_factory.mktemp("watched")
    infra = Infra(folder / "infra")
    (folder / "tmp").mkdir()
    env = {"TMPDIR": str(folder / "tmp")}
    with running(infra.start()), running(pipeline := Pipeline(infra, folder / "scripts", env=env)):
        pipeline.frontend()
        pipeline.processor("--engine-wait", str(READY_S))
        pipeline.engine("--log-level", "info", "--decode-log-interval", "1")
        pipeline.wait_ready(READY_S)
        yield pipeline


def batch_sizes(engine: Process) -> list[int]:
    """The scheduler's own count of running requests, one a decoding step."""
    return [int(count) for count in re.findall(r"Decode batch.*#running-req: (\d+)", engine.log)]


def wait_for_batch(engine: Process, size: int, timeout_s: float) -> float:
    """Until the newest steps run that many requests. Returns the seconds it took."""
    num_before = len(batch_sizes(engine))
    return wait_until(lambda: batch_sizes(engine)[num_before:][-1:] == [size], timeout_s, f"a batch of {size}")


def seconds_a_step(engine: Process) -> float:
    target = len(batch_sizes(engine)) + 4
    return wait_until(lambda: len(batch_sizes(engine)) >= target, 60, "four steps") / 4


@pytest.mark.parametrize("stream", [False, True])
def test_an_abandoned_request_leaves_the_batch_within_a_second(watched: Pipeline, stream: bool) -> None:
    engine = watched.processes[2]
    fields = {**STORY, "ignore_eos": True, "max_tokens": 2000}
    with open_request(watched, **fields, stream=True):
        with open_request(watched, **fields, stream=stream):
            wait_for_batch(engine, 2, 60)
            step_s = seconds_a_step(engine)
        left_s = wait_for_batch(engine, 1, 30)
        print(f"one of two left after {left_s:.2f} s (stream: {stream}; a step takes {step_s:.2f} s)")
        assert left_s < 1.0 + 2 * step_s  # the step in work, and the one that shows it
    started = time.monotonic()
    num_steps = -1
    while num_steps != (num_steps := len(batch_sizes(engine))):  # steps end when nothing runs
        assert time.monotonic() - started < 3 + 10 * step_s
        time.sleep(0.5 + 2 * step_s)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["etcd", "nats"])
def test_a_minute_without_a_server_does_not_cost_the_engine_its_model(watched: Pipeline, server: str) -> None:
    engine = psutil.Process(watched.processes[2].pid)
    pids = [child.pid for child in engine.children(recursive=True)]
    down = getattr(watched.infra, server)
    down.kill()
    time.sleep(60)  # the outage itself
    down.start()
    url, body = f"{watched.url}/v1/chat/completions", STORY | {"max_tokens": 1}
    back_s = wait_until(lambda: httpx.post(url, json=body, timeout=120).status_code == 200, 15, "an answer")
    print(f"answers {back_s:.1f} s after the return of {server}")
    assert [child.pid for child in engine.children(recursive=True)] == pids
    assert watched.processes[2].pid == engine.pid


def test_a_stream_goes_on_when_the_only_engine_is_killed_and_started_again(watched: Pipeline) -> None:
    engine = watched.processes[2]
    url = f"{watched.url}/v1/chat/completions"
    body = STORY | {"max_tokens": 60}
    expected = httpx.post(url, json=body, timeout=120).json()["choices"][0]
    text, finish_reason, killed_at, pause_s = "", None, 0.0, 0.0
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=2 * READY_S) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            delta = choice["delta"].get("content", "")
            text, finish_reason = text + delta, choice["finish_reason"]
            if killed_at and delta and not pause_s and time.monotonic() - killed_at > 5:
                pause_s = time.monotonic() - killed_at
            if not killed_at and len(text) > 60:
                engine.kill()
                engine.start()
                killed_at = time.monotonic()
    print(f"went on {pause_s:.0f} s after the kill")
    assert pause_s
    assert text == expected["message"]["content"]
    assert finish_reason == expected["finish_reason"]
    left = [path.name for path in Path(watched.env["TMPDIR"]).iterdir() if path.is_dir()]
    assert not [name for name in left if "rendezvous" in name]
    print(f"left in TMPDIR: {[path.name for path in Path(watched.env['TMPDIR']).iterdir()]}")
