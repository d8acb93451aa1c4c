"""Tools, from the request to OpenAI's answers: the real frontend and processor, on an engine that echoes."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageToolCall

from tests.load import error_of
from tests.processes import MODEL, Pipeline
from tests.streams import ask_stream

pytestmark = pytest.mark.process

HERMES = "hermes"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CITIES = ("Rome", "São Paulo", "東京")
TWO_CALLS = "\n".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in CITIES[:2]
)
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def client(echo: Pipeline) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=echo.url, timeout=60) as client:
        yield client


@pytest.fixture
def sdk(echo: Pipeline) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{echo.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def saying(text: str, **fields: Any) -> dict[str, Any]:
    """A request whose answer is the text."""
    return {"model": HERMES, "messages": [{"role": "user", "content": text}], "tools": [WEATHER]} | fields


def choice_of(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def called(calls: list[ChatCompletionMessageToolCall] | None) -> list[tuple[str, dict[str, Any]]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or []]


def test_an_answer_that_only_calls_has_no_content(client: httpx.Client) -> None:
    choice = choice_of(client, saying(TWO_CALLS))
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert [call["type"] for call in calls] == ["function"] * 2
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": city} for city in CITIES[:2]]
    assert len({call["id"] for call in calls}) == 2
    assert all(call["id"].startswith("call_") for call in calls)


def test_a_stream_says_the_same_in_openais_shapes(client: httpx.Client) -> None:
    stream = ask_stream(client, saying("Let me see.\n" + TWO_CALLS))
    assert stream.content == "Let me see."
    assert stream.finish_reasons == {0: "tool_calls"}
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in stream.tool_calls[0]] == [
        ("weather", f'{{"city": "{city}"}}') for city in CITIES[:2]
    ]
    assert len({call["id"] for call in stream.tool_calls[0]}) == 2
    assert stream.num_tool_call_deltas > 4, "arguments come as they are made"


def test_each_choice_has_calls_of_its_own(client: httpx.Client) -> None:
    """The echo of choice i leaves the first i tokens out, and with them the beginning of the first call."""
    body = saying(TWO_CALLS, n=2, seed=0)
    stream = ask_stream(client, body)
    whole = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert [len(stream.tool_calls[index]) for index in (0, 1)] == [2, 1]
    assert [len(choice["message"]["tool_calls"]) for choice in whole] == [2, 1]
    assert stream.contents[1] == whole[1]["message"]["content"] != ""
    ids = [call["id"] for index in (0, 1) for call in stream.tool_calls[index]]
    assert len(set(ids)) == 3


def test_openais_own_library_accumulates_a_stream(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(**saying("Yes. " + TWO_CALLS)) as stream:
        events = [event.type for event in stream]
        completion = stream.get_final_completion()
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Yes."
    assert called(choice.message.tool_calls) == [("weather", {"city": city}) for city in CITIES[:2]]
    assert events.count("tool_calls.function.arguments.done") == 2


def test_a_call_that_is_cut_off_ends_by_length(client: httpx.Client) -> None:
    body = saying(TWO_CALLS, max_tokens=20)
    stream, whole = ask_stream(client, body), choice_of(client, body)
    assert stream.finish_reasons == {0: "length"}
    assert whole["finish_reason"] == "length"
    (streamed,), (call,) = stream.tool_calls[0], whole["message"]["tool_calls"]
    assert streamed["function"] == call["function"]
    assert '{"city": "Rome"}'.startswith(call["function"]["arguments"])


def test_a_stop_string_within_a_call_ends_it_as_no_call(client: httpx.Client) -> None:
    body = saying(TWO_CALLS, stop=["Ro"])
    stream, whole = ask_stream(client, body), choice_of(client, body)
    assert stream.finish_reasons == {0: "stop"}
    assert whole["finish_reason"] == "stop"
    assert whole["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


@pytest.mark.parametrize("fields", [{"tools": []}, {"tool_choice": "none"}, {"tools": None}])
def test_without_tools_to_call_a_text_is_a_text(client: httpx.Client, fields: dict[str, Any]) -> None:
    choice = choice_of(client, saying(TWO_CALLS, **fields))
    assert choice["message"] == {"role": "assistant", "content": TWO_CALLS, "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}, {"tool_choice": "auto", "stream": True}])
def test_a_model_whose_template_has_no_tools_cannot_choose(client: httpx.Client, fields: dict[str, Any]) -> None:
    error = error_of(client.post("/v1/chat/completions", json=saying("Hi!", model=MODEL, **fields)), 400)
    assert error["param"] == "tools"
    assert "required" in error["message"]


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("model", [HERMES, MODEL])
def test_forced_calls_are_read_whatever_the_model(client: httpx.Client, model: str, choice: Any) -> None:
    """The echo is what a grammar would have let through."""
    text = f'[{{"name":"weather","arguments":{{"city":"{CITIES[1]}"}}}}, {{"name": "weather", "arguments": {{}}}}]'
    body = saying(text, model=model, tool_choice=choice)
    stream, whole = ask_stream(client, body), choice_of(client, body)
    assert stream.finish_reasons == {0: whole["finish_reason"]} == {0: "tool_calls"}
    assert whole["message"]["content"] is None
    assert stream.contents == {0: ""}
    arguments = [call["function"]["arguments"] for call in whole["message"]["tool_calls"]]
    assert arguments == [f'{{"city":"{CITIES[1]}"}}', "{}"]
    assert [call["function"]["arguments"] for call in stream.tool_calls[0]] == arguments


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "object", "properties": {"a": {"type": "strange"}}}, "strange"),
        ({"$ref": "#/$defs/nowhere"}, "$ref #/$defs/nowhere points to nothing"),
        ({"$ref": "#"}, "no answer could end"),
        ({"enum": list(range(1001))}, "more than 1000 values"),
    ],
)
def test_a_schema_that_no_grammar_is_made_of_is_a_400_that_names_it(
    client: httpx.Client, parameters: Any, words: str
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = saying("Hi!", tools=[WEATHER, tool], tool_choice="required")
    error = error_of(client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "tools[1].function.parameters"
    assert words in error["message"]


FUNCTION = WEATHER["function"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": FUNCTION | {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": FUNCTION | {"parameters": "x"}}]}, "tools[0].function.parameters"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "sometimes"}, "tools[0].function"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": NAMED, "tools": []}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_bad_tool_is_a_400_that_names_it(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert error_of(client.post("/v1/chat/completions", json=saying("Hi!", **fields)), 400)["param"].startswith(param)


def test_calls_and_their_results_go_back_to_the_model(sdk: openai.OpenAI) -> None:
    """A turn of an agent: the library's own message goes back as it is."""
    question: list[Any] = [{"role": "user", "content": TWO_CALLS}]
    first = sdk.chat.completions.create(model=HERMES, messages=question, tools=[WEATHER])
    message = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"sunny in {city}"}
        for call, city in zip(message.tool_calls or [], CITIES, strict=False)
    ]
    for model, fields in ((HERMES, {"tools": [WEATHER]}), (MODEL, {})):
        second = sdk.chat.completions.create(
            model=model, messages=[*question, message, *results, {"role": "user", "content": "Thanks."}], **fields
        )
        assert second.choices[0].message.content == "Thanks."
        assert second.choices[0].finish_reason == "stop"
