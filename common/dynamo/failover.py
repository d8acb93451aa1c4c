"""A call that outlives the instance it started on.

`FailoverClient` asks another instance when one fails. A stream that breaks midway goes on elsewhere with what is
left to do, if its caller says how (`resume`), or from its beginning, if its caller can forget (`start_over`).
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from common.dynamo import releases
from common.dynamo.cancellation import child_context
from common.dynamo.instance_call import InstanceCall, InstanceFailed, NotTaken
from common.dynamo.instance_pool import Among, InstancePool
from common.dynamo.payload_limit import too_large_for_nats
from common.dynamo.runtime import Client, Context
from common.errors import BadUpstream, PipelineError, Unavailable
from common.observability.metrics import CallMetrics
from common.observability.request_path import RequestPath
from common.wire import SHOW_PATH, is_aborted, is_error, is_saying_something, is_terminal

MAX_BROKEN_CALLS = 8  # of one request: it may be what breaks them
MAX_EMPTY_CHUNKS = 10_000
_RETRY_PAUSE_S = 0.05
_CLOSING_TIMEOUT_S = 1.0

# The request as it should go to the next instance, given what has arrived already; or, where only the terminal dict
# was still to come, that dict.
Resume = Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, Any]]


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
    among: which instances may be called at all (default: all of them). misfit: what is wrong with the others.
    """

    def __init__(
        self,
        client: Client,
        metrics: CallMetrics,
        *,
        resume: Resume | None = None,
        wait_s: float = 30.0,
        among: Among | None = None,
        misfit: str = "",
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._resume = resume
        self._wait_s = wait_s
        self._among = among
        self._instances = InstancePool(client, misfit=misfit)

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

        among: which instances may answer (default: those of the client), asked again at each attempt.
        start_over: called where the caller can forget what was delivered and take the answer from its beginning.
        path: where the calls are noted, if anybody asked for that; the instances are asked for theirs, too.

        Raises:
            Unavailable: no instance within `wait_s`. RequestTooLarge: NATS would not carry the request.
            BadUpstream: MAX_BROKEN_CALLS instances broke over it, or one broke midway and the answer cannot go on.
        """
        if path is not None:
            request = {**request, SHOW_PATH: True}
        delivered: list[dict[str, Any]] = []
        num_choices = request.get("n") or 1
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        num_broken_calls = 0
        while num_broken_calls < MAX_BROKEN_CALLS:
            instance_id = await self._instances.next(context, among or self._among, deadline)
            if instance_id is None:
                return
            notes = path.calling(instance_id) if path is not None else None
            num_finished = num_empty = 0
            try:
                async with aclosing(self._call(request, instance_id, context)) as stream:
                    async for chunk in stream:
                        data = chunk.data()
                        if is_aborted(data):
                            raise InstanceFailed("it gave the request up")
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
                raise InstanceFailed("its stream ended without a finish_reason")
            except InstanceFailed as failure:
                if context.is_stopped():
                    return
                self._instances.quarantine(instance_id, failure)
                if not isinstance(failure, NotTaken):  # until now it was being answered, and nobody waited for
                    num_broken_calls += 1
                    deadline = loop.time() + self._wait_s
                if notes is not None:
                    notes.broke()
            if loop.time() > deadline:
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
        raise BadUpstream(f"{MAX_BROKEN_CALLS} calls of {self._client} broke; giving up on this request.")

    async def _call(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncGenerator[Any, None]:
        try:
            with child_context(context) as call_context:
                call = InstanceCall(call_context, self._client.generation)
                with self._instances.calling(instance_id, call):
                    stream = await call.wait_for(self._client.direct(request, instance_id, context=call_context))
                    call.is_taken = True
                    while True:
                        try:
                            chunk = await call.wait_for(anext(stream))
                        except StopAsyncIteration:
                            return
                        call.heard_at = asyncio.get_running_loop().time()
                        yield chunk
        except InstanceFailed:
            raise
        except Exception as error:
            if releases.is_raised_by_worker(error):
                raise BadUpstream(f"{self._client} failed on this request.") from error
            if too_large := await too_large_for_nats(request, error):
                raise too_large from error
            self._instances.give_up_on(instance_id)
            kind = NotTaken if releases.is_unanswered(error) else InstanceFailed
            raise kind(str(error)) from error


async def _read_to_the_end(stream: AsyncGenerator[Any, None]) -> None:
    """Let a complete stream close by itself: breaking it off would look like a cancellation to the worker."""
    with suppress(TimeoutError, PipelineError, InstanceFailed):
        async with asyncio.timeout(_CLOSING_TIMEOUT_S):
            async for _ in stream:
                pass
