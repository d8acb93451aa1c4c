"""How the dicts of a handler leave the process: pushed into Dynamo's sender where it has one, else pulled by Dynamo.

Pushing costs the worker a third of the CPU time per dict (docs/dynamo-releases.md). A sender takes dicts without delay
until its reader has let about 4 MB pile up, and then blocks whoever sends. So what a stream sends after its first MiB,
which hardly any does, is sent from a thread: a reader that stalls delays its own stream and no other.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, Protocol

import msgspec

from common.dynamo.connection import Connection
from common.dynamo.releases import Context

Handler = Callable[[dict[str, Any], Context], AsyncGenerator[dict[str, Any], None]]

UNBLOCKED_BYTES = 2**20
MAX_BLOCKED_STREAMS = 64


class ResponseSender(Protocol):
    """Dynamo's. Both raise RuntimeError when the stream is closed, by us or because its reader is gone."""

    def send(self, item: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Serving:
    """A handler as an endpoint serves it: `num_in_flight` of the connection counts its requests, until all is sent."""

    def __init__(self, handler: Handler, connection: Connection) -> None:
        self._handler, self._connection = handler, connection
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(MAX_BLOCKED_STREAMS, thread_name_prefix="stalled-reader")

    async def answer(
        self, request: dict[str, Any], context: Context, response_sender: ResponseSender | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What Dynamo calls. Yields nothing where there is a sender."""
        stream = self._handler(request, context)
        self._connection.num_in_flight += 1
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
            self._connection.num_in_flight -= 1
            raise
        self._connection.num_in_flight -= 1

    async def _push(self, stream: AsyncGenerator[dict[str, Any], None], sender: ResponseSender) -> None:
        num_bytes = 0
        async with aclosing(stream):
            async for item in stream:
                num_bytes += len(msgspec.msgpack.encode(item))
                try:
                    if num_bytes <= UNBLOCKED_BYTES:
                        sender.send(item)
                    else:
                        await self._loop.run_in_executor(self._threads, sender.send, item)
                except RuntimeError:  # the reader is gone
                    return
        sender.close()

    async def _close(self, stream: AsyncGenerator[dict[str, Any], None]) -> None:
        try:
            await stream.aclose()
        finally:
            self._connection.num_in_flight -= 1
