"""What every handler needs and the chapter does not teach, as one wrapper around it.

The wrapper answers `{"describe": true}`, reads the request's dict into the type that the handler's signature names,
keeps the request's record (metrics, log line, span, path), and turns chunks and errors into dicts again.

The dicts are pushed into Dynamo's sender where it has one, else pulled by Dynamo. Pushing costs the worker half of the
CPU time per dict, or less (docs/dynamo-releases.md). A sender takes dicts without delay until its reader has let the
buffers of their connection fill up, and then blocks whoever sends: after 14,000 small dicts of an engine on another
host, 60,000 on the same one. So what a stream sends after its first 128 KiB, which few do, is sent from a thread: a
reader that stalls delays its own stream and no other.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from threading import Thread
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

import msgspec

from common.dynamo.connection import Connection
from common.dynamo.context import RequestContext as RequestContext
from common.dynamo.releases import Context
from common.errors import InternalError, PipelineError
from common.observability.metrics import Metrics
from common.observability.request_records import RequestRecords
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.wire import EngineRequest, Envelope, WorkerQuestion, read_engine_request, read_worker_question, to_wire

logger = logging.getLogger(__name__)

_READERS: dict[type, Callable[[dict[str, Any]], Any]] = {
    ChatCompletionRequest: parse_chat_request,
    EngineRequest: read_engine_request,
    WorkerQuestion: read_worker_question,
}

R = TypeVar("R", ChatCompletionRequest, EngineRequest, WorkerQuestion)
TypedHandler = Callable[[R, RequestContext], AsyncGenerator[Any, None]]


class service(Generic[R]):  # lower case: it reads as the decorator that it is
    """`handler(request, context)`, an async generator of chunks, as an endpoint serves it: dicts in, dicts out.

    description: what this process says of itself when asked, or what it is to be asked for that.
    """

    def __init__(
        self, handler: TypedHandler[R], *, description: msgspec.Struct | Callable[[], Awaitable[msgspec.Struct]]
    ) -> None:
        self._handler: TypedHandler[R] = handler
        self._read = _READERS[get_type_hints(handler)["request"]]
        self._description = description

    def count_in(self, metrics: Metrics) -> None:
        """Call before the first request."""
        self._records = RequestRecords(metrics)

    async def __call__(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        if request.get("describe"):
            description = await self._description() if callable(self._description) else self._description
            yield to_wire(description) | {"finish_reason": "stop"}
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
            yield InternalError().to_wire()


Handler = Callable[[dict[str, Any], Context], AsyncGenerator[dict[str, Any], None]]

UNBLOCKED_BYTES = 2**17
SWEEP_S = 0.5
_ENVELOPE_BYTES = 64  # Dynamo's own around a dict, and the kernel's


class ResponseSender(Protocol):
    """Dynamo's. Both raise RuntimeError when the stream is closed, by us or because its reader is gone."""

    def send(self, item: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Serving:
    """A handler as an endpoint serves it: `num_in_flight` of the connection counts its requests, until all is sent.

    graceful_shutdown: whether a process that stops waits for them.
    """

    def __init__(self, handler: Handler, connection: Connection, *, graceful_shutdown: bool = True) -> None:
        self._handler, self._connection = handler, connection
        self._num_open, self._is_waited_for = 0, graceful_shutdown
        self._loop = asyncio.get_running_loop()
        self._sweeping: asyncio.TimerHandle | None = None

    async def answer(
        self, request: dict[str, Any], context: Context, response_sender: ResponseSender | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What Dynamo calls. Yields nothing where there is a sender."""
        stream = self._handler(request, context)
        self._count(1)
        if self._sweeping is None:
            self._sweep()
        try:
            if response_sender is not None:
                await self._push(stream, response_sender)
            else:
                async for item in stream:
                    yield item
        except GeneratorExit:
            # Dynamo drops a stream that nobody reads in a thread of its own, where nothing can be awaited.
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(lambda: self._connection.run_in_background(self._close(stream)))
            raise
        except BaseException:
            self._count(-1)
            raise
        self._count(-1)

    def _count(self, num_more: int) -> None:
        self._num_open += num_more
        self._connection.num_in_flight += num_more * self._is_waited_for

    def _sweep(self) -> None:
        """Close the streams that Dynamo has dropped, twice a second while requests are in flight.

        Its threads drop them without the interpreter lock, so PyO3 only notes it, for whoever calls it next. In a
        worker that has become idle nobody does, and the handler would stay suspended.
        """
        Context().is_stopped()
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep) if self._num_open else None

    async def _push(self, stream: AsyncGenerator[dict[str, Any], None], sender: ResponseSender) -> None:
        num_bytes = 0
        async with aclosing(stream):
            async for item in stream:
                num_bytes += len(msgspec.msgpack.encode(item)) + _ENVELOPE_BYTES
                try:
                    if num_bytes <= UNBLOCKED_BYTES:
                        sender.send(item)
                    else:
                        await self._send_from_thread(sender, item)
                except RuntimeError:  # the reader is gone
                    return
        sender.close()

    async def _send_from_thread(self, sender: ResponseSender, item: dict[str, Any]) -> None:
        """From one that may stay blocked: the interpreter would wait for an executor's threads at its end."""
        sent: asyncio.Future[None] = self._loop.create_future()

        def settle(error: RuntimeError | None) -> None:
            if not sent.done():
                sent.set_exception(error) if error else sent.set_result(None)

        def send() -> None:
            failure = None
            try:
                sender.send(item)
            except RuntimeError as error:
                failure = error
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(settle, failure)

        Thread(target=send, name="stalled-reader", daemon=True).start()
        await sent

    async def _close(self, stream: AsyncGenerator[dict[str, Any], None]) -> None:
        try:
            await stream.aclose()
        finally:
            self._count(-1)
