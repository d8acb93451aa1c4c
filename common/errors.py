"""Every error that a client can see, each with its HTTP status and its OpenAI type and code.

    PipelineError
    |- InvalidRequest 400
    |  |- ContextLengthExceeded
    |- InvalidApiKey 401
    |- NotFound 404
    |  |- ModelNotFound
    |- MethodNotAllowed 405
    |- RequestTimeout 408
    |- RequestTooLarge 413
    |- UnsupportedMediaType 415
    |- MisdirectedRequest 421
    |- Overloaded 429
    |- HeadersTooLarge 431
    |- InternalError 500
    |- BadUpstream 502
    |- Unavailable 503
    |  |- Aborted
    |  |- Busy
    |- DeadlineExceeded 504

Knows nothing about HTTP servers: the frontend turns `status` into a response, the other two send the dict.
"""

from typing import Any, ClassVar


def _without_middle(text: str, max_characters: int) -> str:
    half = max_characters // 2
    return text if len(text) <= max_characters else f"{text[:half]}...{text[-half:]}"


class PipelineError(Exception):
    """An error with a message that the client may read: 400 characters of it, since it may repeat the client's own."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.message = _without_middle(message, 400)
        super().__init__(self.message)
        self.param = param and _without_middle(param, 200)

    @property
    def outcome(self) -> str:
        """How a request ended that ended with this: the code, or the type where there is no code."""
        return self.code or self.type

    def to_wire(self) -> dict[str, Any]:
        """`{"error": {...}}` as it crosses NATS: OpenAI's envelope."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(PipelineError):
    """The body is not JSON, or a field is wrong: `param` names it. Sent again, it fails again."""

    status, type = 400, "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidApiKey(PipelineError):
    """No API key, or a wrong one."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class NotFound(PipelineError):
    """No processor serves this model."""

    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(PipelineError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(PipelineError):
    """The body did not arrive in time."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class RequestTooLarge(PipelineError):
    """The body is larger than the frontend or NATS takes."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedMediaType(PipelineError):
    """The body's Content-Type is not JSON."""

    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class MisdirectedRequest(PipelineError):
    status, type, code = 421, "invalid_request_error", "misdirected_request"


class Overloaded(PipelineError):
    """As many requests are in flight as the frontend takes."""

    status, type, code, retry_after_s = 429, "rate_limit_error", "overloaded", 1


class HeadersTooLarge(PipelineError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class InternalError(PipelineError):
    """A bug. The log has its traceback, under the x-request-id."""

    status, code = 500, "internal_error"

    def __init__(self, message: str = "The server had an error while processing your request.", **kwargs: Any) -> None:
        super().__init__(message, **kwargs)


class BadUpstream(PipelineError):
    """A worker broke in the middle of its answer, or answered nonsense."""

    status, code = 502, "bad_upstream"


class Unavailable(PipelineError):
    """No processor, or no engine."""

    status, code, retry_after_s = 503, "unavailable", 2


class Aborted(Unavailable):
    """A worker gave a request up without being asked to: another one may take it."""

    code = "aborted"


class Busy(Unavailable):
    """A worker takes no more requests just now: another one may, or this one later. It is not broken."""

    code = "busy"


class DeadlineExceeded(PipelineError):
    """The answer took too long."""

    status, code = 504, "deadline_exceeded"


_BY_CODE: dict[str | None, type[PipelineError]] = {
    error.code: error
    for error in (
        ContextLengthExceeded, ModelNotFound, RequestTooLarge, Overloaded,
        InternalError, BadUpstream, Unavailable, Aborted, Busy, DeadlineExceeded,
    )
}  # fmt: skip


def from_wire(error: Any) -> PipelineError:
    """The error that a worker sent. What cannot be read is a `BadUpstream`, without the worker's text."""
    if not isinstance(error, dict) or not isinstance(error.get("message"), str) or not error["message"]:
        return BadUpstream("The model worker reported an error that cannot be read.")
    param = error.get("param") if isinstance(error.get("param"), str) else None
    code = error.get("code") if isinstance(error.get("code"), str) else None
    by_type = InvalidRequest if error.get("type") == InvalidRequest.type else BadUpstream
    return _BY_CODE.get(code, by_type)(error["message"], param=param)
