"""OpenAI's answers: `chat.completion`, and the `chat.completion.chunk` events of a stream.

What a field may hold is said by its type: the OpenAPI document is made of these types.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from common.wire import AnswerFinishReason, CallTrace, LogprobEntry, ProcessorDescription, Usage

Id = Annotated[str, Meta(pattern="^chatcmpl-")]
CallId = Annotated[str, Meta(pattern="^call_")]
UnixTime = Annotated[int, Meta(description="Unix time in seconds.")]


class JsonObject(msgspec.Struct, forbid_unknown_fields=True):
    """An object with these fields and no others. One that is UNSET is left out."""


class Path(JsonObject, kw_only=True):
    """Where the request went. Not OpenAI's: only for those who ask with `x-show-path`. `pid` is the frontend's."""

    pid: int
    calls: list[CallTrace] | UnsetType = UNSET
    first_us: int | UnsetType = UNSET
    last_us: int | UnsetType = UNSET


class Logprobs(JsonObject, kw_only=True):
    content: list[LogprobEntry]
    refusal: None = None


class CalledFunction(JsonObject, kw_only=True):
    name: str
    arguments: str = ""


class AnswerToolCall(JsonObject, kw_only=True):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(JsonObject, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerToolCall] | UnsetType = UNSET


class Choice(JsonObject, kw_only=True):
    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: AnswerFinishReason


class ChatCompletion(JsonObject, kw_only=True):
    id: Id
    object: Literal["chat.completion"] = "chat.completion"
    created: UnixTime
    model: str
    choices: list[Choice]
    usage: Usage | None
    path: Path | UnsetType = UNSET


class FunctionDelta(JsonObject, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class AnswerToolCallDelta(JsonObject, kw_only=True):
    """Of the call number `index`: `id`, `type` and `name` come first and once, then its arguments in pieces."""

    index: int
    id: CallId | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class Delta(JsonObject, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerToolCallDelta] | UnsetType = UNSET


class ChunkChoice(JsonObject, kw_only=True):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: AnswerFinishReason | None = None


class ChatCompletionChunk(JsonObject, kw_only=True):
    id: Id
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: UnixTime
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    path: Path | UnsetType = UNSET


class Model(JsonObject, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: UnixTime
    owned_by: str = "dynamo"
    root: str
    max_model_len: int | UnsetType = UNSET


class Models(JsonObject, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


def model_of(name: str, served: ProcessorDescription) -> Model:
    """`root` and `max_model_len` as vLLM and SGLang have them: the model behind the name, and its context in tokens."""
    max_model_len = UNSET if served.context_length is None else served.context_length
    return Model(id=name, created=served.created, root=served.root or name, max_model_len=max_model_len)
