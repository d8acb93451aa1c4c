"""Streams to the letter, from the real frontend and processor on an engine that answers a message with itself."""

import contextlib
import http.client
import json
import statistics
import time
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from common.text.vocabulary import Vocabulary
from tests.processes import MODEL, Pipeline, new_pipeline, wait_until
from tests.streams import Stream, ask_stream, events_of, read_stream
from tests.tokenizers_for_tests import MULTIBYTE_TEXTS, encode, with_each_text

pytestmark = pytest.mark.process

FAMILY = "👩\u200d👩\u200d👧\u200d👦"
ALL_TEXTS = "\n".join(text for text in MULTIBYTE_TEXTS.values() if "\ufffd" not in text)


def said(text: str, **fields: Any) -> dict[str, Any]:
    """The body of a request whose answer is `text`."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """A frontend and a processor. One engine at a time joins them."""
    with new_pipeline(tmp_path_factory.mktemp("stage")) as pipeline:
        pipeline.processor("--engine-wait", "1")
        pipeline.frontend()
        yield pipeline


CHUNKS = [("--echo", "--tokens-per-chunk", size) for size in ("1", "3", "7")]


@pytest.fixture(scope="module", params=CHUNKS, ids=" ".join)
def client(stage: Pipeline, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A client of the stage with one engine on it: with 1, 3 and 7 tokens a chunk, or as a test wants it."""
    engine = stage.fake_engine(*request.param) if request.param else None
    try:
        if engine:
            stage.wait_ready()
        else:
            wait_until(lambda: "engines" in httpx.get(f"{stage.url}/ready").text, 30, "the engine to be gone")
        with httpx.Client(base_url=stage.url, timeout=60) as client:
            yield client
    finally:
        if engine:
            engine.terminate()
            stage.processes.remove(engine)


def with_engine(*args: str) -> pytest.MarkDecorator:
    """Runs a test once, with such an engine."""
    return pytest.mark.parametrize("client", [args], indirect=True, ids=" ".join)


def test_the_events_of_a_stream_to_the_letter(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=said("Hello", stream=True))
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    events, is_done = events_of(response.content)
    assert is_done
    head = {"id": events[0]["id"], "object": "chat.completion.chunk", "created": events[0]["created"], "model": MODEL}
    deltas = [({"role": "assistant", "content": "", "refusal": None}, None), ({"content": "Hello"}, None), ({}, "stop")]
    assert events == [
        {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}
        for delta, finish_reason in deltas
    ]
    assert head["id"].startswith("chatcmpl-")
    assert abs(head["created"] - time.time()) < 60
    lines = response.text.split("\n")
    assert all(line.startswith("data: ") for line in lines[:-2:2])
    assert set(lines[1::2]) == {""}
    assert response.text.endswith("data: [DONE]\n\n")


def test_usage_comes_once_and_only_when_asked_for(client: httpx.Client) -> None:
    body = said("one two three", max_tokens=2)
    with_usage = ask_stream(client, body | {"stream_options": {"include_usage": True}})
    assert [event["usage"] for event in with_usage.events[:-1]] == [None] * (len(with_usage.events) - 1)
    assert with_usage.events[-1]["choices"] == []
    assert with_usage.usage == ask(client, body)["usage"]
    assert with_usage.usage["completion_tokens"] == 2
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        assert not any("usage" in event for event in ask_stream(client, body | options).events)


