"""The tools of a request: what a client may say of them, and the JSON schema that forces calls."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.openai.json_schema import NO_SCHEMAS, SCHEMAS_BY_NAME, JsonSchema, values_of
from common.openai.strict_model import IS_OBJECT, IS_STRING, STRING_OR_OBJECT, StrictModel

MAX_TOOLS = 128
MAX_TOOLS_VALUES = 20_000  # of the JSON of all tools together: they are looked at on an event loop
MAX_FORCED_CALLS = 16  # in one answer: a small model does not know where to end

ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


def _check_is_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError('arguments are a JSON object: its type must be "object"')
    return schema


Parameters = Annotated[
    JsonSchema,
    AfterValidator(_check_is_object),
    Field(json_schema_extra={"properties": {"type": {"const": "object"}}}),
]


class Function(StrictModel):
    """parameters: a JSON schema. A forced call holds to it, `strict` or not; one of the model's choice may not."""

    name: ToolName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: Function

    @property
    def name(self) -> str:
        return self.function.name


def _check_number_of_values(tools: Any) -> Any:
    if next(itertools.islice(values_of(tools), MAX_TOOLS_VALUES, None), None) is not None:
        raise ValueError(f"all together have more than {MAX_TOOLS_VALUES} values")
    return tools


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), BeforeValidator(_check_number_of_values)]


class FunctionName(StrictModel):
    name: str


class NamedTool(StrictModel):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], IS_STRING] | Annotated[NamedTool, IS_OBJECT], STRING_OR_OBJECT
]


def forced_calls_schema(tools: Sequence[Tool], max_calls: int) -> dict[str, Any]:
    """Of a JSON array of calls, at least one: each names one of the tools, and holds to its parameters.

    Each tool's schema keeps a place of its own, so that what it defines and refers to does not meet the others'.
    """
    places = [f"#/$defs/{index}" for index in range(len(tools))]
    return {
        "type": "array",
        "minItems": 1,
        "maxItems": max_calls,
        "items": {"anyOf": [_call_schema(tool, place) for tool, place in zip(tools, places, strict=True)]},
        "$defs": {
            str(index): _moved(_parameters(tool), place)
            for index, (tool, place) in enumerate(zip(tools, places, strict=True))
        },
    }


def _call_schema(tool: Tool, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {"$ref": place}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parameters(tool: Tool) -> dict[str, Any]:
    if not tool.function.parameters:  # OpenAI: a function without parameters takes none
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.function.parameters}


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to itself as they are once it stands at `place` of another one."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: _moved_keyword(name, value, place) for name, value in schema.items()}


def _moved_keyword(name: str, value: Any, place: str) -> Any:
    if name == "$ref" and isinstance(value, str) and value.startswith("#"):
        return place + value[1:]
    if name in SCHEMAS_BY_NAME and isinstance(value, dict):
        return {key: _moved(part, place) for key, part in value.items()}
    return value if name in NO_SCHEMAS else _moved(value, place)
