"""The OpenAPI document behind /openapi.json and /docs.

Written out rather than derived from the routes: the chat route reads its body itself, after its own checks, and
answers with JSON or a stream. `tests/test_openapi.py` holds the document against the running pipeline.
"""

from typing import Any

from fastapi import FastAPI

from common.errors import (
    BadUpstream,
    DeadlineExceeded,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestTimeout,
    RequestTooLarge,
    Unavailable,
    UnsupportedMediaType,
)
from common.openai.openapi_answers import SCHEMAS, SSE_EVENT, STRING, Schema, error_responses, ref, response
from common.openai.request import ChatCompletionRequest

_DESCRIPTION = """\
OpenAI's chat completions, answered by a Dynamo pipeline.

Every error is `{"error": {"message", "type", "param", "code"}}`, on any path: 404 where nothing is, and 405 with an
Allow header for a method that a path does not have. Every answer carries `x-request-id`.
"""
_STREAM = """\
The answer, whole or as a stream.

With `stream: true` each event is `data: ` and a ChatCompletionChunk, and the last one is `data: [DONE]`. An error
after the start is an event with an Error in place of a chunk; then the stream ends without `[DONE]`.
"""
_REQUEST_ID: Schema = {
    "name": "x-request-id",
    "in": "header",
    "description": "Up to 128 letters, digits and ._:/+=@- ; anything else is replaced.",
    "schema": STRING,
}
_SHOW_PATH: Schema = {
    "name": "x-show-path",
    "in": "header",
    "description": "1: tell in `path` which way the request went, in the answer or in the last chunk of a stream.",
    "schema": STRING,
}
_MODEL: Schema = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "As GET /v1/models lists it; slashes may be written as they are.",
    "schema": {"type": "string", "minLength": 1},
}


def _operation(summary: str, responses: dict[str, Schema], *parameters: Schema, **more: Any) -> Schema:
    responses = dict(sorted({**responses, **error_responses(InternalError)}.items()))
    return {"summary": summary, "parameters": [*parameters, _REQUEST_ID], "responses": responses, **more}


def _answer(description: str, schema: str) -> dict[str, Schema]:
    return {"200": response(description, {"application/json": ref(schema)})}


def _chat_completions(*parameters: Schema) -> Schema:
    request = {"required": True, "content": {"application/json": {"schema": ref("ChatCompletionRequest")}}}
    content = {"application/json": ref("ChatCompletion"), "text/event-stream": SSE_EVENT}
    errors = error_responses(
        InvalidRequest, NotFound, RequestTimeout, RequestTooLarge, UnsupportedMediaType, Overloaded,
        BadUpstream, Unavailable, DeadlineExceeded,
    )  # fmt: skip
    return _operation(
        "Answer a chat", {"200": response(_STREAM, content), **errors}, *parameters,
        operationId="createChatCompletion", requestBody=request,
    )  # fmt: skip


def _protected(operation: Schema) -> Schema:
    responses = dict(sorted({**operation["responses"], **error_responses(InvalidApiKey)}.items()))
    return {**operation, "responses": responses, "security": [{"apiKey": []}]}


def openapi_document(*, is_key_required: bool, is_page_served: bool = True) -> dict[str, Any]:
    """The document.

    is_key_required: whether the routes under /v1, and what the page shows, want one of the frontend's API keys.
    is_page_served: whether there is that page, and a way to ask for a request's path.
    """
    protected = _protected if is_key_required else dict
    request = ChatCompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components: dict[str, Any] = {
        "schemas": {**SCHEMAS, **request.pop("$defs"), "ChatCompletionRequest": request},
    }
    if is_key_required:
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
    models = _operation("List the models", _answer("Those that processors serve.", "Models"), operationId="listModels")
    model = _operation(
        "Look a model up",
        {**_answer("The model.", "Model"), **error_responses(NotFound)},
        _MODEL,
        operationId="retrieveModel",
    )
    health = _operation("Is this process alive?", _answer("It is.", "Health"), operationId="health")
    ready = _operation(
        "Will a chat request be answered?",
        {**_answer("A processor and an engine are there.", "Ready"), **error_responses(Unavailable)},
        operationId="ready",
    )
    metrics = _operation(
        "What the frontend has counted",
        {"200": response("Prometheus' text format.", {"text/plain": STRING})},
        operationId="metrics",
    )
    pipeline = _operation("Who is there?", _answer("As etcd says.", "Pipeline"), operationId="pipeline")
    for_page = {"/pipeline": {"get": protected(pipeline)}} if is_page_served else {}
    chat = _chat_completions(*[_SHOW_PATH] * is_page_served)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Chat completions on Dynamo", "version": "1.0", "description": _DESCRIPTION},
        "paths": {
            "/v1/chat/completions": {"post": protected(chat)},
            "/v1/models": {"get": protected(models)},
            "/v1/models/{model}": {"get": protected(model)},
            "/health": {"get": health},
            "/ready": {"get": ready},
            "/metrics": {"get": metrics},
            **for_page,
        },
        "components": components,
    }


def install_openapi(app: FastAPI, *, is_key_required: bool, is_page_served: bool) -> None:
    """Have /openapi.json and /docs show our document."""
    document = openapi_document(is_key_required=is_key_required, is_page_served=is_page_served)
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's own way to replace it