@with_engine("--echo", "--token-interval-ms", "10")
def test_continuous_usage_counts_up_to_the_last_one(client: httpx.Client) -> None:
    body = said("one two three " * 20)
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = ask_stream(client, body | {"stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in stream.events]
    assert counts == sorted(counts)
    assert len(set(counts)) > 4, "not while it goes on"
    assert stream.events[-1]["choices"] == []
    assert stream.usage == stream.events[-2]["usage"] == ask(client, body)["usage"]
    alone = ask_stream(client, body | {"stream_options": options | {"include_usage": False}})
    assert not any("usage" in event for event in alone.events)


@pytest.mark.parametrize("seed", [0, 5])
def test_each_choice_has_the_text_of_its_index(client: httpx.Client, tokenizer: Tokenizer, seed: int) -> None:
    text = "zero one two three four five six seven eight nine"
    # The engine leaves out as many tokens as its seed says, and each choice has a seed of its own.
    expected = {index: tokenizer.decode(encode(tokenizer, text)[seed + index :]) for index in range(3)}
    body = said(text, n=3, seed=seed)
    stream = ask_stream(client, body | {"stream_options": {"include_usage": True}})
    assert stream.contents == expected
    assert stream.finish_reasons == dict.fromkeys(range(3), "stop")
    answer = ask(client, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["index"]: choice["message"]["content"] for choice in answer["choices"]} == expected
    num_tokens = sum(len(encode(tokenizer, text)) - seed - index + 1 for index in range(3))
    assert answer["usage"]["completion_tokens"] == num_tokens
    assert stream.usage == answer["usage"]


@with_each_text()
def test_the_deltas_joined_are_the_whole_answer(client: httpx.Client, text: str) -> None:
    text = f"|{text}|"  # the template trims a message
    stream = ask_stream(client, said(text))
    assert stream.content == ask(client, said(text))["choices"][0]["message"]["content"] == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(stream.deltas[0])
    assert all(stream.deltas[0]), "an event without text"


def test_a_character_cut_off_by_max_tokens_is_dropped_both_ways(client: httpx.Client, tokenizer: Tokenizer) -> None:
    text = f"ok 👍🎉{FAMILY}"
    so_far = accumulate(map(Vocabulary(tokenizer).bytes_of, encode(tokenizer, text)))
    for num_tokens, cut_off in enumerate(so_far, start=1):
        body = said(text, max_tokens=num_tokens)
        stream, answer = ask_stream(client, body | {"stream_options": {"include_usage": True}}), ask(client, body)
        assert stream.content == answer["choices"][0]["message"]["content"] == cut_off.decode(errors="ignore")
        assert stream.finish_reasons[0] == answer["choices"][0]["finish_reason"] == "length"
        assert stream.usage == answer["usage"]
        assert answer["usage"]["completion_tokens"] == num_tokens


STOPS: list[tuple[str, list[str], str, str | None]] = [
    ("The answer is STOP and more", ["STOP"], "The answer is ", "STOP"),
    ("one two three four five six", ["three four fi"], "one two ", "three four fi"),
    ("one two three four five six", ["three fourx", "five"], "one two three four ", "five"),
    ("abcabcabd and so on", ["abcabd"], "abc", "abcabd"),
    ("overlapping words", ["lapping w", "ping"], "overlap", "ping"),
    ("overlapping words", ["ping", "lapping"], "over", "lapping"),
    (f"so {FAMILY}!? yes", ["!?"], f"so {FAMILY}", "!?"),
    ("ok 👍👍👍 done", ["👍👍 "], "ok 👍", "👍👍 "),
    ("你好、世界。日本語", ["、世"], "你好", "、世"),
    ("line one\n\nline two", ["\n\n"], "line one", "\n\n"),
    ("STOP at once", ["STOP"], "", "STOP"),
    ("it never says ST", ["STOP", "says ST!"], "it never says ST", None),
    (ALL_TEXTS + "END" + ALL_TEXTS, ["END"], ALL_TEXTS, "END"),
]


def fewest_tokens_with(tokenizer: Tokenizer, token_ids: list[int], stop: str) -> int:
    texts = (tokenizer.decode(token_ids[:count]) for count in range(len(token_ids) + 1))
    return next(count for count, text in enumerate(texts) if stop in text)


@pytest.mark.parametrize(("text", "stop", "expected", "found"), STOPS)
def test_no_part_of_a_stop_string_is_sent_and_tokens_count_up_to_it(
    client: httpx.Client, tokenizer: Tokenizer, text: str, stop: list[str], expected: str, found: str | None
) -> None:
    token_ids = encode(tokenizer, text)
    num_tokens = fewest_tokens_with(tokenizer, token_ids, found) if found else len(token_ids) + 1
    body = said(text, stop=stop, logprobs=True)
    stream = ask_stream(client, body | {"stream_options": {"include_usage": True}})
    answer = ask(client, body)
    (choice,) = answer["choices"]
    assert stream.content == choice["message"]["content"] == expected
    assert stream.finish_reasons[0] == choice["finish_reason"] == "stop"
    assert stream.usage == answer["usage"]
    assert answer["usage"]["completion_tokens"] == num_tokens
    assert stream.logprobs[0] == choice["logprobs"]["content"]
    assert len(stream.logprobs[0]) == num_tokens


@with_each_text()
def test_every_token_has_its_logprob(client: httpx.Client, tokenizer: Tokenizer, text: str) -> None:
    text = f"|{text}|"  # the template trims a message
    body = said(text, logprobs=True, top_logprobs=2)
    stream, (choice,) = ask_stream(client, body), ask(client, body)["choices"]
    entries = choice["logprobs"]["content"]
    assert stream.logprobs[0] == entries
    token_ids = [*encode(tokenizer, text), 2]
    assert [entry["logprob"] for entry in entries] == [-token_id / 1000 for token_id in token_ids]
    assert b"".join(bytes(entry["bytes"] or []) for entry in entries) == text.encode()
    assert (entries[-1]["token"], entries[-1]["bytes"]) == ("<|im_end|>", None)
    for entry in entries:
        # Dynamo 0.5 writes numbers as JSON and may read back one that is a last bit away.
        top_logprobs = [top["logprob"] for top in entry["top_logprobs"]]
        assert top_logprobs == pytest.approx([entry["logprob"], entry["logprob"] - 1], rel=1e-15)
        assert entry["top_logprobs"][0]["token"] == entry["token"]


WRONG: list[tuple[dict[str, Any], int]] = [
    ({"temperature": 3}, 400),
    ({"messages": []}, 400),
    ({"max_tokens": 9000}, 400),
    ({"model": "gpt-4"}, 404),
]


@pytest.mark.parametrize(("fields", "status"), WRONG)
def test_an_error_before_the_start_has_a_status_of_its_own(
    client: httpx.Client, fields: dict[str, Any], status: int
) -> None:
    response = client.post("/v1/chat/completions", json=said("Hello", stream=True) | fields)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("client", "status"), [((), 503), (("--garbage", "error-text"), 502)], indirect=["client"], ids=str
)
def test_a_failure_before_the_first_token_has_a_status_of_its_own(client: httpx.Client, status: int) -> None:
    response = client.post("/v1/chat/completions", json=said("Hello", stream=True))
    assert response.status_code == status
    assert response.json()["error"]["type"] == "server_error"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """20 tokens a second, to be harmed; nobody waits long for anybody."""
    with new_pipeline(tmp_path_factory.mktemp("slow")) as pipeline:
        pipeline.fake_engine("--echo", "--token-interval-ms", "50")
        pipeline.processor("--engine-wait", "1")
        pipeline.frontend("--processor-wait", "1")
        pipeline.wait_ready()
        yield pipeline


@pytest.mark.parametrize("killed", [0, 1], ids=["engine", "processor"])
def test_an_error_after_the_start_is_an_event_and_the_end(slow: Pipeline, killed: int) -> None:
    victim = slow.processes[killed]
    raw = b""
    with httpx.stream("POST", f"{slow.url}/v1/chat/completions", json=said("word " * 200, stream=True)) as response:
        assert response.status_code == 200
        for piece in response.iter_raw():
            if b'"content":" word"' in raw and victim.is_alive:
                victim.kill()
            raw += piece
    num_served = victim.log.count("serving inference/")
    victim.start()
    wait_until(lambda: victim.log.count("serving inference/") > num_served, 60, "it to be back")
    stream = read_stream(raw)
    assert stream.error is not None
    assert stream.error["type"] == "server_error"
    assert 0 < len(stream.deltas[0]) < 200
    assert b"[DONE]" not in raw


def stream_over(connection: http.client.HTTPConnection) -> tuple[Stream, float]:
    """One stream over a connection that may have been used before, and the seconds to its first text."""
    started = time.monotonic()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(said("one two three four", stream=True)),
        {"content-type": "application/json"},
    )  # fmt: skip
    response = connection.getresponse()
    raw, first_s = b"", 0.0
    while line := response.readline():
        raw += line
        if not first_s and b'"content":"one' in line:
            first_s = time.monotonic() - started
    return read_stream(raw), first_s


@with_engine("--echo", "--token-interval-ms", "2")
def test_a_reused_connection_is_as_quick_to_the_first_token_as_a_fresh_one(
    stage: Pipeline, client: httpx.Client
) -> None:
    def connection() -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", stage.http_port, timeout=30)

    with contextlib.closing(connection()) as kept:
        stream_over(kept)
        sock = kept.sock
        fresh_s, reused_s = [], []
        for _ in range(20):
            with contextlib.closing(connection()) as fresh:
                fresh_s.append(stream_over(fresh)[1])
            reused_s.append(stream_over(kept)[1])
            assert kept.sock is sock, "the connection was not kept"
    assert statistics.median(reused_s) < statistics.median(fresh_s) + 0.020


@with_engine("--echo", "--token-interval-ms", "50")
def test_events_are_sent_as_their_tokens_come(client: httpx.Client) -> None:
    started = time.monotonic()
    with client.stream("POST", "/v1/chat/completions", json=said("word " * 40, stream=True)) as response:
        arrivals = [time.monotonic() - started for line in response.iter_lines() if '"content":" word"' in line]
    assert arrivals[-1] - arrivals[0] > 0.7 * 0.050 * 39
