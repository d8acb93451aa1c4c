"""Which schemas are refused before an engine hears of them, and how soon."""

import itertools
import random
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest, from_wire
from common.openai.json_schema import check_ends, schema_text, why_no_grammar
from common.openai.request import parse_chat_request
from common.wire import SCHEMA_PARAM

MAX_S = 0.5


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def asked_with(schema: Any) -> dict[str, Any]:
    json_schema = {"name": "answer", "schema": schema}
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": json_schema},
    }


def why_refused(schema: dict[str, Any]) -> str | None:
    """By the parser or by the grammar check."""
    try:
        text = parse_chat_request(asked_with(schema)).answer_schema
    except InvalidRequest as refused:
        return f"{refused.param}: {refused.message}"
    return why_no_grammar(text or "")


SHUFFLED = random.Random(1).sample(range(999), 999)
TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["children"],
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "empty": {},
    "as pydantic makes it": {
        "$defs": {"Step": {"properties": {"text": {"title": "Text", "type": "string"}}, "required": ["text"],
                           "title": "Step", "type": "object", "additionalProperties": False}},
        "properties": {
            "steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array"},
            "when": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}], "default": None},
        },
        "required": ["steps", "when"], "title": "Answer", "type": "object", "additionalProperties": False,
    },
    "no object": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    "a tree": TREE,
    "itself or a number": {"anyOf": [{"$ref": "#"}, {"type": "integer"}]},
    "a list of itself": {"type": "array", "items": {"$ref": "#"}},
    "no lists within": {"type": "object", "properties": {"a": {"type": ["object", "null"], "required": ["a"]}}},
    "properties called as keywords are": {
        "type": "object", "required": ["default", "enum", "$ref"],
        "properties": {"default": {"type": "string"}, "enum": {"type": "null"}, "$ref": {"type": "null"}},
    },
    "a long description of a property called as a keyword is": {
        "type": "object", "properties": {"enum": {"description": "x" * 2000, "type": "string"}},
    },
    "examples that look like schemas": {"type": "object", "default": {"$ref": "#/nowhere", "extends": {}}},
    "properties called as keywords were": {
        "type": "object", "properties": {"extends": {"type": "null"}, "required": {"type": "boolean"}},
    },
    "escaped names": {"$defs": {"a/b~c d": {"type": "null"}}, "$ref": "#/$defs/a~1b~0c%20d"},
    "a long chain of references": {
        "$defs": {f"d{at}": {"$ref": f"#/$defs/d{following}"} for at, following in itertools.pairwise(SHUFFLED)}
        | {f"d{SHUFFLED[-1]}": {"type": "null"}},
        "$ref": f"#/$defs/d{SHUFFLED[0]}",
    },
    "twice itself, forty times over": {
        "$defs": {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(40)}
        | {"d40": {"type": "null"}},
        "$ref": "#/$defs/d0",
    },
    "a thousand values": {"enum": [f"value {at}" for at in range(1000)]},
    "many properties": {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(250)}},
    "deep": nested(20),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"type": 5}, "type must be a string"),
    "an unknown type": ({"type": "text"}, "Invalid type"),
    "what llguidance does not know": ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
    "it too, though it is told to ignore that": (
        {"x-guidance": {"lenient": True}, "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'
    ),
    "what draft 3 forbade": ({"type": "array", "items": {"disallow": "string"}}, "disallow is a keyword of"),
    "what draft 3 inherited": ({"extends": {"type": "integer"}}, "extends is a keyword of"),
    "what draft 3 divided": ({"type": "integer", "divisibleBy": 2}, "divisibleBy is a keyword of"),
    "required as draft 3 had it": (
        {"type": "object", "properties": {"a": {"type": "string", "required": True}}}, "required must be a list"
    ),
    "nothing is both": ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater than maximum (1)"),
    "a look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "a broken pattern": ({"type": "string", "pattern": "(" * 900}, "regex parse error"),
    "somebody else's": ({"$ref": "https://example.com/schema.json"}, "is not present"),
    "nothing there": ({"$ref": "#/$defs/missing"}, "$ref #/$defs/missing points to nothing"),
    "itself": ({"$ref": "#"}, "refers to itself"),
    "in a circle": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        "refers to itself",
    ),
    "a circle to the side": (
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        "refers to itself",
    ),
    "one within the other": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "to itself"),
    "lists without end": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "to itself"),
    "too deep": (nested(100), "more than 48 levels deep"),
    "far too deep": (nested(400), "more than 48 levels deep"),
    "ten thousand values": ({"enum": [f"value {at}" for at in range(10_000)]}, "more than 1000 values"),
    "too many properties": ({"properties": {f"p{at}": {} for at in range(251)}}, "more than 250 properties"),
    "too many that become one": (
        {"allOf": [{"properties": {f"p{n}_{at}": {} for at in range(240)}} for n in range(5)]},
        "more than 1000 values under properties",
    ),
    "too many to choose from": (
        {"anyOf": [{"properties": {f"p{n}_{at}": {} for at in range(120)}} for n in range(18)]},
        "more than 1000 values under properties",
    ),
    "too many required": ({"type": "object", "required": [f"p{at}" for at in range(4000)]}, "under required"),
    "a long pattern of names": ({"patternProperties": {"(a|b)*" * 8000: {}}}, "more than 1000 characters"),
    "a long name": ({"properties": {"x" * 60_000: {}}}, "more than 1000 characters"),
    "a long string in an enum": ({"enum": [{"description": "x" * 60_000}]}, "more than 1000 characters"),
    "a long string in a constant": ({"const": {"title": "x" * 60_000}}, "more than 1000 characters"),
    "itself, called as a keyword is": (
        {"type": "object", "properties": {"default": {"$ref": "#/properties/default"}}, "required": ["default"]},
        "refers to itself",
    ),
    "itself among the definitions": (
        {"$defs": {"allOf": [{"$ref": "#/$defs"}]}, "$ref": "#/$defs"}, "refers to itself"
    ),
    "itself in an example": ({"default": {"$ref": "#/default"}, "$ref": "#/default"}, "refers to itself"),
    "one within the other, by a list of types": (
        {"type": ["object"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "to itself"
    ),
    "lists without end, by a list of types": (
        {"type": ["array"], "items": {"$ref": "#"}, "minItems": 1}, "to itself"
    ),
    "too much": ({"anyOf": [{"title": "x" * 900}] * 100}, "more than 65536 characters"),
    "too many parts": ({"anyOf": [{}] * 6000}, "more than 5000 values"),
    "a long string": ({"const": "x" * 1001}, "more than 1000 characters"),
    "all of any of": (
        {"allOf": [{"anyOf": [{"properties": {f"p{n}": {"minLength": m}}} for m in range(8)]} for n in range(8)]},
        "schema too large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_that_an_answer_can_hold_to_is_taken(name: str) -> None:
    started = time.perf_counter()
    assert why_refused(SCHEMAS[name]) is None
    assert time.perf_counter() - started < MAX_S


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_is_refused_soon_and_with_the_reason(name: str) -> None:
    schema, reason = REFUSED[name]
    started = time.perf_counter()
    assert reason in (why_refused(schema) or "")
    assert time.perf_counter() - started < MAX_S


def test_the_keys_of_a_schema_keep_their_order_and_white_space_is_not_the_clients() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "x-guidance": {"whitespace_flexible": True}}
    assert schema_text(schema) == '{"type":"object","properties":{"b":{},"a":{}}}'


def test_references_are_followed_once_however_many_there_are() -> None:
    num = 1500
    defs: dict[str, Any] = {f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{(at * 7 + 1) % num}"}]} for at in range(num)}
    started = time.perf_counter()
    with pytest.raises(ValueError, match="refers to itself"):
        check_ends({"$defs": defs, "$ref": "#/$defs/d0"})
    assert time.perf_counter() - started < MAX_S


def test_all_tools_of_a_request_have_one_limit_though_the_model_chooses() -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": list(range(900))}}}
    tools = [{"type": "function", "function": {"name": f"f{at}", "parameters": parameters}} for at in range(128)]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    started = time.perf_counter()
    with pytest.raises(InvalidRequest, match=r"tools: all together have more than 20000 values\.") as caught:
        parse_chat_request(body | {"tools": tools})
    assert caught.value.param == "tools"
    assert time.perf_counter() - started < MAX_S
    assert len(parse_chat_request(body | {"tools": tools[:20]}).usable_tools) == 20


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [(None, None), ({"type": "text"}, None), ({"type": "json_object"}, {"type": "object"})],
)
def test_formats_without_a_schema_of_their_own(response_format: Any, schema: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": response_format}
    text = parse_chat_request(body).answer_schema
    assert (text and msgspec.json.decode(text)) == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (asked_with({}), "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tools"),
    ],
)
def test_what_an_engine_says_of_a_schema_names_the_field_that_the_client_sent(fields: Any, param: str) -> None:
    request = parse_chat_request({"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields)
    with pytest.raises(InvalidRequest) as caught, request.naming_own_fields():
        raise from_wire(InvalidRequest("No grammar.", param=SCHEMA_PARAM).to_wire()["error"])
    assert caught.value.param == param


KEYWORDS = (
    "type", "properties", "required", "items", "prefixItems", "minItems", "anyOf", "oneOf", "allOf", "$ref", "$defs",
    "enum", "const", "minLength", "pattern", "format", "additionalProperties", "x-guidance", "default", "not",
)  # fmt: skip
LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from(["string", "object", "array", "integer", "#", "#/$defs/a", "#/items/0", "date", "^a*$"])
)  # fmt: skip
ANYTHING = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYWORDS) | st.text(max_size=2), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYWORDS), ANYTHING, max_size=5))
def test_whatever_is_sent_as_a_schema_is_taken_or_refused(schema: dict[str, Any]) -> None:
    assert why_refused(schema) != ""
