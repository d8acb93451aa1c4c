"""Every error of the HTTP side as OpenAI's envelope, whoever raised it."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from common.chat_responses import error_json
from common.errors import InternalError, InvalidRequest, MethodNotAllowed, NotFound, PipelineError

logger = logging.getLogger(__name__)


def error_response(error: PipelineError, headers: dict[str, str] | None = None) -> Response:
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["retry-after"] = str(error.retry_after_s)
    return Response(error_json(error), error.status, all_headers, media_type="application/json")


async def _on_pipeline_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, PipelineError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return error_response(NotFound(f"There is nothing at {request.url.path}."), headers)
    if error.status_code == 405:
        return error_response(MethodNotAllowed(f"{request.method} is not allowed here."), headers)
    return error_response(InvalidRequest(str(error.detail)), headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(InternalError("The server had an error while processing your request."))


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(PipelineError, _on_pipeline_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
