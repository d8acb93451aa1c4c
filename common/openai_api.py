"""OpenAI's chat completion request, as far as this pipeline takes it.

Anything not named here is refused by name, unless it has the value that changes nothing (`NO_OPS`, or null).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from common.errors import InvalidRequest

MAX_CHOICES = 16
MAX_STOP_STRINGS = 4

# Fields of OpenAI's that have no effect here, with the values that ask for none. Any value is fine for `...`.
NO_OPS: dict[str, Any] = {
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ...,
    "prompt_cache_key": ...,
    "prompt_cache_retention": ...,
    "safety_identifier": ...,
}
_IGNORED_IN_MESSAGES: dict[str, Any] = {"annotations": ([],), "tool_calls": ([],)}


def _without_no_ops(data: Any, no_ops: dict[str, Any]) -> Any:
    if not isinstance(data, dict):
        return data
    return {
        name: value
        for name, value in data.items()
        if value is not None and not (name in no_ops and (no_ops[name] is ... or value in no_ops[name]))
    }


class _Strict(BaseModel):
    """JSON types are taken as they are (no "5" for 5), and a name we do not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _string_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<string>"


Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[TextPart], Tag("<list>")], Discriminator(_string_or_list)
]
_StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Annotated[_StopString, Tag("<string>")]
    | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS), Tag("<list>")],
    Discriminator(_string_or_list),
]


class _Message(_Strict):
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: Any) -> Any:
        return _without_no_ops(data, _IGNORED_IN_MESSAGES)


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class FunctionCall(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(_Message):
    """`content` may be missing where the assistant called tools."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = None
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


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatCompletionRequest(_Strict):
    """The body of POST /v1/chat/completions. Null is the same as leaving a field out."""

    model: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**30)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    stop: Stop | None = None
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: Any) -> Any:
        return _without_no_ops(data, NO_OPS)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        if any(not token_id.isascii() or not token_id.isdigit() for token_id in self.logit_bias or {}):
            raise ValueError("logit_bias: the keys must be token ids")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_tokens_asked(self) -> int | None:
        """The client's own limit for the answer, in tokens."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """None: no logprobs wanted. 0: the chosen tokens' only."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def is_usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "user", "content", "<string>")` as OpenAI writes it: `messages[0].content`."""
    path = ""
    for position, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in ("<string>", "<list>") or (position == 2 and location[0] == "messages"):
            continue  # which member of a union it is: pydantic's, not the client's
        else:
            path += f".{step}" if path else step
    return path


def parse_chat_request(data: Any) -> ChatCompletionRequest:
    """Raises:
    InvalidRequest: with `param` naming the field, as OpenAI does.
    """
    if not isinstance(data, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        return ChatCompletionRequest.model_validate(data)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        raise InvalidRequest(f"Unrecognized or unsupported argument: {param}.", param=param)
    if error["type"] == "missing":
        raise InvalidRequest(f"Missing required argument: {param}.", param=param)
    reason = error["msg"].removeprefix("Value error, ")
    if not param and ": " in reason:
        param = reason.split(": ", 1)[0]
    raise InvalidRequest(f"Invalid value for {param}: {reason.removeprefix(param + ': ')}.", param=param)
