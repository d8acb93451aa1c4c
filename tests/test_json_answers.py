"""Answers that are JSON, by the real model: SmolLM2 would not write them of its own accord."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import pytest
from annotated_types import Ge, Le, MaxLen
from openai import OpenAI
from pydantic import BaseModel
from tokenizers import Tokenizer

from tests.call_endpoint import call_endpoint
from tests.processes import Pipeline
from tests.streams import ask_stream

pytestmark = pytest.mark.pipeline

QUESTION = [{"role": "user", "content": "Tell me about John, who is 25 and likes chess and rowing."}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "hobbies": {"type": "array", "items": {"enum": ["chess", "rowing", "reading"]}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
JSON_OBJECT = {"type": "json_object"}


def json_schema(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 80, **fields}


def ask(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body(model, **fields))


@pytest.mark.parametrize("strict", [True, False, None])
def test_an_answer_holds_to_its_schema_and_ends(client: httpx.Client, embedded_model: str, strict: bool | None) -> None:
    answer = ask(client, embedded_model, response_format=json_schema(PERSON, strict=strict)).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
    assert answer["usage"]["completion_tokens"] < 80


def test_a_stream_does_too_with_several_choices_and_logprobs(client: httpx.Client, embedded_model: str) -> None:
    fields = {"response_format": json_schema(PERSON), "n": 3, "temperature": 1, "seed": 5, "logprobs": True}
    stream = ask_stream(client, body(embedded_model, **fields, stream_options={"include_usage": True}))
    assert set(stream.finish_reasons.values()) == {"stop"}
    for index, content in stream.contents.items():
        jsonschema.validate(json.loads(content), PERSON)
        assert b"".join(bytes(entry["bytes"] or []) for entry in stream.logprobs[index]).decode() == content
    assert len(stream.deltas[0]) > 5, "one delta holds everything"


def test_a_json_object_is_one_however_the_model_would_rather_talk(client: httpx.Client, embedded_model: str) -> None:
    answer = ask(client, embedded_model, response_format=JSON_OBJECT, max_tokens=200).json()["choices"][0]
    content = answer["message"]["content"]
    assert content.startswith("{")
    assert "  " not in content.partition('"')[0]
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(content), dict)


def test_stop_strings_and_limits_cut_json_as_they_cut_text(client: httpx.Client, embedded_model: str) -> None:
    (cut,) = ask(client, embedded_model, response_format=json_schema(PERSON), stop='"age"').json()["choices"]
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"].startswith("{")
    assert '"age"' not in cut["message"]["content"]
    (short,) = ask(client, embedded_model, response_format=json_schema(PERSON), max_tokens=3).json()["choices"]
    assert short["finish_reason"] == "length"


def test_requests_without_a_grammar_beside_it_are_as_they_were(client: httpx.Client, embedded_model: str) -> None:
    stream = ask_stream(client, body(embedded_model, response_format={"type": "text"}))
    assert not stream.content.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_without_a_grammar_is_a_400_that_says_why(
    client: httpx.Client, embedded_model: str, stream: bool
) -> None:
    answer = ask(client, embedded_model, response_format=json_schema({"not": {"type": "string"}}), stream=stream)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format.json_schema.schema"
    assert 'Unimplemented keys: ["not"]' in answer.json()["error"]["message"]


class Hobby(BaseModel):
    name: Annotated[str, MaxLen(12)]
    kind: Literal["game", "sport"] | None


class Person(BaseModel):
    name: Annotated[str, MaxLen(20)]
    age: Annotated[int, Ge(0), Le(150)]
    hobbies: Annotated[list[Hobby], MaxLen(2)]


@pytest.fixture
def sdk(pipeline: Pipeline) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{pipeline.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def test_openai_python_parses_an_answer_into_a_pydantic_model(sdk: OpenAI, embedded_model: str) -> None:
    asked: Any = body(embedded_model)
    answer = sdk.chat.completions.parse(**asked, response_format=Person)
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert 0 <= person.age <= 150


def test_openai_python_parses_a_stream_into_a_pydantic_model(sdk: OpenAI, embedded_model: str) -> None:
    asked: Any = body(embedded_model)
    with sdk.chat.completions.stream(**asked, response_format=Person) as stream:
        kinds = [event.type for event in stream]
        person = stream.get_final_completion().choices[0].message.parsed
    assert kinds.count("content.delta") > 5
    assert isinstance(person, Person)


def test_an_engine_goes_on_with_the_json_that_another_one_began(pipeline: Pipeline, tokenizer: Tokenizer) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    prompt, begun = f"<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n<|im_start|>assistant\n", '{"name": "Jo'
    options = {"temperature": 0, "json_schema": json.dumps(PERSON), "num_json_tokens": len(ids(begun))}
    request = {
        "token_ids": ids(prompt) + ids(begun), "sampling_options": options, "stop_conditions": {"max_tokens": 80}
    }  # fmt: skip
    (chunks,) = call_endpoint(pipeline, "engine", "generate", [request])
    assert chunks[-1]["finish_reason"] == "stop"
    rest = tokenizer.decode([token_id for chunk in chunks for token_id in chunk.get("token_ids", [])])
    jsonschema.validate(json.loads(begun + rest), PERSON)
