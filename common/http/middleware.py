"""What stands before the routes: who may come in, how many at a time, and a line in the log for each.

Plain ASGI, so that streams are not buffered.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import InvalidApiKey, InvalidRequest, MisdirectedRequest, Overloaded, PipelineError
from common.http.errors import error_response
from common.observability.request_records import SHOW_PATH_HEADER, RequestRecords
from common.wire import Envelope

logger = logging.getLogger("frontend")

HEADER = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET_PATHS = ("/health", "/ready", "/metrics", "/pipeline")

PROTECTED_PREFIXES = ("/v1/", "/pipeline")
CHAT_PATH = "/v1/chat/completions"


@lru_cache(maxsize=1000)
def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class HostNames:
    """Answers 400 to a request without its one Host, and 421 to one for another host than this.

    Only a frontend on loopback knows its names, and one that is told them. Without that, any page could read from it:
    by a name of its own that it lets point to 127.0.0.1 (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, address: str, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = {name.lower() for name in allowed}
        self._is_checked = bool(self._allowed) or _is_loopback(address)

    def _check(self, scope: Scope) -> None:
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            raise InvalidRequest("A request has one Host header.")
        name = re.sub(r":\d*$", "", "".join(hosts)).strip("[]").lower()
        if self._is_checked and hosts and name not in self._allowed and not _is_loopback(name):
            raise MisdirectedRequest("This frontend has no such name. Start it with --allowed-hosts NAME if it has.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            try:
                self._check(scope)
            except PipelineError as error:
                app = error_response(scope, error)
        await app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class ApiKeys:
    """Answers 401 to requests for what is protected without one of the keys, which are kept and compared as digests."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"].startswith(PROTECTED_PREFIXES):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            given = _digest(key.strip())
            # Compare with all of them: the time taken must not tell which one came close.
            matches = [hmac.compare_digest(given, digest) for digest in self._digests]
            if scheme.lower() != "bearer" or not any(matches):
                error = InvalidApiKey("Missing or wrong API key. Send it as: Authorization: Bearer KEY.")
                await error_response(scope, error, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Chats:
    """Answers chats with what `respond` makes of them, and 429 above the limit. The rest is for `app`.

    A chat counts from the end of its body, so that clients that send theirs slowly do not use up the limit, until its
    last byte is sent. From there on, too, it is cancelled when its client goes away.

    No route of FastAPI's: the layers around one took a third of the frontend's time.
    """

    def __init__(self, app: ASGIApp, respond: Callable[[Request], Awaitable[Response]], limit: int) -> None:
        self._app, self._respond = app, respond
        self._limit = limit
        self._num_in_flight = 0

    def _refuse_above_limit(self) -> None:
        if self._num_in_flight >= self._limit:
            raise Overloaded(f"{self._limit} requests are in flight, which is the limit. Try again.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != CHAT_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        answering = asyncio.current_task()
        assert answering is not None
        watching: asyncio.Task[None] | None = None

        async def receive_and_count() -> Message:
            nonlocal watching
            message = await receive()
            if watching is None and message["type"] == "http.request" and not message.get("more_body", False):
                self._refuse_above_limit()
                self._num_in_flight += 1
                watching = asyncio.create_task(_cancel_when_disconnected(receive, answering))
            return message

        try:
            response = await self._response(Request(scope, receive_and_count))
            await response(scope, receive, send)
        except asyncio.CancelledError:
            if watching is None or not watching.done():  # it is not the client who has gone
                raise
            answering.uncancel()
        finally:
            if watching is not None:
                watching.cancel()
                self._num_in_flight -= 1

    async def _response(self, request: Request) -> Response:
        try:
            self._refuse_above_limit()  # before the body is read
            return await self._respond(request)
        except PipelineError as error:
            return error_response(request.scope, error)


async def _cancel_when_disconnected(receive: Receive, answering: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()


class RequestId:
    """Puts the id into `scope["state"]["request_id"]` and the answer's headers, and logs one line per request."""

    def __init__(self, app: ASGIApp, records: RequestRecords, *, is_path_shown: bool) -> None:
        self._app = app
        self._records = records
        self._is_path_shown = is_path_shown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        if scope["path"] == f"{CHAT_PATH}/":
            scope["path"] = CHAT_PATH
        is_chat = scope["path"] == CHAT_PATH and scope["method"] == "POST"
        answered = self._chat if is_chat else self._anything_else
        await answered(request_id, scope, receive, send)

    async def _chat(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        is_path_shown = self._is_path_shown and headers.get(SHOW_PATH_HEADER) == "1"
        with self._records.begin(Envelope(request_id, headers.get("traceparent", ""), is_path_shown)) as record:
            scope["state"]["record"] = record
            record.about = f"POST {CHAT_PATH}"

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)[HEADER] = request_id
                    record.about += f" {message['status']}"
                await send(message)

            await self._app(scope, receive, send_with_id)

    async def _anything_else(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in _QUIET_PATHS:
                logger.info(
                    "request %s: %s %s %s, %.0f ms",
                    request_id,
                    scope["method"],
                    scope["path"],
                    status or "cancelled",
                    (time.monotonic() - started) * 1000,
                )
