"""What only the real SGLang can show: what it refuses, that what is abandoned leaves its batch, and that a killed one's
stream goes on.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from common.wire import DESCRIBE
from tests.processes import MODEL, ROOT, Infra, Pipeline, Process, running, wait_until
from tests.raw_http import open_request

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]

STORY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
    "temperature": 0,
}
READY_S = 300
MAX_TOTAL_TOKENS = 2200  # of all requests together: two long ones
LONG = {**STORY, "ignore_eos": True, "max_tokens": 1000}
# SGLang keeps 6 tokens of its pool to itself, and wants a prompt to be smaller than the rest.
MAX_INPUT_TOKENS = MAX_TOTAL_TOKENS - 7


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The real scripts, with a patient processor, and an engine that has room for two requests, one more in its queue.

    Its scheduler logs the batch at each step.
    """
    folder = tmp_path_factory.mktemp("watched")
    infra = Infra(folder / "infra")
    (folder / "tmp").mkdir()
    env = {"TMPDIR": str(folder / "tmp")}
    with running(infra.start()), running(pipeline := Pipeline(infra, folder / "scripts", env=env)):
        pipeline.frontend()
        pipeline.processor("--engine-wait", str(READY_S))
        pipeline.engine(
            *("--log-level", "info", "--decode-log-interval", "1"),
            *("--max-total-tokens", str(MAX_TOTAL_TOKENS), "--max-running-requests", "2", "--max-queued-requests", "1"),
        )
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


def outcomes(engine: Process) -> list[str]:
    """How the requests ended that the engine script has answered so far."""
    return re.findall(r"request \S*: (\w+), ", engine.log)


def ask(pipeline: Pipeline, **fields: object) -> httpx.Response:
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=STORY | {"max_tokens": 1} | fields, timeout=120)


def ask_engine(pipeline: Pipeline, requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The engine's own answers."""
    asked = subprocess.run(
        [sys.executable, "-m", "tests.ask_engine"],
        input=json.dumps(requests), env={**os.environ, **pipeline.env},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("[")]


def test_a_prompt_above_what_the_engine_takes_is_refused(watched: Pipeline) -> None:
    num_tokens = ask(watched).json()["usage"]["prompt_tokens"]
    fitting = [{"role": "user", "content": STORY["messages"][0]["content"] + " ha" * (MAX_INPUT_TOKENS - num_tokens)}]
    too_long = [{"role": "user", "content": fitting[0]["content"] + " ha"}]
    for stream in (False, True):
        refused = ask(watched, messages=too_long, stream=stream)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert refused.json()["error"]["message"].endswith(
            f"at most {MAX_INPUT_TOKENS} of them in the messages. Your messages have {MAX_INPUT_TOKENS + 1} tokens."
        )
    answer = ask(watched, messages=fitting, stream=True, max_tokens=None)
    assert answer.status_code == 200
    assert '"finish_reason":"length"' in answer.text


def test_a_prompt_that_sglang_aborts_is_the_callers_fault(watched: Pipeline) -> None:
    """So ends what a processor sends that does not know the limit."""
    requests = [
        {"token_ids": [1] * (MAX_INPUT_TOKENS + 1), "output_options": {"stream": stream}} for stream in (False, True)
    ]
    (description,), *refusals = ask_engine(watched, [DESCRIBE, *requests])
    assert description["max_input_tokens"] == MAX_INPUT_TOKENS
    for (refusal,) in refusals:
        assert refusal["error"]["type"] == "invalid_request_error"
        assert f"Input length ({MAX_INPUT_TOKENS + 1} tokens)" in refusal["error"]["message"]
    assert ask(watched).status_code == 200


def test_a_full_queue_is_a_503_and_costs_the_engine_nothing(watched: Pipeline) -> None:
    _, processor, engine = watched.processes
    num_failures, num_cancelled = processor.log.count(" failed: "), outcomes(engine).count("cancelled")
    with ExitStack() as clients:
        for size in (1, 2):
            clients.enter_context(open_request(watched, **LONG, stream=True))
            wait_for_batch(engine, size, 60)
        clients.enter_context(open_request(watched, **LONG))
        wait_until(lambda: "#queue-req: 1" in engine.log.splitlines()[-1], 60, "a request in the queue")
        for stream in (False, True):
            refused = ask(watched, stream=stream)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.json()["error"]["message"] == "All instances of inference/engine/generate are busy."
    wait_until(lambda: outcomes(engine).count("cancelled") == num_cancelled + 3, 30, "the requests to be left")
    assert ask(watched).status_code == 200
    assert processor.log.count(" failed: ") == num_failures
    assert outcomes(engine)[-6:] == [*["busy"] * 2, *["cancelled"] * 3, "ok"]
    assert "Traceback" not in engine.log


@pytest.mark.parametrize("stream", [False, True])
def test_an_abandoned_request_leaves_the_batch_within_a_second(watched: Pipeline, stream: bool) -> None:
    engine = watched.processes[2]
    num_cancelled = outcomes(engine).count("cancelled")
    with open_request(watched, **LONG, stream=True):
        with open_request(watched, **LONG, stream=stream):
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
    assert outcomes(engine).count("cancelled") == num_cancelled + 2
    assert "aborted" not in outcomes(engine)


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
