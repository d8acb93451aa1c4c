"""OpenAI's answers: `chat.completion`, and the `chat.completion.chunk` events of a stream."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

import msgspec
import orjson
from fastapi.sse import format_sse_event

from common.errors import BadUpstream, PipelineError
from common.observability.request_path import RequestPath
from common.observability.request_records import RequestRecord
from common.openai.request import ChatCompletionRequest
from common.wire import LogprobEntry, ProcessorChunk, Usage

DONE = format_sse_event(data_str="[DONE]")
MAX_ANSWER_CHARACTERS = 2**24  # no model of today writes that much in one answer


def sse(event: dict[str, Any]) -> bytes:
    """One server-sent event: `data: {json}` and a blank line."""
    return format_sse_event(data_str=orjson.dumps(event).decode())


def _logprobs(entries: list[LogprobEntry] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": entries, "refusal": None}


def _path(path: RequestPath | None) -> dict[str, Any]:
    """The field that says which way the answer went, for those who asked. It is not OpenAI's."""
    return {} if path is None else {"path": path.to_json()}


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    return None if usage is None else msgspec.to_builtins(usage)


class _AnyAnswer:
    """What a non-streaming answer and a stream have in common. `created` in Unix seconds.

    record: of the request, which is finished with the answer. usage: known with the last chunk.
    """

    object: str

    def __init__(self, request: ChatCompletionRequest, record: RequestRecord) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": self.object,
            "created": int(time.time()),
            "model": request.model,
        }
        self.num_choices = request.n
        self.record = record
        self.usage: Usage | None = None
        self._num_characters = 0

    def check(self, chunk: ProcessorChunk) -> None:
        """Raises:
        BadUpstream: it is no part of an answer to the request.
        """
        if chunk.index >= self.num_choices:
            raise BadUpstream("The processor answered a choice that nobody asked for.")
        self._num_characters += len(chunk.content)
        if self._num_characters > MAX_ANSWER_CHARACTERS:
            raise BadUpstream("The processor's answer does not end.")
        self.usage = chunk.usage or self.usage


class Answer(_AnyAnswer):
    """Collects the chunks of one request, for one JSON answer."""

    object = "chat.completion"

    def __init__(self, request: ChatCompletionRequest, record: RequestRecord) -> None:
        super().__init__(request, record)
        self.restart()

    def restart(self) -> None:
        """Forget everything that was added."""
        self._choices = [ProcessorChunk(index=index) for index in range(self.num_choices)]

    def add(self, chunk: ProcessorChunk) -> None:
        self.check(chunk)
        choice = self._choices[chunk.index]
        choice.content += chunk.content
        choice.finish_reason = chunk.finish_reason or choice.finish_reason
        if chunk.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + chunk.logprobs

    def to_json(self) -> bytes:
        self.record.finish()
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.content, "refusal": None},
                "logprobs": _logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in self._choices
        ]
        return orjson.dumps(self.head | {"choices": choices, "usage": _usage(self.usage)} | _path(self.record.path))


class AnswerStream(_AnyAnswer):
    """Turns the chunks of one request into events. With usage, every event has that field, and one more carries it.

    That one carries the path, too, where one is asked for.
    """

    object = "chat.completion.chunk"

    def __init__(self, request: ChatCompletionRequest, record: RequestRecord) -> None:
        super().__init__(request, record)
        self._usage_field: dict[str, Any] = {"usage": None} if request.is_usage_wanted else {}
        self._started: set[int] = set()

    def _event(self, index: int, delta: dict[str, Any], finish_reason: str | None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return sse(self.head | {"choices": [choice]} | self._usage_field)

    def events(self, chunk: ProcessorChunk) -> bytes:
        """The events for a chunk: the role first, an empty delta with the finish_reason last."""
        self.check(chunk)
        if self.record.path is not None:
            self.record.path.answering()
        events = b""
        if chunk.index not in self._started:
            self._started.add(chunk.index)
            events += self._event(chunk.index, {"role": "assistant", "content": "", "refusal": None}, None)
        if chunk.content or chunk.logprobs:
            events += self._event(chunk.index, {"content": chunk.content}, None, _logprobs(chunk.logprobs))
        if chunk.finish_reason is not None:
            events += self._event(chunk.index, {}, chunk.finish_reason)
        return events

    def end(self) -> bytes:
        self.record.finish()
        if not self._usage_field and self.record.path is None:
            return DONE
        usage = {"usage": _usage(self.usage)} if self._usage_field else {}
        return sse(self.head | {"choices": []} | usage | _path(self.record.path)) + DONE


def models_json(models: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"id": name, "object": "model", "created": created, "owned_by": "dynamo"} for name, created in models]


def error_json(error: PipelineError) -> bytes:
    return orjson.dumps(error.to_wire())
