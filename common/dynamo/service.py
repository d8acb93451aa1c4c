"""What every handler needs and the chapter does not teach: one wrapper around it, and a context for each request.

Cancellation crosses processes: whoever stops waiting for an answer stops whoever makes it.

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
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

import msgspec

from common.dynamo.releases import Context
from common.errors import InternalError, PipelineError
from common.observability.metrics import Metrics
from common.observability.request_records import RequestRecord, RequestRecords
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.wire import EngineRequest, Envelope, WorkerQuestion, to_wire

logger = logging.getLogger(__name__)

POLL_S = 0.05


class _Watcher:
    """Looks at the contexts of all requests in flight in turn, as long as there are any.

    Dynamo can wake a coroutine when a context is stopped, but each such wait costs a task on its side and a hand-over
    of the interpreter lock, for every request, though hardly any is ever cancelled. Looking costs next to nothing.
    """

    def __init__(self) -> None:
        self._watched: dict[object, tuple[Context, Callable[[], None]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, context: Context, action: Callable[[], None]) -> object:
        key = object()
        self._watched[key] = (context, action)
        loop = asyncio.get_running_loop()
        if self._timer is None or self._loop is not loop:  # the timer of a loop that has ended rings no more
            self._loop, self._timer = loop, loop.call_later(POLL_S, self._look)
        return key

    def remove(self, key: object) -> None:
        self._watched.pop(key, None)

    def _look(self) -> None:
        # A copy: asking Dynamo lets other threads run, and what they drop may add or remove.
        stopped = [(key, action) for key, (context, action) in self._watched.copy().items() if context.is_stopped()]
        for key, action in stopped:
            self.remove(key)
            try:
                action()
            except Exception:  # one action's bug is not the others'
                logger.exception("could not stop what a caller gave up")
        self._timer = asyncio.get_running_loop().call_later(POLL_S, self._look) if self._watched else None


_watcher = _Watcher()


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a handler gets beside the request, and passes on to the calls that it makes for it.

    raw: Dynamo's own context, which is stopped when the caller gives up. record: of the request, in this process.
    """

    raw: Context
    record: RequestRecord

    def is_stopped(self) -> bool:
        return bool(self.raw.is_stopped())

    async def stopped(self) -> None:
        """Return when the caller has given up, or has all that it wanted."""
        is_stopped = asyncio.Event()
        with when_stopped(self.raw, is_stopped.set):
            await is_stopped.wait()


@contextmanager
def when_stopped(context: Context, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` within POLL_S after the caller gave up, as long as the block lasts."""
    key = _watcher.add(context, action)
    try:
        yield
    finally:
        _watcher.remove(key)


@contextmanager
def when_given_up(context: Context, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` when the caller gave up, and when the block is left early.

    So an engine is told to stop when the client goes away, when a stop string was found, and when we fail.
    """
    with when_stopped(context, action):
        try:
            yield
        except BaseException:  # GeneratorExit and CancelledError above all
            action()
            raise


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
        kind = get_type_hints(handler)["request"]
        self._read: Callable[[dict[str, Any]], Any] = parse_chat_request if kind is ChatCompletionRequest else kind.read
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
    """A handler as an endpoint serves it. num_in_flight: its requests, until all of their answers is sent.

    run_in_background: starts what nobody waits for.
    """

    def __init__(self, handler: Handler, run_in_background: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._handler, self._run_in_background = handler, run_in_background
        self.num_in_flight = 0
        self._loop = asyncio.get_running_loop()
        self._sweeping: asyncio.TimerHandle | None = None

    async def answer(
        self, request: dict[str, Any], context: Context, response_sender: ResponseSender | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What Dynamo calls. Yields nothing where there is a sender."""
        stream = self._handler(request, context)
        self.num_in_flight += 1
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
                self._loop.call_soon_threadsafe(lambda: self._run_in_background(self._close(stream)))
            raise
        except BaseException:
            self.num_in_flight -= 1
            raise
        self.num_in_flight -= 1

    def _sweep(self) -> None:
        """Close the streams that Dynamo has dropped, twice a second while requests are in flight.

        Its threads drop them without the interpreter lock, so PyO3 only notes it, for whoever calls it next. In a
        worker that has become idle nobody does, and the handler would stay suspended.
        """
        Context().is_stopped()
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep) if self.num_in_flight else None

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
            self.num_in_flight -= 1
