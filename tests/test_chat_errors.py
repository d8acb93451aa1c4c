"""What a client gets for a wrong request, from the real frontend and processor on a fake engine."""

import json
import time
from typing import Any

import httpx
import pytest

from common.openai.request import parse_chat_request
from common.sampling import engine_request
from tests.load import error_of
from tests.processes import MODEL, Infra, Pipeline, accepts, wait_until

pytestmark = pytest.mark.process

MESSAGES = [{"role": "user", "content": "Hello!"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3}


BAD_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": ["x", "x" * 257]}, "stop[1]"),
    ({"stop": 5}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"colour": "red"}, "colour"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "grammar"}}, "response_format"),
    (
        {
            "response_format": {"type": "json_object"},
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "auto",
        },
        "response_format",
    ),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}},
        "response_format.json_schema.schema",
    ),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
    ({"chat_template_kwargs": {"style": "x" * 257}}, "chat_template_kwargs.style"),
    ({"chat_template_kwargs": {f"k{number}": number for number in range(17)}}, "chat_template_kwargs"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 4}, "min_tokens"),
    ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens"),
    ({"stop_token_ids": [99999999]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"stop_token_ids": 2}, "stop_token_ids"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
    ({"tool_choice": "required", "parallel_tool_calls": 1, "tools": [{"type": "function"}]}, "tools[0].function"),
    ({"function_call": {"name": "f"}, "functions": [{"name": "f"}]}, "functions"),
    ({"nvext": {"ignore_eos": True, "annotations": []}}, "nvext.annotations"),
    ({"nvext": {"ignore_eos": "yes"}}, "nvext.ignore_eos"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
    ({"messages": [*MESSAGES, {"role": "assistant"}]}, "messages[1]"),
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
    ({"model": 7}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS)
def test_a_bad_field_is_a_400_that_names_it(
    fake_client: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    error = error_of(fake_client.post("/v1/chat/completions", json=CHAT | fields), 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"tools": []},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": None}}},
        {"store": True, "verbosity": "low", "reasoning_effort": "minimal", "prompt_cache_options": {"ttl": "1h"}},
        {"prediction": {"type": "content", "content": "4"}},
        {"nvext": {"ignore_eos": True}},
        {"service_tier": "auto"},
        {"prompt_cache_key": "k"},
        {"safety_identifier": "x"},
        {"audio": None, "reasoning_effort": None, "n": None, "stop": None, "stream": None},
        {"user": "u", "metadata": {"a": "b"}},
        {"top_k": 0, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True},
        {"chat_template_kwargs": {"enable_thinking": False, "style": "brief", "budget": 5, "nothing": None}},
        {"min_tokens": 3, "stop_token_ids": [2, 5.0]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]},
        {
            "messages": [
                *MESSAGES,
                {"role": "assistant", "content": "Hi", "refusal": None, "annotations": []},
                *MESSAGES,
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "name": "anybody",
                    "content": [{"type": "text", "text": "Hello!", "cache_control": {}}],
                },
                {"role": "assistant", "content": "Hi", "id": "msg-1", "reasoning_content": "Hm.", "cache_control": {}},
                {"role": "assistant", "refusal": "No.", "name": "someone"},
                *MESSAGES,
            ]
        },
        {
            "messages": [
                *MESSAGES,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ]
        },
    ],
)
def test_what_changes_nothing_is_accepted(fake_client: httpx.Client, fields: dict[str, Any]) -> None:
    response = fake_client.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(fake_client: httpx.Client, body: bytes, words: str) -> None:
    response = fake_client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert words in error_of(response, 400)["message"]


def test_a_missing_field_is_named(fake_client: httpx.Client) -> None:
    assert error_of(fake_client.post("/v1/chat/completions", json={"model": MODEL}), 400)["param"] == "messages"
    assert error_of(fake_client.post("/v1/chat/completions", json={"messages": MESSAGES}), 400)["param"] == "model"


