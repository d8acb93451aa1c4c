"""What only the real SGLang can show: a killed one's stream goes on, what it refuses, how what is abandoned ends."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tokenizers import Tokenizer

from common.wire import DESCRIBE
from tests.call_endpoint import call_endpoint
from tests.processes import SHORT_LEASE, Pipeline, Process, wait_until
from tests.raw_http import open_request
from tests.tokenizers_for_tests import ids_by_bytes

pytestmark = [pytest.mark.pipeline, pytest.mark.last, pytest.mark.timeout(900)]

PATIENT = "patient"  # the name under which a processor serves that waits for an engine as long as one needs to start
READY_S = 300
STORY = {
    "model": PATIENT,
    "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
    "temperature": 0,
}
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nTell me a story about a lighthouse.<|im_end|>\n<|im_start|>assistant\n"
)
# Two words are as good as each other when rounding can swap them: bf16 has steps of 0.125 between 16 and 32, where
# the logits of likely words are.
TIE_NATS = 0.5
MAX_TOTAL_TOKENS = 2200  # of all requests together: two long ones
LONG = {**STORY, "ignore_eos": True, "max_tokens": 1000}
# SGLang keeps 6 tokens of its pool to itself, and wants a prompt to be smaller than the rest.
MAX_INPUT_TOKENS = MAX_TOTAL_TOKENS - 7


@dataclass
class Resumed:
    """A stream whose only engine was killed midway. num_before: of its tokens, those that came before the kill."""

    text: str
    token_ids: list[int]
    num_before: int
    finish_reason: str | None


@pytest.fixture(scope="module")
def patient(pipeline: Pipeline) -> Iterator[Pipeline]:
    """The pipeline with a second processor, which has patience enough."""
    processor = pipeline.processor("--served-model-name", PATIENT, "--engine-wait", str(READY_S))
    pipeline.wait_ready(processors=2)
    yield pipeline
    processor.stop()
    pipeline.processes.remove(processor)


@pytest.fixture(scope="module")
def resumed(patient: Pipeline, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """The engine's next life logs its batch at each step, takes two requests and one more in its queue, tells routers
    what it has cached, and has a short lease.
    """
    engine = patient.processes[2]
    others = [process.pid for process in patient.processes if process is not engine]
    events: list[dict[str, Any]] = []
    num_before = 0
    body = STORY | {"max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": True}
    with httpx.stream("POST", f"{patient.url}/v1/chat/completions", json=body, timeout=2 * READY_S) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                events.append(choice)
                if len(events) == 15:
                    engine.kill()
                    num_before = len(token_ids_of(events, tokenizer))
                    engine.command = [
                        *(*engine.command, "--log-level", "info", "--decode-log-interval", "1"),
                        *("--max-total-tokens", str(MAX_TOTAL_TOKENS)),
                        *("--max-running-requests", "2", "--max-queued-requests", "1", "--kv-events"),
                    ]
                    engine.env = {**engine.env, **SHORT_LEASE, "TMPDIR": str(tmp_path_factory.mktemp("tmp"))}
                    engine.start()
    text = "".join(choice["delta"].get("content", "") for choice in events)
    assert [process.pid for process in patient.processes if process is not engine and process.is_alive] == others
    return Resumed(text, token_ids_of(events, tokenizer), num_before, events[-1]["finish_reason"])


@pytest.fixture(scope="module")
def watched(patient: Pipeline, resumed: Resumed) -> Pipeline:
    """The pipeline with the engine's next life."""
    return patient


