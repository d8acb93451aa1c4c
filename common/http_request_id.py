"""`x-request-id`: the client's if it sent a sane one, in the answer and in every log line about the request."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("frontend")

HEADER = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET_PATHS = ("/health", "/ready", "/metrics")


class RequestId:
    """Puts the id into `scope["state"]["request_id"]` and the answer's headers, and logs a line a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
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
