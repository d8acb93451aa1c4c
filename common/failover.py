"""A call that outlives the instance it started on.

`FailoverClient` asks another instance when one fails. A stream that breaks midway goes on elsewhere with what is
left to do, if its caller says how (`resume`), or from its beginning, if its caller can forget (`start_over`).
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from common import dynamo_releases
from common.cancellation import child_context
from common.errors import BadUpstream, PipelineError, RequestTooLarge, Unavailable
from common.instance_pool import Among, InstancePool
from common.metrics import CallMetrics
from common.request_path import RequestPath
from common.runtime import Client, Context
from common.server_access import nats_max_payload
from common.wire import SHOW_PATH, is_aborted, is_error, is_saying_something, is_terminal

MAX_ATTEMPTS = 8
MAX_EMPTY_CHUNKS = 10_000
# Dynamo's own words around a request count for NATS, not for its client: it sends what NATS then refuses.
_HEADERS_BYTES = 1024
_RETRY_PAUSE_S = 0.05
_CLOSING_TIMEOUT_S = 1.0

# The request as it should go to the next instance, given what has arrived already; or, where only the terminal dict
# was still to come, that dict.
Resume = Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, Any]]


class _InstanceFailed(Exception):
    """The instance went away before its stream was complete."""


@dataclass
class _LastChunk:
    """A terminal dict that no instance lived to send."""

    terminal: dict[str, Any]

    def data(self) -> dict[str, Any]:
        return self.terminal


class FailoverClient:
    """Calls instances in turn, and calls another one when one fails.

    resume: makes the request for what is left after some dicts were delivered; None means that a broken stream
    cannot go on.
    wait_s: how long a call waits for an instance, and for a first word of one, before it is `Unavailable`.
    """

    def __init__(
        self, client: Client, metrics: CallMetrics, *, resume: Resume | None = None, wait_s: float = 30.0
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._resume = resume
        self._wait_s = wait_s
        self._instances = InstancePool(client, wait_s=wait_s)

    async def generate(
        self,
        request: dict[str, Any],
        context: Context,
        *,
        among: Among | None = None,
        start_over: Callable[[], None] | None = None,
        path: RequestPath | None = None,
    ) -> AsyncGenerator[Any, None]:
        """The chunks of one answer, complete, from as many instances as it takes; none after `context` is stopped.

        Leaving the generator early stops the worker.

        among: which instances may answer (default: all of them), asked again at each attempt.
        start_over: called where the caller can forget what was delivered and take the answer from its beginning.
        path: where the calls are noted, if anybody asked for that; the instances are asked for theirs, too.

        Raises:
            Unavailable: no instance within `wait_s`. RequestTooLarge: NATS would not carry the request.
            BadUpstream: MAX_ATTEMPTS instances broke, or one broke midway and the answer cannot go on.
        """
        if path is not None:
            request = {**request, SHOW_PATH: True}
        delivered: list[dict[str, Any]] = []
        num_choices = request.get("n") or 1
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        for _ in range(MAX_ATTEMPTS):
            instance_id = await self._instances.next(context, among)
            if instance_id is None:
                return
            notes = path.calling(instance_id) if path is not None else None
            num_finished = num_empty = 0
            try:
                async with aclosing(self._call(request, instance_id, context)) as stream:
                    async for chunk in stream:
                        data = chunk.data()
                        if is_aborted(data):
                            raise _InstanceFailed("it gave the request up")
                        num_empty = 0 if is_saying_something(data) else num_empty + 1
                        if num_empty > MAX_EMPTY_CHUNKS:
                            raise BadUpstream(f"An instance of {self._client} says nothing, again and again.")
                        delivered.append(data)
                        if notes is not None:
                            notes.received(data)
                        yield chunk
                        num_finished += is_terminal(data)
                        if num_finished == num_choices or is_error(data):
                            await _read_to_the_end(stream)
                            return
                raise _InstanceFailed("its stream ended without a finish_reason")
            except _InstanceFailed as failure:
                if context.is_stopped():
                    return
                self._instances.rest(instance_id, failure)
                if notes is not None:
                    notes.broke()
            if delivered:
                deadline = loop.time() + self._wait_s
            elif loop.time() > deadline:
                raise Unavailable(f"No instance of {self._client} answers.")
            if delivered and start_over is not None:
                start_over()
            elif delivered:
                if self._resume is None:
                    raise BadUpstream(f"An instance of {self._client} broke in the middle of its answer.")
                request = self._resume(request, delivered)
                if is_terminal(request):
                    yield _LastChunk(request)
                    return
            (self._metrics.migrations if delivered else self._metrics.retries).inc()
            delivered = []
            await asyncio.sleep(_RETRY_PAUSE_S)
        raise BadUpstream(f"{MAX_ATTEMPTS} calls of {self._client} broke; giving up on this request.")

    async def _call(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncGenerator[Any, None]:
        try:
            with child_context(context) as call:
                starting = asyncio.ensure_future(self._client.direct(request, instance_id, context=call))

                def give_up() -> None:
                    call.stop_generating()
                    starting.cancel()  # it would wait 10 s for a sign of life

                with self._instances.unanswered(instance_id, give_up) as answered:
                    async for chunk in await _unless_given_up(starting):
                        answered()
                        yield chunk
        except Exception as error:
            if dynamo_releases.is_too_large(error, request):
                raise await _too_large(request) from error
            if dynamo_releases.is_raised_by_worker(error):
                raise BadUpstream(f"{self._client} failed on this request.") from error
            if dynamo_releases.is_nobody_there(error) and await _is_at_the_limit(request):
                raise await _too_large(request) from error
            self._instances.give_up_on(instance_id)
            raise _InstanceFailed(str(error)) from error


async def _unless_given_up(starting: "asyncio.Future[AsyncIterator[Any]]") -> AsyncIterator[Any]:
    try:
        return await starting
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # it is we who are cancelled
            raise
        raise _InstanceFailed("it failed on another request and has not answered this one") from None


def _size(request: dict[str, Any]) -> int:
    return len(msgspec.msgpack.encode(request))


async def _is_at_the_limit(request: dict[str, Any]) -> bool:
    return _size(request) > (await nats_max_payload() or sys.maxsize) - _HEADERS_BYTES


async def _too_large(request: dict[str, Any]) -> RequestTooLarge:
    limit = await nats_max_payload() or "less"
    return RequestTooLarge(f"The request takes {_size(request)} bytes on NATS, which carries {limit} (max_payload).")


async def _read_to_the_end(stream: AsyncGenerator[Any, None]) -> None:
    """Let a complete stream close by itself: breaking it off would look like a cancellation to the worker."""
    with suppress(TimeoutError, PipelineError, _InstanceFailed):
        async with asyncio.timeout(_CLOSING_TIMEOUT_S):
            async for _ in stream:
                pass
