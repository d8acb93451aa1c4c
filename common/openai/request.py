"""OpenAI's chat completion request, as far as this pipeline takes it.

Anything not named here is refused by name, unless it has the value that changes nothing (`NO_OPS`, or null).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, WithJsonSchema, model_validator

from common.errors import InvalidRequest
from common.openai.json_schema import JsonSchema, check_size, schema_text
from common.openai.request_parts import (
    IGNORED,
    IS_LIST,
    IS_OBJECT,
    IS_STRING,
    MAX_FORCED_CALLS,
    STRING_OR_LIST,
    Message,
    NamedTool,
    StrictModel,
    TokenId,
    Tool,
    ToolChoice,
    Tools,
    absent,
    any_of,
    forced_calls_schema,
    present,
)
from common.wire import SCHEMA_PARAM

MAX_CHOICES = 16
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 4, 256
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 64
MAX_TEMPLATE_VALUES, MAX_TEMPLATE_CHARACTERS = 16, 256

# Fields of OpenAI's that have no effect here, with the values that ask for none.
_IGNORED_FIELDS = (
    "store", "verbosity", "prediction", "service_tier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier",
)  # fmt: skip
NO_OPS: dict[str, Any] = {
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    **dict.fromkeys(_IGNORED_FIELDS, IGNORED),
}
# Each belongs to another field: where both are refused, it is not the cause.
_DEPENDENT = ("tool_choice", "parallel_tool_calls", "function_call")
_TOKEN_ID = "^[0-9]{1,10}$"  # int() itself fails above 4300 digits
_TAGS = (IS_STRING.tag, IS_LIST.tag, IS_OBJECT.tag)

LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASED_TOKENS, json_schema_extra={"propertyNames": {"pattern": _TOKEN_ID}}),
]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[_StopString, IS_STRING] | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS), IS_LIST],
    STRING_OR_LIST,
]


def _check_template_value(value: Any) -> Any:
    if isinstance(value, list | dict) or (isinstance(value, str) and len(value) > MAX_TEMPLATE_CHARACTERS):
        raise ValueError(f"must be a boolean, a number or a string of up to {MAX_TEMPLATE_CHARACTERS} characters")
    return value


_TEMPLATE_VALUE: dict[str, Any] = {
    "type": ["boolean", "number", "string", "null"], "maxLength": MAX_TEMPLATE_CHARACTERS,
}  # fmt: skip
TemplateValue = Annotated[Any, AfterValidator(_check_template_value), WithJsonSchema(_TEMPLATE_VALUE)]


class StreamOptions(StrictModel):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="With include_usage: the usage so far, in every chunk.")
    include_obfuscation: bool = False


class NamedSchema(StrictModel):
    """strict: an answer holds to the schema, strict or not."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class TextFormat(StrictModel):
    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    type: Literal["json_object"]