def token_ids_of(choices: list[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """From a stream's logprobs."""
    ids = ids_by_bytes(tokenizer)
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    return [ids[bytes(entry["bytes"] or entry["token"].encode())] for entry in entries]


def test_a_stream_goes_on_when_the_only_engine_is_killed_and_started_again(
    patient: Pipeline, resumed: Resumed, tokenizer: Tokenizer
) -> None:
    """What was delivered stays. What follows is what the model says to the prompt and what was delivered: not always
    what it would have said undisturbed, because a prefill rounds otherwise than the decoding of the same tokens.
    """
    token_ids, num_before = resumed.token_ids, resumed.num_before
    assert resumed.text == tokenizer.decode(token_ids)
    assert (len(token_ids), resumed.finish_reason) == (60, "length")
    assert 10 < num_before < 20
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    asked = [
        {
            "token_ids": prompt + token_ids[:at],
            "sampling_options": {"temperature": 0.0},
            "stop_conditions": {"max_tokens": 1},
            "output_options": {"stream": False, "logprobs": 20},
        }
        for at in range(num_before, len(token_ids))
    ]
    answers = call_endpoint(patient, "engine", "generate", asked)
    for at, (answer,) in enumerate(answers, start=num_before):
        logprobs = dict(answer["top_logprobs"][0])
        assert logprobs[token_ids[at]] > max(logprobs.values()) - TIE_NATS, f"token {at}: {tokenizer.decode(token_ids)}"


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
    """How the requests ended that the engine script has answered since it was started again."""
    return re.findall(r"request \S*: (\w+), ", engine.log_since_start)


def ask(pipeline: Pipeline, **fields: object) -> httpx.Response:
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=STORY | {"max_tokens": 1} | fields, timeout=READY_S)


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
    (description,), *refusals = call_endpoint(watched, "engine", "generate", [DESCRIBE, *requests])
    assert description["max_input_tokens"] == MAX_INPUT_TOKENS
    for (refusal,) in refusals:
        assert refusal["error"]["type"] == "invalid_request_error"
        assert f"Input length ({MAX_INPUT_TOKENS + 1} tokens)" in refusal["error"]["message"]
    assert ask(watched).status_code == 200


def test_a_full_queue_is_a_503_and_costs_the_engine_nothing(watched: Pipeline) -> None:
    _, _, engine, processor = watched.processes
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
    expected = [*["busy"] * 2, *["cancelled"] * 3, "ok"]
    wait_until(lambda: outcomes(engine)[-6:] == expected, 10, str(expected))  # its last line may come after the answer
    assert "Traceback" not in engine.log


@pytest.mark.parametrize("stream", [False, True])
def test_an_abandoned_request_leaves_the_batch_within_a_second(watched: Pipeline, stream: bool) -> None:
    engine = watched.processes[2]
    num_cancelled = outcomes(engine).count("cancelled")
    with open_request(watched, **LONG, stream=True):
        wait_for_batch(engine, 1, 60)  # of two that arrive in one step, the second would find the queue full
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


def test_an_engine_writes_no_rendezvous_to_disk_and_no_socket_of_ours(watched: Pipeline) -> None:
    folder = Path(str(watched.processes[2].env["TMPDIR"]))
    assert not [path.name for path in folder.iterdir() if "rendezvous" in path.name or "kv-events" in path.name]


def test_a_router_that_comes_late_knows_what_the_engine_has_cached(watched: Pipeline) -> None:
    """The page size is 1, and the router's blocks have 16 tokens."""
    prompt = [{"role": "user", "content": "What does a lighthouse keeper write down, and for whom? " * 8}]
    num_tokens = ask(watched, messages=prompt).json()["usage"]["prompt_tokens"]
    router = watched.router()
    try:
        wait_until(lambda: "serving inference/router/find_worker" in router.log, 30, "a router")

        def num_cached() -> int:
            body = STORY | {"messages": prompt, "max_tokens": 1}
            answer = httpx.post(f"{watched.url}/v1/chat/completions", json=body, headers={"x-show-path": "1"}).json()
            (engine_call,) = answer["path"]["calls"][0]["stage"]["calls"]
            return int(engine_call.get("route", {}).get("num_cached_tokens", 0))

        wait_until(lambda: num_cached() == num_tokens // 16 * 16, 60, "the prompt to be known")
    finally:
        router.stop()
        watched.processes.remove(router)


@pytest.mark.parametrize("outage_s", [6, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("server", ["etcd", "nats"])
def test_an_outage_does_not_cost_the_engine_its_model(watched: Pipeline, server: str, outage_s: int) -> None:
    engine = psutil.Process(watched.processes[2].pid)
    pids = [child.pid for child in engine.children(recursive=True)]
    down = getattr(watched.infra, server)
    down.kill()
    time.sleep(outage_s)  # the outage itself, longer than the lease
    down.start()
    url, body = f"{watched.url}/v1/chat/completions", STORY | {"max_tokens": 1}
    back_s = wait_until(lambda: httpx.post(url, json=body, timeout=READY_S).status_code == 200, 15, "an answer")
    print(f"answers {back_s:.1f} s after the return of {server}")
    assert [child.pid for child in engine.children(recursive=True)] == pids
    assert watched.processes[2].pid == engine.pid
