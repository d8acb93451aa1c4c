"""What a request is made of: models of JSON that refuse what they do not know; messages; tools."""

import copy
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from common.openai.json_schema import JsonSchema, parts_of, values_of

MAX_TOOLS = 128
MAX_TOOLS_VALUES = 20_000  # of the JSON of all tools together: they are looked at on an event loop
MAX_FORCED_CALLS = 16  # in one answer: a small model does not know where to end

IGNORED: Any = ...

# For a union of a string and something else, so that an error speaks of the one that was sent.
IS_STRING, IS_LIST, IS_OBJECT = Tag("<string>"), Tag("<list>"), Tag("<object>")
STRING_OR_LIST = Discriminator(lambda value: (IS_LIST if isinstance(value, list) else IS_STRING).tag)
STRING_OR_OBJECT = Discriminator(lambda value: (IS_STRING if isinstance(value, str) else IS_OBJECT).tag)


def _is_no_op(value: Any, no_op_values: Any) -> bool:
    # Python takes 0 for False, JSON does not.
    return no_op_values is IGNORED or any(type(value) is type(no_op) and value == no_op for no_op in no_op_values)


def _whole_number(value: Any) -> Any:
    # JSON has one kind of number, so 1.0 is an integer. Integers beyond 64 bits arrive as floats, and rounded.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


TokenId = Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(_whole_number)]


def _describe(schema: dict[str, Any], model: "type[StrictModel]") -> None:
    """Put into pydantic's schema what it cannot see: nulls, the no-ops, and the rules between fields."""
    properties: dict[str, Any] = schema.setdefault("properties", {})
    for name, field in properties.items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            outer = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
            properties[name] = {"anyOf": [field, {"type": "null"}], **outer}
    for name, values in model.no_ops.items():
        if name in properties:
            continue  # a field of ours that has a no-op value as well
        properties[name] = (
            {"description": "Ignored."}
            if values is IGNORED
            else {"description": "Only with a value that changes nothing.", "enum": [*values, None]}
        )
    schema["additionalProperties"] = {"type": "null"}
    if model.rules:
        schema["allOf"] = model.rules


class StrictModel(BaseModel):
    """JSON types are taken as they are (no "5" for 5), a name we do not know is an error, and the schema says so.

    A field sent as null, known or not, is the same as none, and so is one with a value of `no_ops` (any value,
    where that is IGNORED). rules: what holds between fields, in JSON schema, for readers; validators enforce it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_describe)
    no_ops: ClassVar[dict[str, Any]] = {}
    rules: ClassVar[list[dict[str, Any]]] = []

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: _whole_number(value)
            for name, value in data.items()
            if value is not None and not _is_no_op(value, cls.no_ops.get(name, ()))
        }


def present(name: str, **schema: Any) -> dict[str, Any]:
    """A rule: the field `name` is there, is not null, and matches `schema`."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}} | schema}}


def absent(name: str) -> dict[str, Any]:
    """A rule: the field `name` is missing or null."""
    return {"properties": {name: {"type": "null"}}}


def any_of(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(rules)}


class TextPart(StrictModel):
    no_ops: ClassVar = {"cache_control": IGNORED}
    type: Literal["text"]
    text: str


Content = Annotated[Annotated[str, IS_STRING] | Annotated[list[TextPart], IS_LIST], STRING_OR_LIST]


class _Message(StrictModel):
    # What answers' messages have, for clients that send them back, and what clients mark for a cache.
    no_ops: ClassVar = {"annotations": ([],), "tool_calls": ([],), "id": IGNORED, "cache_control": IGNORED}
    name: str | None = None


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class FunctionCall(StrictModel):
    name: str
    arguments: str


class ToolCall(StrictModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(_Message):
    """`content` may be missing where the assistant called tools."""

    rules: ClassVar = [any_of(present("content"), present("refusal"), present("tool_calls", minItems=1))]
    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = None
    reasoning_content: str | None = Field(None, description="For chat templates that take it.")
    tool_calls: list[ToolCall] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and self.tool_calls is None and self.refusal is None:
            raise ValueError("an assistant message needs content or tool_calls")
        return self


class ToolMessage(_Message):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


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
    places = {f"#/$defs/{index}": tool for index, tool in enumerate(tools)}
    return {
        "type": "array",
        "minItems": 1,
        "maxItems": max_calls,
        "items": {"anyOf": [_call_schema(tool, place) for place, tool in places.items()]},
        "$defs": {str(index): _moved(_parameters(tool), place) for index, (place, tool) in enumerate(places.items())},
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


def _moved(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema with its references to itself as they are once it stands at `place` of another one."""
    moved = copy.deepcopy(schema)
    for part in parts_of(moved):
        if isinstance(ref := part.get("$ref"), str) and ref.startswith("#"):
            part["$ref"] = place + ref[1:]
    return moved
