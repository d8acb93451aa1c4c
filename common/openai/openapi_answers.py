"""What the routes answer, as JSON schemas: the counterpart of `responses.py`, for readers and for tests."""

from typing import Any

from common.errors import (
    BadUpstream,
    DeadlineExceeded,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    Overloaded,
    PipelineError,
    RequestTimeout,
    RequestTooLarge,
    Unavailable,
    UnsupportedMediaType,
)

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
UNIX_TIME: Schema = {"type": "integer", "description": "Unix time in seconds."}
NULL: Schema = {"type": "null"}
INSTANCE: Schema = {"type": "string", "pattern": "^[0-9a-f]{1,16}$", "description": "The id that ends a key in etcd."}
MOMENT: Schema = COUNT | {"description": "Microseconds since this process received the request."}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def array_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def fields(*optional: str, **properties: Schema) -> Schema:
    """An object with these fields and no others, all of them there but the `optional` ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def constant(value: str) -> Schema:
    return {"type": "string", "const": value}


_TOKEN = {
    "token": {"type": "string", "description": "With U+FFFD where it is only a part of a character."},
    "logprob": {"type": "number", "description": "-9999 where the probability is 0."},
    "bytes": nullable(array_of({"type": "integer", "minimum": 0, "maximum": 255})),
}
_HEAD = {"id": {"type": "string", "pattern": "^chatcmpl-"}, "created": UNIX_TIME, "model": STRING}
_FINISH_REASON: Schema = {"type": "string", "enum": ["stop", "length"]}

SCHEMAS: dict[str, Schema] = {
    "Error": fields(
        error=fields(
            message=STRING,
            type={"type": "string", "enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
            param=nullable({"type": "string", "description": "The field that is wrong: messages[0].content"}),
            code=nullable(STRING),
        )
    ),
    "Usage": fields(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT),
    "Logprobs": fields(content=array_of(fields(**_TOKEN, top_logprobs=array_of(fields(**_TOKEN)))), refusal=NULL),
    "ChatCompletion": fields(
        "path",
        **_HEAD,
        object=constant("chat.completion"),
        choices=array_of(
            fields(
                index=COUNT,
                message=fields(role=constant("assistant"), content=STRING, refusal=NULL),
                logprobs=nullable(ref("Logprobs")),
                finish_reason=_FINISH_REASON,
            )
        ),
        usage=ref("Usage"),
        path=ref("Path"),
    ),
    "ChatCompletionChunk": fields(
        "usage",
        "path",
        **_HEAD,
        object=constant("chat.completion.chunk"),
        choices=array_of(
            fields(
                index=COUNT,
                delta=fields("role", "content", "refusal", role=constant("assistant"), content=STRING, refusal=NULL),
                logprobs=nullable(ref("Logprobs")),
                finish_reason=nullable(_FINISH_REASON),
            )
        ),
        usage=nullable(ref("Usage")),
        path=ref("Path"),
    ),
    "Path": fields("calls", pid=COUNT, first_us=MOMENT, last_us=MOMENT, calls=array_of(ref("Call"))),
    "Call": fields(
        "first_us",
        "last_us",
        "is_broken",
        "stage",
        instance=INSTANCE,
        called_us=MOMENT,
        first_us=MOMENT,
        last_us=MOMENT,
        is_broken={"type": "boolean", "description": "It ended midway; the next call took over."},
        stage=ref("Stage"),
    ),
    "Stage": fields("first_us", "last_us", "calls", first_us=MOMENT, last_us=MOMENT, calls=array_of(ref("Call"))),
    "Pipeline": fields(
        frontend=fields(pid=COUNT),
        processors=array_of(fields(instance=INSTANCE, models=array_of(STRING))),
        engines=array_of(fields(instance=INSTANCE)),
    ),
    "Model": fields(id=STRING, object=constant("model"), created=UNIX_TIME, owned_by=STRING),
    "Models": fields(object=constant("list"), data=array_of(ref("Model"))),
    "Health": fields(status=constant("ok")),
    "Ready": fields(status=constant("ready"), processors=COUNT, engines=COUNT),
}

# One event of a stream, which is what OpenAPI 3.1 describes. Without a name of its own an event is a "message".
SSE_EVENT = fields(
    "event",
    event=constant("message"),
    data={
        "anyOf": [
            {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"anyOf": [ref("ChatCompletionChunk"), ref("Error")]},
            },
            constant("[DONE]"),
        ]
    },
)

_REQUEST_ID = {"x-request-id": {"description": "The client's, or a new one.", "required": True, "schema": STRING}}
_RETRY_AFTER = {"retry-after": {"description": "Seconds.", "required": True, "schema": COUNT}}
_MEANINGS: dict[type[PipelineError], str] = {
    InvalidRequest: "The body is not JSON, or a field is wrong: `param` names it. Sent again, it fails again.",
    InvalidApiKey: "No API key, or a wrong one.",
    NotFound: "No processor serves this model.",
    RequestTimeout: "The body did not arrive in time.",
    RequestTooLarge: "The body is larger than the frontend or NATS takes.",
    UnsupportedMediaType: "The body's Content-Type is not JSON.",
    Overloaded: "As many requests are in work as the frontend takes.",
    InternalError: "A bug. The log has its traceback, under the x-request-id.",
    BadUpstream: "A worker broke in the middle of its answer, or answered nonsense.",
    Unavailable: "No processor, or no engine.",
    DeadlineExceeded: "The answer took too long.",
}


def response(description: str, content: dict[str, Schema], headers: Schema | None = None) -> Schema:
    """content: the schema for each media type."""
    return {
        "description": description,
        "headers": _REQUEST_ID | (headers or {}),
        "content": {media_type: {"schema": schema} for media_type, schema in content.items()},
    }


def error_responses(*errors: type[PipelineError]) -> dict[str, Schema]:
    """One response for each status."""
    return {
        str(error.status): response(
            _MEANINGS[error],
            {"application/json": ref("Error")},
            _RETRY_AFTER if error.retry_after_s is not None else None,
        )
        for error in errors
    }
