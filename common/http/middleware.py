"""What stands before the routes: an id and a line in the log for each request, who may come in, how many at a time.

Plain ASGI, so that streams are not buffered.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.arguments import FrontendArgs
from common.errors import InternalError, InvalidApiKey, InvalidRequest, MisdirectedRequest, Overloaded, PipelineError
from common.observability.request_records import SHOW_PATH_HEADER, RequestRecords
from common.wire import Envelope

logger = logging.getLogger("frontend")

REQUEST_ID = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET_PATHS = ("/health", "/ready", "/metrics", "/pipeline")

PROTECTED_PREFIXES = ("/v1/", "/pipeline")
CHAT_PATH = "/v1/chat/completions"
ChatRoute = Callable[[Request], Awaitable[Response]]


def error_response(scope: Scope, error: PipelineError, headers: dict[str, str] | None = None) -> Response:
    """The answer to a request that fails, in OpenAI's envelope, noted in the request's record if it has one."""
    if (record := scope["state"].get("record")) is not None:
        record.outcome = error.outcome
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, InvalidApiKey):
        all_headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(error.to_wire()), error.status, all_headers, media_type="application/json")


def _is_chat(scope: Scope) -> bool:
    return bool(scope["path"] == CHAT_PATH and scope["method"] == "POST")


class RequestId:
    """Puts the request's id into the answer's headers, and logs one line per request; a chat has a record for that."""

    def __init__(self, app: ASGIApp, records: RequestRecords, *, is_path_shown: bool) -> None:
        self._app = app
        self._records = records
        self._is_path_shown = is_path_shown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        if scope["path"] == f"{CHAT_PATH}/":
            scope["path"] = CHAT_PATH
        state = scope.setdefault("state", {})

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        noted = self._recorded if _is_chat(scope) else self._logged
        with noted(request_id, scope):
            await self._app(scope, receive, send_with_id)

    @contextmanager
    def _recorded(self, request_id: str, scope: Scope) -> Iterator[None]:
        headers = Headers(scope=scope)
        is_path_shown = self._is_path_shown and headers.get(SHOW_PATH_HEADER) == "1"
        with self._records.begin(Envelope(request_id, headers.get("traceparent", ""), is_path_shown)) as record:
            scope["state"]["record"] = record
            try:
                yield
            finally:
                record.about = f"POST {CHAT_PATH} {scope['state'].get('status', '')}".rstrip()

    @contextmanager
    def _logged(self, request_id: str, scope: Scope) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            if scope["path"] not in _QUIET_PATHS:
                about = f"{scope['method']} {scope['path']} {scope['state'].get('status', 'cancelled')}"
                logger.info("request %s: %s, %.0f ms", request_id, about, (time.monotonic() - started) * 1000)


@lru_cache(maxsize=1000)
def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Gate:
    """Lets in who may come in, answers chats with what `respond` makes of them, and all errors in OpenAI's envelope.

    A chat counts from the end of its body, so that clients that send theirs slowly do not use up the limit, until its
    last byte is sent. From there on, too, it is cancelled when its client goes away. It is no route of FastAPI's: the
    layers around one took a third of the frontend's time.

    It sits inside the other middleware, so that errors have their headers, too; Starlette's own handler is outside.
    """

    def __init__(self, app: ASGIApp, respond: ChatRoute, args: FrontendArgs) -> None:
        self._app, self._respond = app, respond
        self._limit, self._num_in_flight = args.max_concurrency, 0
        self._digests = [_digest(key) for key in args.api_keys]
        self._host_names = {name.lower() for name in args.allowed_hosts}
        self._are_hosts_checked = bool(self._host_names) or _is_loopback(args.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            answer = self._chat if _is_chat(scope) else self._app
            await answer(scope, receive, send_and_note)
        except Exception as error:
            if is_started:
                raise  # the server logs it, and breaks the connection off
            if not isinstance(error, PipelineError):
                logger.exception("%s %s failed", scope["method"], scope["path"])
                error = InternalError()
            await error_response(scope, error)(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """Raises:
        InvalidRequest: a request without its one Host. MisdirectedRequest: one for another host than this.

        Only a frontend on loopback knows its names, and one that is told them. Without that, any page could read from
        it: by a name of its own that it lets point to 127.0.0.1 (DNS rebinding).
        """
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            raise InvalidRequest("A request has one Host header.")
        name = re.sub(r":\d*$", "", "".join(hosts)).strip("[]").lower()
        if self._are_hosts_checked and hosts and name not in self._host_names and not _is_loopback(name):
            raise MisdirectedRequest("This frontend has no such name. Start it with --allowed-hosts NAME if it has.")

    def _check_key(self, scope: Scope) -> None:
        """Raises:
        InvalidApiKey: it asks for what is protected without one of the keys, which are kept and compared as digests.
        """
        if not self._digests or not scope["path"].startswith(PROTECTED_PREFIXES):
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Compare with all of them: the time taken must not tell which one came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise InvalidApiKey("Missing or wrong API key. Send it as: Authorization: Bearer KEY.")

    def _check_limit(self) -> None:
        if self._num_in_flight >= self._limit:
            raise Overloaded(f"{self._limit} requests are in flight, which is the limit. Try again.")

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_limit()  # before the body is read
        answering = asyncio.current_task()
        assert answering is not None
        watching: asyncio.Task[None] | None = None

        async def receive_and_count() -> Message:
            nonlocal watching
            message = await receive()
            if watching is None and message["type"] == "http.request" and not message.get("more_body", False):
                self._check_limit()
                self._num_in_flight += 1
                watching = asyncio.create_task(_cancel_when_disconnected(receive, answering))
            return message

        try:
            response = await self._respond(Request(scope, receive_and_count))
            await response(scope, receive, send)
        except asyncio.CancelledError:
            if watching is None or not watching.done():  # it is not the client who has gone
                raise
            answering.uncancel()
        finally:
            if watching is not None:
                watching.cancel()
                self._num_in_flight -= 1


async def _cancel_when_disconnected(receive: Receive, answering: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()