def test_an_unknown_model_is_a_404(fake_client: httpx.Client) -> None:
    error = error_of(fake_client.post("/v1/chat/completions", json=CHAT | {"model": "gpt-4"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_prompt_that_is_too_long_is_a_400_with_both_numbers(fake_client: httpx.Client) -> None:
    long = [{"role": "user", "content": "word " * 9000}]
    error = error_of(fake_client.post("/v1/chat/completions", json=CHAT | {"messages": long}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]
    assert "9031" in error["message"]


def test_an_answer_that_cannot_fit_is_a_400_with_both_numbers(fake_client: httpx.Client) -> None:
    error = error_of(fake_client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 8192}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]
    assert str(8192 + 32) in error["message"]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"items":' * 400 + "{}" + "}" * 400, "nested more than 48 levels"),
        (json.dumps({"enum": [f"value {at}" for at in range(40_000)]}), "more than 1000 values"),
        (json.dumps({"description": "x" * 800_000}), "more than 65536 characters"),
        (
            json.dumps({"$defs": {f"d{at}": {"$ref": f"#/$defs/d{(at * 7 + 1) % 1500}"} for at in range(1500)}}),
            "itself",
        ),
        (
            json.dumps({"allOf": [{"anyOf": [{"minLength": m * n} for m in range(9)]} for n in range(1, 9)]}),
            "too large",
        ),
    ],
    ids=["deep", "many values", "long", "circles", "all of any"],
)
def test_a_schema_bomb_is_refused_soon(fake_client: httpx.Client, schema: str, words: str) -> None:
    json_schema = {"name": "bomb", "schema": json.loads(schema)}
    body = CHAT | {"response_format": {"type": "json_schema", "json_schema": json_schema}}
    started = time.perf_counter()
    error = error_of(fake_client.post("/v1/chat/completions", json=body), 400)
    assert time.perf_counter() - started < 2
    assert error["param"] == "response_format.json_schema.schema"
    assert words in error["message"]


def test_other_media_types_are_a_415(fake_client: httpx.Client) -> None:
    error_of(fake_client.post("/v1/chat/completions", data={"model": MODEL}), 415)


def test_a_body_above_the_limit_is_a_413(fake_client: httpx.Client) -> None:
    huge = [{"role": "user", "content": "x" * 1_000_000}]
    error = error_of(fake_client.post("/v1/chat/completions", json=CHAT | {"messages": huge}), 413)
    assert "900000" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        CHAT | {"model": "m" * 800_000},
        CHAT | {"f" * 800_000: 1},
        CHAT | {"messages": [{"role": "r" * 800_000, "content": "hi"}]},
        CHAT | {"logit_bias": {"b" * 800_000: "x"}},
    ],
    ids=lambda body: str(body)[:40],
)
def test_an_error_repeats_little_of_what_was_sent(fake_client: httpx.Client, body: dict[str, Any]) -> None:
    response = fake_client.post("/v1/chat/completions", json=body)
    assert response.status_code in (400, 404)
    assert len(error_of(response, response.status_code)["message"]) <= 403
    assert len(response.content) < 1000


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/responses/", "/chat/completions"])
def test_a_404_of_another_api_names_what_to_use_instead(fake_client: httpx.Client, path: str) -> None:
    error = error_of(fake_client.post(path, json={"model": MODEL}), 404)
    assert error["message"].startswith(f"There is nothing at {path}. ")
    assert "/v1/chat/completions" in error["message"].removeprefix(f"There is nothing at {path}")


def test_embeddings_are_to_be_had_elsewhere(fake_client: httpx.Client) -> None:
    assert "embedding model" in error_of(fake_client.post("/v1/embeddings", json={}), 404)["message"]


def test_nvext_generates_past_the_end_of_the_sequence() -> None:
    chat = parse_chat_request({"model": "m", "messages": MESSAGES, "nvext": {"ignore_eos": True}})
    assert engine_request(chat, [1], 0, 8, {}).stop_conditions.ignore_eos


def test_wrong_paths_and_methods_have_the_same_envelope(fake_client: httpx.Client) -> None:
    error_of(fake_client.get("/v1/nothing"), 404)
    response = fake_client.get("/v1/chat/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "kind",
    ["not-a-dict", "wrong-types", "negative-id", "huge-id", "wrong-finish-reason", "error-text", "endless"],
)
def test_an_engine_that_sends_garbage_costs_one_502(fake_pipeline: Pipeline, kind: str) -> None:
    engine = fake_pipeline.fake_engine("--garbage", kind)
    try:
        fake_pipeline.wait_ready(engines=2)
        # Both engines are asked in turn: one answers, one is garbage; neither harms the other.
        answers = [httpx.post(f"{fake_pipeline.url}/v1/chat/completions", json=CHAT, timeout=60) for _ in range(4)]
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200, 200, 502, 502]
        for answer in answers:
            if answer.status_code == 502:
                assert "internal text" not in error_of(answer, 502)["message"]
    finally:
        engine.terminate()
        fake_pipeline.processes.remove(engine)


def test_without_a_processor_it_is_a_503_with_retry_after(own_infra: Infra, tmp_path_factory: Any) -> None:
    pipeline = Pipeline(own_infra, tmp_path_factory.mktemp("alone"))
    try:
        pipeline.frontend("--processor-wait", "1")
        wait_until(lambda: accepts(pipeline.http_port), 30, "the frontend")
        response = httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT, timeout=30)
        assert error_of(response, 503)["code"] == "unavailable"
        assert int(response.headers["retry-after"]) >= 1
        assert httpx.get(f"{pipeline.url}/health").status_code == 200
        assert error_of(httpx.get(f"{pipeline.url}/ready"), 503)["message"] == "Waiting for processors and engines."
        pipeline.processor("--engine-wait", "1")
        wait_until(lambda: "engines." in httpx.get(f"{pipeline.url}/ready").json()["error"]["message"], 60, "processor")
        wait_until(lambda: "processors" not in httpx.get(f"{pipeline.url}/ready").text, 60, "the processor")
        response = httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT, timeout=30)
        assert "engine" in error_of(response, 503)["message"]
    finally:
        pipeline.stop()
