"""Calls that are forced: the schema that forces them, and what the real model makes of it."""

import json
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from common.errors import InvalidRequest
from common.openai.request import parse_chat_request
from common.openai.request_parts import Tool, forced_calls_schema
from tests.processes import MODEL, Pipeline
from tests.streams import ask_stream

CITY: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TREE: Any = {
    "type": "object",
    "properties": {"$ref": {"type": "boolean"}, "leaf": {"$ref": "#/$defs/leaf"}, "left": {"$ref": "#"}},
    "required": ["leaf"],
    "additionalProperties": False,
    "$defs": {"leaf": {"const": "#/$defs/leaf"}},
}


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": parameters}}


TOOLS = [tool("weather", CITY), tool("tree", TREE), tool("now", None)]


def is_valid(calls: Any, max_calls: int = 16) -> bool:
    schema = forced_calls_schema([Tool.model_validate(each) for each in TOOLS], max_calls)
    return jsonschema.Draft202012Validator(schema).is_valid(calls)


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize("type_", ["array", ["object", "null"], None])
def test_parameters_of_another_type_than_an_object_are_refused(type_: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi!"}]}
    with pytest.raises(InvalidRequest, match='type must be "object"') as refused:
        parse_chat_request(body | {"tools": [tool("now", None), tool("f", {"type": type_})]})
    assert refused.value.param == "tools[1].function.parameters"


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([call("weather", {"city": "Rome", "days": 3})], True),
        ([call("weather", {"city": "Rome", "days": 3}), call("now", {})], True),
        ([], False),
        ([call("weather", {"city": "Oslo", "days": 3})], False),
        ([call("now", {"city": "Rome", "days": 3})], False),
        ([call("later", {})], False),
        ([{"name": "now"}], False),
        ([call("tree", {"leaf": "#/$defs/leaf", "$ref": True})], True),
        ([call("tree", {"leaf": "#/$defs/leaf", "left": {"leaf": "#/$defs/leaf"}})], True),
        ([call("tree", {"leaf": "#/$defs/leaf", "left": call("now", {})})], False),
        ([call("now", {})] * 17, False),
    ],
)
def test_a_call_is_of_a_tool_and_holds_to_its_schema_wherever_that_refers_to_itself(calls: Any, expected: bool) -> None:
    assert is_valid(calls) == expected


class Trip(BaseModel):
    """Where to go. Bounded: a small model may write a string, or a number, without an end."""

    city: Literal["Rome", "Paris"]
    days: Annotated[int, Field(ge=1, le=9)]


@pytest.mark.pipeline
class TestWithTheModel:
    """SmolLM2, whose template knows no tools."""

    @pytest.fixture
    def sdk(self, pipeline: Pipeline) -> OpenAI:
        return OpenAI(base_url=f"{pipeline.url}/v1", api_key="none", max_retries=0, timeout=300)

    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
    def test_calls_hold_to_the_schema_streamed_and_not(self, client: httpx.Client, choice: Any) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "What is the weather in Rome for the next 3 days?"}],
            "tools": TOOLS[:1],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": 200,
        }
        stream = ask_stream(client, body)
        (answer,) = client.post("/v1/chat/completions", json=body).json()["choices"]
        assert stream.finish_reasons == {0: answer["finish_reason"]} == {0: "tool_calls"}
        assert answer["message"]["content"] is None
        for calls in (stream.tool_calls[0], answer["message"]["tool_calls"]):
            functions = [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in calls]
            assert is_valid([call(*function) for function in functions])
            assert [name for name, _ in functions] == ["weather"]
        assert stream.num_tool_call_deltas > 4

    def test_openais_own_library_parses_what_it_streams(self, sdk: OpenAI) -> None:
        with sdk.chat.completions.stream(
            model=MODEL,
            messages=[{"role": "user", "content": "I want to see Rome for 3 days."}],
            tools=[tool("trip", Trip.model_json_schema() | {"additionalProperties": False})],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=200,
            temperature=0,
            n=2,
        ) as stream:
            for _ in stream:
                pass
            completion = stream.get_final_completion()
        assert len(completion.choices) == 2
        for choice in completion.choices:
            (made,) = choice.message.tool_calls or []
            Trip.model_validate_json(made.function.arguments)
            assert choice.finish_reason == "tool_calls"
