"""What every handler needs and the chapter does not teach, as one wrapper around it.

The wrapper answers `{"describe": true}`, reads the request's dict into the type that the handler's signature names,
keeps the request's record (metrics, log line, span, path), and turns chunks and errors into dicts again.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec

from common.dynamo.context import RequestContext as RequestContext
from common.dynamo.releases import Context
from common.errors import InternalError, PipelineError
from common.observability.metrics import Metrics
from common.observability.request_records import RequestRecords
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.wire import EngineRequest, Envelope, read_engine_request, to_wire

logger = logging.getLogger(__name__)

_READERS: dict[type, Callable[[dict[str, Any]], Any]] = {
    ChatCompletionRequest: parse_chat_request,
    EngineRequest: read_engine_request,
}

R = TypeVar("R", ChatCompletionRequest, EngineRequest)
TypedHandler = Callable[[R, RequestContext], AsyncGenerator[Any, None]]


class service(Generic[R]):  # noqa: N801: reads as the decorator that it is
    """`handler(request, context)`, an async generator of chunks, as an endpoint serves it: dicts in, dicts out.

    description: what this process says of itself when asked.
    """

    def __init__(self, handler: TypedHandler[R], *, description: msgspec.Struct) -> None:
        self._handler: TypedHandler[R] = handler
        self._read = _READERS[get_type_hints(handler)["request"]]
        self._description = to_wire(description) | {"finish_reason": "stop"}

    def count_in(self, metrics: Metrics) -> None:
        """Call before the first request."""
        self._records = RequestRecords(metrics)

    async def __call__(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        if request.get("describe"):
            yield self._description
            return
        try:
            with self._records.begin(Envelope.taken_from(request)) as record:
                typed_request = self._read(request)
                record.asks(typed_request)
                async with aclosing(self._handler(typed_request, RequestContext(context, record))) as chunks:
                    async for chunk in chunks:
                        if context.is_stopped():  # nobody waits for it
                            return
                        record.answers(chunk)
                        yield to_wire(chunk)
        except PipelineError as error:
            yield error.to_wire()
        except Exception:
            logger.exception("%s failed", self._handler.__qualname__)
            yield InternalError("The server had an error while processing your request.").to_wire()
