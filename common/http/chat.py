"""A chat over HTTP: the request's body, and a processor's chunks as one JSON object, or as a stream of events."""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import orjson
from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from msgspec import UNSET, UnsetType
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from common.arguments import FrontendArgs
from common.errors import (
    BadUpstream,
    InternalError,
    InvalidRequest,
    PipelineError,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from common.observability.request_records import RequestRecord
from common.openai import responses as openai
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.wire import LogprobEntry, ProcessorChunk, ToolCallDelta, Usage, to_wire

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
MAX_ANSWER_CHARACTERS = 2**24  # no model of today writes that much in one answer
PING_INTERVAL_S = 15.0


async def read_chat_request(http_request: Request, args: FrontendArgs) -> ChatCompletionRequest:
    """Raises:
    PipelineError: what is wrong with the body.
    """
    media_type = http_request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON: send the header Content-Type: application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(args.body_timeout_s):
            async for piece in http_request.stream():
                body += piece
                if len(body) > args.max_body_bytes:
                    raise RequestTooLarge(f"The body is larger than the limit of {args.max_body_bytes} bytes.")
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {args.body_timeout_s:.0f} seconds.") from None
    except ClientDisconnect:
        raise RequestTimeout("The client went away while it sent the body.") from None
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    return parse_chat_request(parsed)


class _Answer:
    """What a non-streaming answer and a stream have in common. record: of the request, finished with the answer."""

    def __init__(self, request: ChatCompletionRequest, record: RequestRecord) -> None:
        chat_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.head: dict[str, Any] = {"id": chat_id, "created": int(time.time()), "model": request.model}
        self.request, self.record = request, record
        self.usage: Usage | None = None  # known with the last chunk
        self._num_characters = 0
        self.restart()

    def restart(self) -> None:
        """Forget everything that was added."""
        self._unfinished = set(range(self.request.n))
        self._num_tool_calls = [0] * self.request.n

    def check(self, chunk: ProcessorChunk) -> None:
        """Raises:
        BadUpstream: it is no part of an answer to the request.
        """
        if chunk.index >= self.request.n:
            raise BadUpstream("The processor sent a choice that was not requested.")
        self._num_characters += len(chunk.content) + len(chunk.reasoning_content)
        for delta in chunk.tool_calls:
            self._num_characters += len(delta.arguments)
            is_new = delta.name is not None
            if delta.index != self._num_tool_calls[chunk.index] - (not is_new):
                raise BadUpstream("The processor sent a part of a tool call out of turn.")
            self._num_tool_calls[chunk.index] += is_new
        if self._num_characters > MAX_ANSWER_CHARACTERS:
            raise BadUpstream(f"The processor's answer has more than {MAX_ANSWER_CHARACTERS} characters.")
        self.usage = chunk.usage or self.usage
        if chunk.finish_reason is not None:
            self._unfinished.discard(chunk.index)

    def finish(self) -> None:
        """Raises:
        BadUpstream: the processor ended before it had finished every choice.
        """
        if self._unfinished:
            raise BadUpstream("The processor left a choice unfinished.")
        self.record.finish()

    @property
    def path(self) -> openai.Path | UnsetType:
        """For those who asked for it. `pid`: a frontend is in no registry, and has no id."""
        if self.record.path is None:
            return UNSET
        self.record.path.answering()
        return openai.Path(pid=os.getpid(), **to_wire(self.record.path.trace))


class Answer(_Answer):
    """Collects the chunks of one request, for one JSON answer."""

    def restart(self) -> None:
        super().restart()
        self._chunks = [ProcessorChunk(index=index) for index in range(self.request.n)]

    def add(self, chunk: ProcessorChunk) -> None:
        self.check(chunk)
        self._chunks[chunk.index].add(chunk)

    def to_json(self) -> bytes:
        self.finish()
        choices = [
            openai.Choice(
                index=chunk.index,
                message=_message(chunk),
                logprobs=_logprobs(chunk.logprobs),
                finish_reason=chunk.finish_reason,
            )
            for chunk in self._chunks
            if chunk.finish_reason is not None  # they all have one
        ]
        completion = openai.ChatCompletion(**self.head, choices=choices, usage=self.usage, path=self.path)
        return msgspec.json.encode(completion)


class AnswerStream(_Answer):
    """Turns the chunks of one request into events. With usage, every event has that field, and one more carries it.

    continuous usage: so do all others, for what is generated so far. The last one carries the path, too, where one is
    asked for.
    """

    _num_started = 0  # choices

    def _event(
        self, choices: list[openai.ChunkChoice], usage: Usage | None, path: openai.Path | UnsetType = UNSET
    ) -> bytes:
        wanted = usage if self.request.is_usage_wanted else UNSET
        return sse(openai.ChatCompletionChunk(**self.head, choices=choices, usage=wanted, path=path))

    def events(self, chunk: ProcessorChunk) -> bytes:
        """The events for a chunk: the role first, an empty delta with the finish_reason last.

        Choices begin in their order, as OpenAI's do: its Python library fails on one that comes before a lower one.
        """
        self.check(chunk)
        index = chunk.index
        if self.record.path is not None:
            self.record.path.answering()
        choices = []
        deltas = _deltas(chunk)
        while self._num_started <= index:
            content = "" if not deltas or deltas[0].content is not UNSET else None
            first = openai.Delta(role="assistant", content=content, refusal=None)
            choices.append(openai.ChunkChoice(index=self._num_started, delta=first))
            self._num_started += 1
        logprobs = _logprobs(chunk.logprobs)
        for delta in deltas:
            choices.append(openai.ChunkChoice(index=index, delta=delta, logprobs=logprobs))
            logprobs = None
        if chunk.finish_reason is not None:
            choices.append(openai.ChunkChoice(index=index, delta=openai.Delta(), finish_reason=chunk.finish_reason))
        usage = self.usage if self.request.is_usage_continuous else None
        return b"".join(self._event([choice], usage) for choice in choices)

    def end(self) -> bytes:
        self.finish()
        if not self.request.is_usage_wanted and self.record.path is None:
            return DONE
        return self._event([], self.usage, self.path) + DONE


def _logprobs(entries: list[LogprobEntry] | None) -> openai.Logprobs | None:
    return None if entries is None else openai.Logprobs(content=entries)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def _deltas(chunk: ProcessorChunk) -> list[openai.Delta]:
    """In their order; at least one where there are logprobs, which go with the first."""
    deltas = [openai.Delta(reasoning_content=chunk.reasoning_content)] if chunk.reasoning_content else []
    if chunk.content:
        deltas.append(openai.Delta(content=chunk.content))
    deltas += [openai.Delta(tool_calls=[_tool_call_delta(delta)]) for delta in chunk.tool_calls]
    return deltas or [openai.Delta(content="")] * bool(chunk.logprobs)


def _tool_call_delta(delta: ToolCallDelta) -> openai.AnswerToolCallDelta:
    if delta.name is None:
        return openai.AnswerToolCallDelta(index=delta.index, function=openai.FunctionDelta(arguments=delta.arguments))
    function = openai.FunctionDelta(name=delta.name, arguments=delta.arguments)
    return openai.AnswerToolCallDelta(index=delta.index, id=_call_id(), type="function", function=function)


def _message(chunk: ProcessorChunk) -> openai.Message:
    """The whole answer of a choice; its content is null where it only calls tools, or did not get beyond reasoning."""
    calls: list[openai.AnswerToolCall] = []
    for delta in chunk.tool_calls:
        if delta.name is not None:
            calls.append(openai.AnswerToolCall(id=_call_id(), function=openai.CalledFunction(name=delta.name)))
        calls[delta.index].function.arguments += delta.arguments
    content = chunk.content or (None if calls or chunk.reasoning_content else "")
    reasoning_content = chunk.reasoning_content or UNSET
    return openai.Message(content=content, reasoning_content=reasoning_content, tool_calls=calls or UNSET)


class EventStream(EventSourceResponse):
    """Server-sent events, with a comment wherever there is none for PING_INTERVAL_S: proxies drop silent connections.

    first: the first event. rest: the others; an exception among them becomes the last event, OpenAI's error.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], record: RequestRecord) -> None:
        super().__init__(rest, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._first, self._rest, self._record = first, rest, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's own also looks for a client that goes away, which the caller does here."""
        loop = asyncio.get_running_loop()
        sent_at = loop.time()

        async def ping() -> None:
            nonlocal sent_at
            while True:
                if (rest_s := sent_at + PING_INTERVAL_S - loop.time()) > 0:
                    await asyncio.sleep(rest_s)
                else:
                    sent_at = loop.time()
                    await send(_part(KEEPALIVE_COMMENT))

        pinging = asyncio.create_task(ping())
        try:
            async with aclosing(self._rest) as events:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send(_part(self._first))
                async for event in events:
                    sent_at = loop.time()
                    await send(_part(event))
        except Exception as error:
            if not isinstance(error, PipelineError):
                logger.exception("streaming an answer failed")
                error = InternalError()
            self._record.outcome = error.outcome
            await send(_part(sse(error.to_wire())))
        finally:
            pinging.cancel()
        await send({"type": "http.response.body"})


def sse(event: Any) -> bytes:
    """One server-sent event: `data: {json}` and a blank line."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}
