"""The OpenAPI document behind /openapi.json and /docs.

Made of the types of requests and answers rather than derived from the routes: the chat route reads its body itself,
after its own checks, and answers with JSON or a stream. `tests/test_openapi.py` holds it against the running pipeline.
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from common import errors
from common.errors import PipelineError
from common.http.middleware import CHAT_PATH, PROTECTED_PREFIXES
from common.openai.request import ChatCompletionRequest
from common.openai.responses import ChatCompletion, ChatCompletionChunk, JsonObject, Model, Models
from common.page.live_page import Pipeline

Schema = dict[str, Any]

TITLE = "Chat completions on Dynamo"
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
STRING: Schema = {"type": "string"}


class ErrorDetail(JsonObject, kw_only=True):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(JsonObject, kw_only=True):
    error: ErrorDetail


class Health(JsonObject, kw_only=True):
    status: Literal["ok"]


class Ready(JsonObject, kw_only=True):
    status: Literal["ready"]
    processors: int
    engines: int


_REQUEST_ID: Schema = {
    "name": "x-request-id", "in": "header", "schema": STRING,
    "description": "Up to 128 letters, digits and ._:/+=@- ; anything else is replaced.",
}  # fmt: skip
_SHOW_PATH: Schema = {
    "name": "x-show-path", "in": "header", "schema": STRING,
    "description": "1: tell in `path` which way the request went, in the answer or in the last chunk of a stream.",
}  # fmt: skip
_MODEL: Schema = {
    "name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1},
    "description": "As GET /v1/models lists it; slashes may be written as they are.",
}  # fmt: skip


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# One event of a stream, which is what OpenAPI 3.1 describes. Without a name of its own an event is a "message".
_EVENT_DATA: Schema = {
    "type": "string",
    "contentMediaType": "application/json",
    "contentSchema": {"anyOf": [_ref("ChatCompletionChunk"), _ref("Error")]},
}
_EVENT: Schema = {
    "type": "object",
    "properties": {"event": {"const": "message"}, "data": {"anyOf": [_EVENT_DATA, {"const": "[DONE]"}]}},
    "required": ["data"],
}
_CHAT_BODY: Schema = {"required": True, "content": {"application/json": {"schema": _ref("ChatCompletionRequest")}}}
_CHAT_ANSWER: Schema = {"application/json": _ref("ChatCompletion"), "text/event-stream": _EVENT}
_CHAT_ERRORS = (
    errors.InvalidRequest, errors.NotFound, errors.RequestTimeout, errors.RequestTooLarge,
    errors.UnsupportedMediaType, errors.Overloaded, errors.BadUpstream, errors.Unavailable, errors.DeadlineExceeded,
)  # fmt: skip


def _header(description: str, schema: Schema) -> Schema:
    return {"description": description, "required": True, "schema": schema}


def _response(description: str, content: Schema, *, has_retry_after: bool = False) -> Schema:
    """content: the schema for each media type."""
    headers = {"x-request-id": _header("The client's, or a new one.", STRING)}
    if has_retry_after:
        headers["retry-after"] = _header("Seconds.", {"type": "integer", "minimum": 0})
    content = {media_type: {"schema": schema} for media_type, schema in content.items()}
    return {"description": description, "headers": headers, "content": content}


def _answer(description: str, schema: str) -> Schema:
    return _response(description, {"application/json": _ref(schema)})


def _error_responses(*kinds: type[PipelineError]) -> dict[str, Schema]:
    content = {"application/json": _ref("Error")}
    return {
        str(kind.status): _response(kind.__doc__ or "", content, has_retry_after=kind.retry_after_s is not None)
        for kind in kinds
    }


def _operation(
    name: str, summary: str, answer: Schema, *kinds: type[PipelineError], parameters: Iterable[Schema] = ()
) -> Schema:
    responses = {"200": answer} | _error_responses(*kinds, errors.InternalError)
    return {
        "operationId": name, "summary": summary, "parameters": [*parameters, _REQUEST_ID], "responses": responses,
    }  # fmt: skip


def _paths(*, is_page_served: bool) -> dict[str, dict[str, Schema]]:
    """For each path its operations, by method."""
    chat = _operation(
        "createChatCompletion", "Answer a chat", _response(_STREAM, _CHAT_ANSWER), *_CHAT_ERRORS,
        parameters=[_SHOW_PATH] * is_page_served,
    )  # fmt: skip
    models = _operation("listModels", "List the models", _answer("Those that processors serve.", "Models"))
    model = _operation(
        "retrieveModel", "Look a model up", _answer("The model.", "Model"), errors.NotFound, parameters=[_MODEL]
    )
    ready = _answer("A processor and an engine are there.", "Ready")
    metrics = _response("Prometheus' text format.", {"text/plain": STRING})
    paths = {
        CHAT_PATH: {"post": chat | {"requestBody": _CHAT_BODY}},
        "/v1/models": {"get": models},
        "/v1/models/{model}": {"get": model},
        "/health": {"get": _operation("health", "Is this process alive?", _answer("It is.", "Health"))},
        "/ready": {"get": _operation("ready", "Will a chat request be answered?", ready, errors.Unavailable)},
        "/metrics": {"get": _operation("metrics", "What the frontend has counted", metrics)},
    }
    if is_page_served:
        paths["/pipeline"] = {"get": _operation("pipeline", "Who is there?", _answer("As etcd says.", "Pipeline"))}
    return paths


def _schemas() -> dict[str, Schema]:
    request: Schema = ChatCompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    answers = (Error, ChatCompletion, ChatCompletionChunk, Model, Models, Health, Ready, Pipeline)
    _, schemas = msgspec.json.schema_components(answers, ref_template="#/components/schemas/{name}")
    inner: Schema = request.pop("$defs")
    answered = {name: _with_constants(schema) for name, schema in schemas.items()}
    return answered | inner | {"ChatCompletionRequest": request}


def _with_constants(schema: Schema) -> Schema:
    """A JsonObject's fields with a default are always there; those of the wire's types are left out."""
    if schema.get("additionalProperties") is not False:
        return schema
    constants = [name for name, field in schema["properties"].items() if "default" in field]
    return schema | {"required": sorted({*schema["required"], *constants})}


def openapi_document(*, is_key_required: bool, is_page_served: bool = True) -> Schema:
    """is_key_required: whether what is protected wants one of the frontend's API keys.

    is_page_served: whether there is the page at `/`, and a way to ask for a request's path.
    """
    paths, components = _paths(is_page_served=is_page_served), {"schemas": _schemas()}
    if is_key_required:
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
        for path, methods in paths.items():
            if path.startswith(PROTECTED_PREFIXES):
                for operation in methods.values():
                    operation["responses"] |= _error_responses(errors.InvalidApiKey)
                    operation["security"] = [{"apiKey": []}]
    info = {"title": TITLE, "version": "1.0", "description": _DESCRIPTION}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
