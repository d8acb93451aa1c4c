"""A call that outlives the instance it started on.

A killed instance stays in etcd until its lease ends (10 s), so every other call would run into it. `FailoverClient`
remembers who just failed and asks somebody else; a stream that breaks midway goes on elsewhere with what is left to
do, if its caller says how (`resume`).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from common.errors import BadUpstream, PipelineError, RequestTooLarge, Unavailable
from common.runtime import Client, Context
from common.wire import is_aborted, is_error, is_terminal

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 8
# A failed instance rests for this long before anybody tries it again.
QUARANTINE_S = 3.0
_RETRY_PAUSE_S = 0.05
_POLL_S = 0.1
_CLOSING_TIMEOUT_S = 1.0

# The handler itself raised: it would raise again on another instance.
_WORKER_RAISED = ("BackendInvalidArgument", "BackendUnknown")

# The request as it should go to the next instance, given what has arrived already.
Resume = Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, Any] | None]

Among = Callable[[], Awaitable[set[int]]]


class _InstanceFailed(Exception):
    """The instance went away before its stream was complete."""


async def _read_to_the_end(stream: AsyncGenerator[Any, None]) -> None:
    """Let a complete stream close by itself: breaking it off would look like a cancellation to the worker."""
    with suppress(TimeoutError, PipelineError, _InstanceFailed):
        async with asyncio.timeout(_CLOSING_TIMEOUT_S):
            async for _ in stream:
                pass


class FailoverClient:
    """Calls instances in turn, and calls another one when one fails.

    resume: makes the request for what is left after some dicts were delivered; None in its place, or as its
    result, means that a broken stream cannot go on.
    wait_s: how long a call waits for an instance before it is `Unavailable`.
    """

    def __init__(self, client: Client, *, resume: Resume | None = None, wait_s: float = 30.0) -> None:
        self._client = client
        self._resume = resume
        self._wait_s = wait_s
        self._resting: dict[int, float] = {}
        self._turn = 0

    async def instance_ids(self) -> list[int]:
        """The instances that would be called now."""
        now = asyncio.get_running_loop().time()
        self._resting = {instance: until for instance, until in self._resting.items() if until > now}
        return [instance for instance in await self._client.instance_ids() if instance not in self._resting]

    async def generate(
        self,
        request: dict[str, Any],
        context: Context,
        *,
        among: Among | None = None,
        start_over: Callable[[], None] | None = None,
    ) -> AsyncGenerator[Any, None]:
        """The chunks of one answer, complete, from as many instances as it takes.

        among: which instances may answer (default: all of them), asked again at each attempt.
        start_over: called where the caller can forget what was delivered and take the answer from its beginning.

        Raises:
            Unavailable: no instance within `wait_s`. RequestTooLarge: NATS would not carry the request.
            BadUpstream: MAX_ATTEMPTS instances broke, or one broke midway and the answer cannot go on.
        """
        delivered: list[dict[str, Any]] = []
        num_choices = request.get("n") or 1
        for _ in range(MAX_ATTEMPTS):
            instance_id = await self._next_instance(context, among)
            num_finished = 0
            try:
                async with aclosing(self._call(request, instance_id, context)) as stream:
                    async for chunk in stream:
                        data = chunk.data()
                        if is_aborted(data):
                            raise _InstanceFailed("it gave the request up")
                        delivered.append(data)
                        yield chunk
                        num_finished += is_terminal(data)
                        if num_finished == num_choices or is_error(data):
                            await _read_to_the_end(stream)
                            return
                raise _InstanceFailed("its stream ended without a finish_reason")
            except _InstanceFailed as failure:
                if context.is_stopped():
                    return
                self._rest(instance_id, failure)
            if delivered and start_over is not None:
                start_over()
            elif delivered:
                remainder = self._resume(request, delivered) if self._resume else None
                if remainder is None:
                    raise BadUpstream(f"An instance of {self._client} broke in the middle of its answer.")
                request = remainder
            delivered = []
            await asyncio.sleep(_RETRY_PAUSE_S)
        raise BadUpstream(f"{MAX_ATTEMPTS} calls of {self._client} broke; giving up on this request.")

    async def _call(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncGenerator[Any, None]:
        try:
            async for chunk in await self._client.direct(request, instance_id, context=context):
                yield chunk
        except PipelineError:
            raise
        except Exception as error:  # the runtime has no exception types of its own on this side: see its text
            text = str(error)
            if "payload is too large" in text:
                raise RequestTooLarge(
                    "The request is larger than the message bus carries (NATS max_payload)."
                ) from error
            if text.startswith(_WORKER_RAISED):
                raise BadUpstream(f"{self._client} failed on this request.") from error
            raise _InstanceFailed(text) from error

    async def _next_instance(self, context: Context, among: Among | None) -> int:
        """Round robin over those that did not just fail.

        Raises:
            Unavailable: nobody came within `wait_s`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        is_announced = False
        while not (instances := await self._candidates(among)):
            if loop.time() >= deadline:
                raise Unavailable(f"No instance of {self._client} is available. Is it running?")
            if context.is_stopped():
                raise Unavailable("The request was cancelled while it waited.")
            if not is_announced:
                logger.warning("waiting for an instance of %s", self._client)
                is_announced = True
            await asyncio.sleep(_POLL_S)
        self._turn += 1
        return instances[self._turn % len(instances)]

    async def _candidates(self, among: Among | None) -> list[int]:
        if among is None:
            return await self.instance_ids()
        allowed = await among()
        return [instance for instance in await self.instance_ids() if instance in allowed]

    def _rest(self, instance_id: int, failure: Exception) -> None:
        logger.warning("instance %x of %s failed: %s", instance_id, self._client, failure)
        self._resting[instance_id] = asyncio.get_running_loop().time() + QUARANTINE_S
