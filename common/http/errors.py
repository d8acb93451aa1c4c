"""Every error of the HTTP side as OpenAI's envelope, whoever raised it."""

import logging

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import InternalError, InvalidRequest, MethodNotAllowed, NotFound, PipelineError

# What clients try first, and what there is instead.
_INSTEAD = {
    "/v1/completions": "Send `messages` to /v1/chat/completions: there is chat only.",
    "/v1/responses": "Use /v1/chat/completions: clients that prefer the Responses API have a setting for it.",
    "/v1/embeddings": "There are no embeddings here: ask a server that runs an embedding model.",
    "/chat/completions": "It is at /v1/chat/completions: end your client's base URL with /v1.",
}

logger = logging.getLogger(__name__)


def error_response(scope: Scope, error: PipelineError, headers: dict[str, str] | None = None) -> Response:
    """The answer to a request that fails, noted in its record if it has one."""
    if (record := scope["state"].get("record")) is not None:
        record.outcome = error.outcome
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["retry-after"] = str(error.retry_after_s)
    return Response(orjson.dumps(error.to_wire()), error.status, all_headers, media_type="application/json")


async def _on_pipeline_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PipelineError)
    return error_response(request.scope, error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        path = request.url.path
        message = f"There is nothing at {path}. {_INSTEAD.get(path.rstrip('/'), '')}".rstrip()
        return error_response(request.scope, NotFound(message), headers)
    if error.status_code == 405:
        return error_response(request.scope, MethodNotAllowed(f"{request.method} is not allowed here."), headers)
    return error_response(request.scope, InvalidRequest(str(error.detail)), headers)


class CatchAll:
    """Answers 500 to an exception that nobody has handled.

    It sits inside the other middleware, so that this answer has their headers, too; Starlette's own is outside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            if is_started:
                raise  # the server logs it, and breaks the connection off
            logger.exception("%s %s failed", scope["method"], scope["path"])
            error = InternalError()
            await error_response(scope, error)(scope, receive, send)


def install_error_handlers(app: FastAPI) -> None:
    """Call after the middleware is added whose errors it is to answer, too: the last one added is the outermost."""
    app.add_exception_handler(PipelineError, _on_pipeline_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(CatchAll)
