"""A processor's chunks become an answer over HTTP: one JSON object, or the server-sent events of a stream."""

import time
import uuid
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from common.errors import BadUpstream
from common.observability.request_records import RequestRecord
from common.openai.request import ChatCompletionRequest
from common.openai.responses import (
    AnswerToolCall,
    AnswerToolCallDelta,
    CalledFunction,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    FunctionDelta,
    Logprobs,
    Message,
    Path,
)
from common.wire import LogprobEntry, ProcessorChunk, ToolCallDelta, Usage

DONE = b"data: [DONE]\n\n"
MAX_ANSWER_CHARACTERS = 2**24  # no model of today writes that much in one answer


def sse(event: Any) -> bytes:
    """One server-sent event: `data: {json}` and a blank line."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


class _Answer:
    """What a non-streaming answer and a stream have in common. record: of the request, finished with the answer."""

    def __init__(self, request: ChatCompletionRequest, record: RequestRecord) -> None:
        chat_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.head: dict[str, Any] = {"id": chat_id, "created": int(time.time()), "model": request.model}
        self.num_choices = request.n
        self.record = record
        self.usage: Usage | None = None  # known with the last chunk
        self._unfinished = set(range(request.n))
        self._num_characters = 0
        self._num_tool_calls = [0] * request.n

    def check(self, chunk: ProcessorChunk) -> None:
        """Raises:
        BadUpstream: it is no part of an answer to the request.
        """
        if chunk.index >= self.num_choices:
            raise BadUpstream("The processor sent a choice that was not requested.")
        self._num_characters += len(chunk.content) + len(chunk.reasoning_content)
        self._num_characters += sum(len(delta.arguments) for delta in chunk.tool_calls)
        if self._num_characters > MAX_ANSWER_CHARACTERS:
            raise BadUpstream(f"The processor's answer has more than {MAX_ANSWER_CHARACTERS} characters.")
        self.usage = chunk.usage or self.usage
        if chunk.finish_reason is not None:
            self._unfinished.discard(chunk.index)
        for delta in chunk.tool_calls:
            self._check_tool_call(chunk.index, delta)

    def _check_tool_call(self, choice: int, delta: ToolCallDelta) -> None:
        if delta.index != self._num_tool_calls[choice] - (delta.name is None):
            raise BadUpstream("The processor sent a part of a tool call out of turn.")
        self._num_tool_calls[choice] += delta.name is not None

    def finish(self) -> None:
        """Raises:
        BadUpstream: the processor ended before it had finished every choice.
        """
        if self._unfinished:
            raise BadUpstream("The processor left a choice unfinished.")
        self.record.finish()

    @property
    def path(self) -> Path | UnsetType:
        return UNSET if self.record.path is None else Path(**self.record.path.to_json())


class Answer(_Answer):
    """Collects the chunks of one request, for one JSON answer."""

    def __init__(self, request: ChatCompletionRequest, record: RequestRecord) -> None:
        super().__init__(request, record)
        self.restart()

    def restart(self) -> None:
        """Forget everything that was added."""
        self._unfinished = set(range(self.num_choices))
        self._num_tool_calls = [0] * self.num_choices
        self._chunks = [ProcessorChunk(index=index) for index in range(self.num_choices)]

    def add(self, chunk: ProcessorChunk) -> None:
        self.check(chunk)
        self._chunks[chunk.index].add(chunk)

    def to_json(self) -> bytes:
        self.finish()
        choices = [
            Choice(
                index=chunk.index,
                message=_message(chunk),
                logprobs=_logprobs(chunk.logprobs),
                finish_reason=chunk.finish_reason,
            )
            for chunk in self._chunks
            if chunk.finish_reason is not None  # they all have one
        ]
        return msgspec.json.encode(ChatCompletion(**self.head, choices=choices, usage=self.usage, path=self.path))


class AnswerStream(_Answer):
    """Turns the chunks of one request into events. With usage, every event has that field, and one more carries it.

    continuous usage: so do all others, for what is generated so far. The last one carries the path, too, where one is
    asked for.
    """

    def __init__(self, request: ChatCompletionRequest, record: RequestRecord) -> None:
        super().__init__(request, record)
        self._is_usage_wanted, self._is_usage_continuous = request.is_usage_wanted, request.is_usage_continuous
        self._num_started = 0  # choices

    def _event(self, choice: ChunkChoice) -> bytes:
        usage = self.usage if self._is_usage_continuous else None
        return sse(ChatCompletionChunk(**self.head, choices=[choice], usage=usage if self._is_usage_wanted else UNSET))

    def events(self, chunk: ProcessorChunk) -> bytes:
        """The events for a chunk: the role first, an empty delta with the finish_reason last.

        Choices begin in their order, as OpenAI's do: its Python library fails on one that comes before a lower one.
        """
        self.check(chunk)
        index = chunk.index
        if self.record.path is not None:
            self.record.path.answering()
        events = b""
        deltas = _deltas(chunk)
        while self._num_started <= index:
            content = "" if not deltas or deltas[0].content is not UNSET else None
            first = Delta(role="assistant", content=content, refusal=None)
            events += self._event(ChunkChoice(index=self._num_started, delta=first))
            self._num_started += 1
        logprobs = _logprobs(chunk.logprobs)
        for delta in deltas:
            events += self._event(ChunkChoice(index=index, delta=delta, logprobs=logprobs))
            logprobs = None
        if chunk.finish_reason is not None:
            events += self._event(ChunkChoice(index=index, delta=Delta(), finish_reason=chunk.finish_reason))
        return events

    def end(self) -> bytes:
        self.finish()
        path = self.path
        if not self._is_usage_wanted and path is UNSET:
            return DONE
        usage = self.usage if self._is_usage_wanted else UNSET
        return sse(ChatCompletionChunk(**self.head, choices=[], usage=usage, path=path)) + DONE


def _logprobs(entries: list[LogprobEntry] | None) -> Logprobs | None:
    return None if entries is None else Logprobs(content=entries)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def _deltas(chunk: ProcessorChunk) -> list[Delta]:
    """In their order; at least one where there are logprobs, which go with the first."""
    deltas = [Delta(reasoning_content=chunk.reasoning_content)] if chunk.reasoning_content else []
    if chunk.content:
        deltas.append(Delta(content=chunk.content))
    deltas += [Delta(tool_calls=[_tool_call_delta(delta)]) for delta in chunk.tool_calls]
    return deltas or [Delta(content="")] * bool(chunk.logprobs)


def _tool_call_delta(delta: ToolCallDelta) -> AnswerToolCallDelta:
    if delta.name is None:
        return AnswerToolCallDelta(index=delta.index, function=FunctionDelta(arguments=delta.arguments))
    function = FunctionDelta(name=delta.name, arguments=delta.arguments)
    return AnswerToolCallDelta(index=delta.index, id=_call_id(), type="function", function=function)


def _message(chunk: ProcessorChunk) -> Message:
    """The whole answer of a choice; its content is null where it only calls tools, or did not get beyond reasoning."""
    calls: list[AnswerToolCall] = []
    for delta in chunk.tool_calls:
        if delta.name is not None:
            calls.append(AnswerToolCall(id=_call_id(), function=CalledFunction(name=delta.name)))
        calls[delta.index].function.arguments += delta.arguments
    content = chunk.content or (None if calls or chunk.reasoning_content else "")
    reasoning_content = chunk.reasoning_content or UNSET
    return Message(content=content, reasoning_content=reasoning_content, tool_calls=calls or UNSET)
