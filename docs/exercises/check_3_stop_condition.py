"""Exercise 3: an answer ends when one token comes `max_repeats` times in a row."""

import json

import httpx
import pytest

from tests.processes import MODEL, Pipeline, wait_until

# The engine's tokens are 1000 to 1009, 40 times 1010, and again; where in that an answer begins, the prompt decides.
NUM_TOKENS = 120


def ask(pipeline: Pipeline, **fields: object) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": NUM_TOKENS, **fields}
    answer = httpx.post(f"{pipeline.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def text_of(answer: httpx.Response) -> tuple[str, str, int]:
    """The text, the finish_reason and the completion_tokens, streamed or not."""
    if "choices" in (body := answer.text)[:200] and not body.startswith("data:"):
        (choice,) = answer.json()["choices"]
        return choice["message"]["content"], choice["finish_reason"], answer.json()["usage"]["completion_tokens"]
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    (reason,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return text, reason, events[-1]["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def whole(repeating: Pipeline) -> list[str]:
    """The tokens' texts of the answer without a limit."""
    (choice,) = ask(repeating, logprobs=True).json()["choices"]
    return [entry["token"] for entry in choice["logprobs"]["content"]]


def first_repeat(tokens: list[str], max_repeats: int) -> int:
    """How many tokens there are up to the last one of the first `max_repeats` equal ones."""
    return next(end for end in range(max_repeats, len(tokens) + 1) if len(set(tokens[end - max_repeats : end])) == 1)


@pytest.mark.parametrize("fields", [{}, {"stream": True, "stream_options": {"include_usage": True}}, {"stop": ["@@"]}])
@pytest.mark.parametrize("max_repeats", [3, 7])
def test_it_ends_with_the_token_that_repeats_too_often(
    repeating: Pipeline, whole: list[str], max_repeats: int, fields: dict[str, object]
) -> None:
    text, finish_reason, num_tokens = text_of(ask(repeating, max_repeats=max_repeats, **fields))
    end = first_repeat(whole, max_repeats)
    assert (text, finish_reason, num_tokens) == ("".join(whole[:end]), "stop", end)


def test_an_answer_that_does_not_repeat_so_often_goes_on(repeating: Pipeline, whole: list[str]) -> None:
    text, finish_reason, num_tokens = text_of(ask(repeating, max_repeats=41))
    assert (text, finish_reason, num_tokens) == ("".join(whole), "length", NUM_TOKENS)


def test_the_engine_is_stopped_then(repeating: Pipeline) -> None:
    """Nobody streams, and still the engine may not go on to the end."""
    (engine,) = [process for process in repeating.processes if "fake_engine" in process.name]
    num_stopped = engine.log.count("stopped True")
    ask(repeating, max_repeats=3)
    wait_until(lambda: engine.log.count("stopped True") > num_stopped, 20, "the engine's request to be stopped")


@pytest.mark.parametrize("value", [1, 0, -1, "three", 2.5])
def test_what_is_no_number_of_repeats_is_refused_by_name(repeating: Pipeline, value: object) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_repeats": value}
    answer = httpx.post(f"{repeating.url}/v1/chat/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_repeats")
    assert "Invalid value" in answer.json()["error"]["message"]
