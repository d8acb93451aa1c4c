"""`x-request-id`: the client's if it sent a sane one, in the answer and in every log line about the request.

Each request gets one line when it is over. For a chat it is that of its `RequestRecord`, which the handler and the
error handlers find in `scope["state"]` and add to; for anything else, and that is less, it says what was answered.
"""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.http.admission import CHAT_PATH
from common.observability.request_path import HEADER as SHOW_PATH_HEADER
from common.observability.request_records import RequestRecords
from common.wire import Envelope

logger = logging.getLogger("frontend")

HEADER = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET_PATHS = ("/health", "/ready", "/metrics", "/pipeline")


class RequestId:
    """Puts the id into `scope["state"]["request_id"]` and the answer's headers, and logs a line a request."""

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
