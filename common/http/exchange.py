"""One HTTP exchange: the request's body, a client that goes away meanwhile, and an answer as a stream of events."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Send

from common.arguments import FrontendArgs
from common.dynamo.context import RequestContext
from common.dynamo.runtime import Context
from common.errors import (
    InternalError,
    InvalidRequest,
    PipelineError,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from common.http.answer import sse
from common.observability.request_records import RequestRecord
from common.openai.request import ChatCompletionRequest, parse_chat_request

logger = logging.getLogger(__name__)

T = TypeVar("T")

PING_INTERVAL_S = 15.0
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def read_chat_request(http_request: Request, args: FrontendArgs) -> ChatCompletionRequest:
    """Raises:
    PipelineError: what is wrong with the body.
    """
    body = await _read_json(http_request, max_bytes=args.max_body_bytes, timeout_s=args.body_timeout_s)
    return parse_chat_request(body)


async def _read_json(request: Request, *, max_bytes: int, timeout_s: float) -> Any:
    """The parsed body.

    Raises:
        UnsupportedMediaType, RequestTooLarge, RequestTimeout, InvalidRequest: what is wrong with it.
    """
    media_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON: send the header Content-Type: application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise RequestTooLarge(f"The body is larger than the limit of {max_bytes} bytes.")
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {timeout_s:.0f} seconds.") from None
    except ClientDisconnect:
        raise RequestTimeout("The client went away while it sent the body.") from None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def context_of(http_request: Request) -> RequestContext:
    """For the calls that are made to answer the request."""
    record: RequestRecord = http_request.state.record
    return RequestContext(Context(f"chat-{uuid.uuid4().hex}"), record)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. The request's body has been read.

    Raises:
        ClientDisconnect: there is nobody left to answer.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait((working, watching))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """Server-sent events, with a comment wherever there is none for PING_INTERVAL_S: proxies drop silent connections.

    first: the first event. rest: the others; an exception among them becomes the last event, OpenAI's error.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], record: RequestRecord) -> None:
        super().__init__(_with_error(first, rest, record), headers=_HEADERS)

    async def stream_response(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last_sent_at = loop.time()

        async def send_and_note(message: Message) -> None:
            nonlocal last_sent_at
            last_sent_at = loop.time()
            await send(message)

        async def ping() -> None:
            while True:
                if (rest_s := last_sent_at + PING_INTERVAL_S - loop.time()) > 0:
                    await asyncio.sleep(rest_s)
                else:
                    await send_and_note({"type": "http.response.body", "body": KEEPALIVE_COMMENT, "more_body": True})

        pinging = asyncio.create_task(ping())
        try:
            await super().stream_response(send_and_note)
        finally:
            pinging.cancel()


async def _with_error(
    first: bytes, rest: AsyncGenerator[bytes, None], record: RequestRecord
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(rest):
            yield first
            async for event in rest:
                yield event
    except Exception as error:
        if not isinstance(error, PipelineError):
            logger.exception("streaming an answer failed")
            error = InternalError()
        record.outcome = error.outcome
        yield sse(error.to_wire())
