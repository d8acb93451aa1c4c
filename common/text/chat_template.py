"""A model's own chat template: messages and tools to a prompt.

What a template makes of tools is told from what it renders, never from a model's name.
"""

import contextlib
import inspect
import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jinja2

from common.errors import InvalidRequest
from common.openai.json_schema import values_of
from common.openai.request import ChatCompletionRequest
from common.openai.request_parts import Message, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Json = dict[str, Any]
# What a template raises that was not written for what it is given.
_FAILURES = (TypeError, KeyError, AttributeError, ValueError, RecursionError)
_QUESTION = {"role": "user", "content": "x"}
_NAME, _ARGUMENTS = "tried_function", {"tried_argument": "x"}
_ARGUMENT = {"type": "string", "description": "x"}
_PARAMETERS = {"type": "object", "properties": {"tried_argument": _ARGUMENT}, "required": ["tried_argument"]}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "x", "parameters": _PARAMETERS}}
_MAX_DEPTH = 48  # of a call's arguments: templates and marks go through them level by level
_HERMES_CALL = re.compile(r'<tool_call>\s*\{\s*"(name|arguments)"')


class ChatTemplate:
    """takes_tools: whether a prompt tells the model of the request's tools.

    takes_calls: whether a prompt has the calls of earlier turns. is_hermes: whether it writes them in Hermes' form, as
    the model then does. reserved_names: of the values that it is given anyway.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self.reserved_names = {"messages", *tokenizer.special_tokens_map, *parameters}
        self.example = self._tried([_QUESTION])
        self.takes_tools = _NAME in self._tried([_QUESTION], [_TOOL])
        # Some templates concatenate the arguments' JSON instead of writing it.
        self._are_arguments_text = _NAME not in self._tried(_called_with(_ARGUMENTS))
        called = self._tried(_called_with(json.dumps(_ARGUMENTS) if self._are_arguments_text else _ARGUMENTS))
        self.takes_calls = _NAME in called
        self.is_hermes = _HERMES_CALL.search(called) is not None

    def render(self, conversation: list[Json], tools: list[Json] | None = None, options: Json | None = None) -> str:
        """The prompt, ending where the assistant's answer begins. options: more values, none of `reserved_names`.

        Raises:
            InvalidRequest: the template does not take these messages.
        """
        try:
            return self._rendered(conversation, tools, options)
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template does not take these messages: {error}.", param="messages"
            ) from error
        except _FAILURES as error:
            logger.warning("the chat template failed", exc_info=True)
            raise InvalidRequest("The model's chat template does not take these messages.", param="messages") from error

    def _rendered(self, conversation: list[Json], tools: list[Json] | None = None, options: Json | None = None) -> str:
        prompt = self._tokenizer.apply_chat_template(
            conversation, tools=tools or None, tokenize=False, add_generation_prompt=True, **(options or {})
        )
        return cast("str", prompt)

    def given(self, request: ChatCompletionRequest) -> tuple[list[Json], list[Json], Json]:
        """What to render: messages and tools as the template expects them, and more values.

        Where the template has no place for tools, a system message tells of them.
        """
        tools = request.usable_tools
        entries = [self._entry(message) for message in request.messages]
        if tools and not self.takes_tools:
            entries = _with_system_text(_introduction(tools), entries)
        effort = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
        options = effort | request.chat_template_kwargs
        return entries, [tool.model_dump(exclude_unset=True) for tool in tools], options

    def _entry(self, message: Message) -> Json:
        """Text in one string, "developer" under its older name "system"."""
        entry = message.model_dump(exclude_none=True)
        content = message.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        entry["content"] = content if content is not None else ""
        if entry["role"] == "developer":
            entry["role"] = "system"
        if "tool_calls" in entry:
            self._put_calls(entry)
        return entry

    def _put_calls(self, entry: Json) -> None:
        """Their arguments as the template wants them. One without a place for calls gets them as they are forced."""
        functions = [call["function"] for call in entry["tool_calls"]]
        if not self.takes_calls:
            calls = json.dumps([_parsed(function) for function in functions], ensure_ascii=False)
            entry["content"] = f"{entry['content']}\n{calls}".lstrip("\n")
            del entry["tool_calls"]
        elif not self._are_arguments_text:
            for call in entry["tool_calls"]:
                call["function"] = _parsed(call["function"])

    def _tried(self, conversation: list[Json], tools: list[Json] | None = None) -> str:
        """The prompt; "" where the template does not take it."""
        with contextlib.suppress(jinja2.TemplateError, *_FAILURES):
            return self._rendered(conversation, tools)
        return ""


def _called_with(arguments: Any) -> list[Json]:
    """A conversation in which a tool was called. The id is one that every template takes."""
    call = {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return [
        _QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": _NAME, "tool_call_id": "call00001", "content": "x"},
    ]


def _parsed(function: Json) -> Json:
    """The arguments' JSON as an object; as it is where it is none, which a model may have written, or none that every
    template can render: deep, or with half a surrogate pair, which has no UTF-8.
    """
    try:
        arguments = json.loads(function["arguments"] or "{}")
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return function
    is_plain = isinstance(arguments, dict) and all(depth < _MAX_DEPTH for *_, depth in values_of(arguments))
    return {**function, "arguments": arguments} if is_plain else function


def _introduction(tools: Sequence[Tool]) -> str:
    functions = [tool.function.model_dump(exclude_unset=True, exclude={"strict"}) for tool in tools]
    return (
        "You can call these functions:\n"
        + "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        + '\nAnswer with a JSON array of calls: [{"name": "...", "arguments": {...}}]'
    )


def _with_system_text(text: str, entries: list[Json]) -> list[Json]:
    if entries[0]["role"] != "system":
        return [{"role": "system", "content": text}, *entries]
    first = entries[0]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *entries[1:]]
