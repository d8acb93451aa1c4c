"""The messages of a request, by their roles."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from common.openai.strict_model import IGNORED, IS_LIST, IS_STRING, STRING_OR_LIST, StrictModel, any_of, present

# Fields of an answer's message, for clients that send it back, and what they mark for a cache.
_NO_OPS: dict[str, Any] = {"annotations": ([],), "tool_calls": ([],), "id": IGNORED, "cache_control": IGNORED}


class TextPart(StrictModel):
    no_ops: ClassVar = {"cache_control": IGNORED}
    type: Literal["text"]
    text: str


Content = Annotated[Annotated[str, IS_STRING] | Annotated[list[TextPart], IS_LIST], STRING_OR_LIST]


class _Message(StrictModel):
    no_ops = _NO_OPS
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
