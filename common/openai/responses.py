"""OpenAI's answers: `chat.completion`, and the `chat.completion.chunk` events of a stream."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson
from fastapi.sse import format_sse_event

from common.errors import PipelineError
from common.observability.request_path import RequestPath
from common.wire import LogprobEntry, ProcessorChunk, Usage

DONE = format_sse_event(data_str="[DONE]")


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


@dataclass
class Answer:
    """Collects the chunks of one request, for one JSON answer. `created` in Unix seconds."""

    id: str
    model: str
    num_choices: int
    created: int = field(default_factory=lambda: int(time.time()))
    usage: Usage | None = None
    path: RequestPath | None = None

    def __post_init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forget everything that was added."""
        self._choices = [ProcessorChunk(index=index) for index in range(self.num_choices)]

    def add(self, chunk: ProcessorChunk) -> None:
        choice = self._choices[chunk.index]
        choice.content += chunk.content
        choice.finish_reason = chunk.finish_reason or choice.finish_reason
        if chunk.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + chunk.logprobs
        self.usage = chunk.usage or self.usage

    def to_json(self) -> bytes:
        return orjson.dumps(
            {
                "id": self.id,
                "object": "chat.completion",
                "created": self.created,
                "model": self.model,
                "choices": [
                    {
                        "index": choice.index,
                        "message": {"role": "assistant", "content": choice.content, "refusal": None},
                        "logprobs": _logprobs(choice.logprobs),
                        "finish_reason": choice.finish_reason,
                    }
                    for choice in self._choices
                ],
                "usage": _usage(self.usage),
                **_path(self.path),
            }
        )


class AnswerStream:
    """Turns the chunks of one request into events. With usage, every event has that field, and one more carries it.

    That one carries the path, too, where one is asked for.
    """

    def __init__(self, id: str, model: str, *, is_usage_wanted: bool, path: RequestPath | None = None) -> None:
        self._head = {"id": id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self._usage_field: dict[str, Any] = {"usage": None} if is_usage_wanted else {}
        self._usage: Usage | None = None
        self._path = path
        self._started: set[int] = set()

    def _event(self, index: int, delta: dict[str, Any], finish_reason: str | None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return sse(self._head | {"choices": [choice]} | self._usage_field)

    def events(self, chunk: ProcessorChunk) -> bytes:
        """The events for a chunk: the role first, an empty delta with the finish_reason last."""
        self._usage = chunk.usage or self._usage
        if self._path is not None:
            self._path.answering()
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
        if not self._usage_field and self._path is None:
            return DONE
        usage = {"usage": _usage(self._usage)} if self._usage_field else {}
        return sse(self._head | {"choices": []} | usage | _path(self._path)) + DONE


def models_json(models: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"id": name, "object": "model", "created": created, "owned_by": "dynamo"} for name, created in models]


def error_json(error: PipelineError) -> bytes:
    return orjson.dumps(error.to_wire())