class JsonSchemaFormat(StrictModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


_FREE_TOOL_CHOICE: dict[str, Any] = {"properties": {"tool_choice": {"enum": ["none", "auto", None]}}}
_CLEAR_CHOICE: dict[str, Any] = {"anyOf": [{"enum": ["none", "required"]}, {"type": "object"}]}
_FREE_FORMAT = any_of(absent("response_format"), present("response_format", properties={"type": {"const": "text"}}))


class DynamoExtension(StrictModel):
    """The part of Dynamo's `nvext` that its own benchmark script sends."""

    ignore_eos: bool = False


class ChatCompletionRequest(StrictModel):
    """The body of POST /v1/chat/completions. Null is the same as leaving a field out."""

    no_ops = NO_OPS
    rules: ClassVar = [
        any_of(absent("top_logprobs"), present("logprobs", const=True)),
        any_of(absent("stream_options"), present("stream", const=True)),
        any_of(_FREE_TOOL_CHOICE, present("tools", minItems=1)),
        any_of(_FREE_FORMAT, absent("tools"), present("tools", maxItems=0), present("tool_choice", **_CLEAR_CHOICE)),
        any_of(present("min_tokens", const=0), absent("min_tokens"), {"allOf": [_FREE_TOOL_CHOICE, _FREE_FORMAT]}),
    ]
    model: str = Field(min_length=1, description="One that GET /v1/models lists; any other is a 404.")
    messages: list[Message] = Field(
        min_length=1, description="What the model's chat template or its context has no room for is a 400."
    )
    max_tokens: int | None = Field(None, ge=1, description="The prompt's tokens and these must fit into the context.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Goes before max_tokens.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**30)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: LogitBias | None = Field(None, description="By token id; one that the model does not have is a 400.")
    stop: Stop | None = None
    min_tokens: int = Field(0, ge=0, description="Before so many, neither the end of sequence nor a stop token comes.")
    stop_token_ids: list[TokenId] = Field(
        [], max_length=MAX_STOP_TOKENS, description="One that the model does not have is a 400."
    )
    ignore_eos: bool = False
    chat_template_kwargs: dict[str, TemplateValue] = Field(
        {},
        max_length=MAX_TEMPLATE_VALUES,
        description="For the chat template. Names of what it is given anyway are a 400.",
    )
    reasoning_effort: str | None = Field(
        None, max_length=MAX_TEMPLATE_CHARACTERS, description="For chat templates that take it; others ignore it."
    )
    nvext: DynamoExtension | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(
        None, description="A function must be one of tools; auto is a 400 where the model's chat template has no tools."
    )
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    _as_sent: dict[str, Any] = PrivateAttr()  # a factory would cost more than the rest of the parsing

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        if self.num_tokens_asked is not None and self.min_tokens > self.num_tokens_asked:
            raise ValueError(f"min_tokens: more than the {self.num_tokens_asked} tokens that the answer may have")
        if self.min_tokens and self.answer_schema is not None:
            raise ValueError(
                "min_tokens: JSON ends where it is complete, as response_format or tool_choice asks for it"
            )
        if not all(re.fullmatch(_TOKEN_ID, token_id) for token_id in self.logit_bias or {}):
            raise ValueError("logit_bias: the keys must be token ids")
        return self

    @model_validator(mode="after")
    def _tools_fit_together(self) -> "ChatCompletionRequest":
        names = {tool.name for tool in self.tools or []}
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: none of the tools is called {self.tool_choice.function.name[:64]}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: needs tools")
        if self.max_forced_calls:
            try:
                check_size(forced_calls_schema(self.usable_tools, self.max_forced_calls))
            except ValueError as error:
                raise ValueError(f"tools: all together, {error}") from error
        elif self.usable_tools and self.answer_schema is not None:
            raise ValueError(
                "response_format: beside tools that the model may choose to call, only text is supported: "
                'a grammar for JSON leaves no room for a call; tool_choice "required" or "none" says which is wanted'
            )
        return self

    @property
    def as_sent(self) -> dict[str, Any]:
        """The JSON that the client sent."""
        return self._as_sent

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def is_eos_ignored(self) -> bool:
        return self.ignore_eos or (self.nvext is not None and self.nvext.ignore_eos)

    @cached_property
    def answer_schema(self) -> str | None:
        """The text of the JSON schema that the answer holds to; None where it may be any text."""
        if self.max_forced_calls:
            return schema_text(forced_calls_schema(self.usable_tools, self.max_forced_calls))
        if isinstance(self.response_format, JsonSchemaFormat):
            return schema_text(self.response_format.json_schema.json_schema)
        return schema_text(None) if isinstance(self.response_format, JsonObjectFormat) else None

    @property
    def answer_schema_param(self) -> str:
        """The field that `answer_schema` comes from."""
        if self.max_forced_calls:
            return "tools"
        is_own = isinstance(self.response_format, JsonSchemaFormat)
        return "response_format.json_schema.schema" if is_own else "response_format"

    @property
    def forced_parameters(self) -> dict[str, str]:
        """Of tools that the answer must call: each schema as `answer_schema` is, by the field that it comes from."""
        return {
            f"tools[{index}].function.parameters": schema_text(tool.function.parameters)
            for index, tool in enumerate(self.tools or [])
            if self.max_forced_calls and tool in self.usable_tools and tool.function.parameters
        }

    @contextmanager
    def naming_own_fields(self) -> Iterator[None]:
        """What an engine says of `answer_schema` names the field that the client sent it in."""
        try:
            yield
        except InvalidRequest as error:
            if error.param == SCHEMA_PARAM:
                error.param = self.answer_schema_param
            raise

    @property
    def num_tokens_asked(self) -> int | None:
        """The client's own limit for the answer, in tokens."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @cached_property
    def usable_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or [] if tool.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def max_forced_calls(self) -> int:
        """How many calls the answer may consist of, and nothing else; 0 where the model may choose to make none."""
        if isinstance(self.tool_choice, NamedTool):
            return 1
        if self.tool_choice != "required":
            return 0
        return MAX_FORCED_CALLS if self.parallel_tool_calls else 1

    @property
    def num_top_logprobs(self) -> int | None:
        """None: no logprobs wanted. 0: the chosen tokens' only."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def is_usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def is_usage_continuous(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.stream_options is not None and self.is_usage_wanted and self.stream_options.continuous_usage_stats


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "user", "content", "<string>")` as OpenAI writes it: `messages[0].content`."""
    path = ""
    for position, step in enumerate(location):
        # Which member of a union it is: pydantic's, not the client's.
        is_member = step in _TAGS or (position, location[0]) in ((2, "messages"), (1, "response_format"))
        if isinstance(step, int):
            path += f"[{step}]"
        elif not is_member:
            path += f".{step}" if path else step
    return path


def parse_chat_request(data: Any) -> ChatCompletionRequest:
    """Raises:
    InvalidRequest: with `param` naming the field, as OpenAI does.
    """
    if not isinstance(data, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        request = ChatCompletionRequest.model_validate(data)
        request._as_sent = data
        return request
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_context=False, include_input=False)
    error = min(errors, key=lambda error: error["loc"][:1] in [(name,) for name in _DEPENDENT])
    param = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        raise InvalidRequest(f"Unrecognized or unsupported argument: {param}.", param=param)
    if error["type"] == "missing":
        raise InvalidRequest(f"Missing required argument: {param}.", param=param)
    reason = error["msg"].removeprefix("Value error, ")
    if not param and ": " in reason:
        param = reason.split(": ", 1)[0]
    raise InvalidRequest(f"Invalid value for {param}: {reason.removeprefix(param + ': ')}.", param=param)
