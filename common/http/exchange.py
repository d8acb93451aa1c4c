"""One HTTP exchange: the request's body, and an answer as a stream of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

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
    return RequestContext(Context(), record)


class EventStream(EventSourceResponse):
    """Server-sent events, with a comment wherever there is none for PING_INTERVAL_S: proxies drop silent connections.

    first: the first event. rest: the others; an exception among them becomes the last event, OpenAI's error.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], record: RequestRecord) -> None:
        super().__init__(rest, headers=_HEADERS)
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
            await send(_part(self._error_event(error)))
        finally:
            pinging.cancel()
        await send({"type": "http.response.body"})

    def _error_event(self, error: Exception) -> bytes:
        if not isinstance(error, PipelineError):
            logger.exception("streaming an answer failed")
            error = InternalError()
        self._record.outcome = error.outcome
        return sse(error.to_wire())


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}
