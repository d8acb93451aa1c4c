"""Calls that survive the failure of an instance.

`FailoverClient` calls another instance when one fails. An answer that breaks midway goes on elsewhere with what is
left to do, if its chunks tell (`rest_of`), or from its beginning, if its caller can drop what it has (`on_restart`).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic

import msgspec

from common.dynamo import releases
from common.dynamo.instances import CallBroke, Directory, InstanceCall, InstanceFailed, Instances, NotDelivered
from common.dynamo.network import nats_max_payload
from common.dynamo.runtime import Client
from common.dynamo.service import RequestContext as RequestContext
from common.dynamo.service import when_given_up
from common.errors import Aborted, BadUpstream, Busy, DeadlineExceeded, RequestTooLarge, Unavailable
from common.observability.metrics import Metrics
from common.wire import C, RouteTrace, to_wire

MAX_BROKEN_CALLS = 8  # of one request: it may be what breaks them
MAX_EMPTY_CHUNKS = 10_000
MAX_GAP_S, CHUNKS_PER_SECOND = 0.05, 800
_RETRY_PAUSE_S = 0.05
_BUSY_PAUSE_S = 1.0
# Dynamo's own words around a request count for NATS, not for its client: it sends what NATS then refuses.
_HEADERS_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Chosen:
    """The instance that gets an attempt. route: how a router came to choose it, where one did."""

    instance_id: int
    route: RouteTrace | None = None


# Which of the eligible instances gets an attempt: `async with choose(request, instance_ids, context) as chosen`. The
# block lasts as long as the attempt.
Choose = Callable[[dict[str, Any], Sequence[int], RequestContext], AbstractAsyncContextManager[Chosen]]


class RoundRobin:
    """The instances in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def next(self, instance_ids: Sequence[int]) -> Chosen:
        self._turn += 1
        return Chosen(instance_ids[self._turn % len(instance_ids)])

    @asynccontextmanager
    async def __call__(
        self, _request: dict[str, Any], instance_ids: Sequence[int], _context: RequestContext
    ) -> AsyncIterator[Chosen]:
        yield self.next(instance_ids)


@dataclass(frozen=True)
class CallLimits:
    """wait_s: how long a call waits for an instance, and for a first word of one. answer_s: how long it may take."""

    wait_s: float = 30.0
    answer_s: float | None = None


DEFAULT_LIMITS = CallLimits()


class FailoverClient(Generic[C]):
    """A client of one endpoint.

    directory: which instances are eligible for a request. kind: of the chunks of their answers.
    """

    def __init__(
        self, client: Client, directory: Directory, kind: type[C], metrics: Metrics, limits: CallLimits = DEFAULT_LIMITS
    ) -> None:
        self._client, self._limits = client, limits
        self._kind: type[C] = kind
        self._metrics = metrics.calls_of(str(client), client.num_instances)
        self._instances = Instances(client, directory)
        self.choose: Choose = RoundRobin()

    async def generate(
        self,
        request: msgspec.Struct | dict[str, Any],
        *,
        context: RequestContext,
        on_restart: Callable[[], None] | None = None,
    ) -> AsyncGenerator[C, None]:
        """The chunks of one answer, complete, from as many instances as it takes; none after `context` is stopped.

        Leaving the stream early stops the worker. on_restart: called where the caller shall drop what it has got,
        because the answer begins anew.

        Raises, while the stream is read:
            Unavailable: no instance within `wait_s`, or all are busy. DeadlineExceeded: no end within `answer_s`.
            RequestTooLarge: NATS would not carry the request.
            BadUpstream: MAX_BROKEN_CALLS instances broke over it, or one broke midway and the answer cannot go on.
            PipelineError: what the worker answered.
        """
        wire = to_wire(request) if isinstance(request, msgspec.Struct) else request
        return self._answer(context.record.envelope.around(wire), context, on_restart)

    async def _answer(
        self, request: dict[str, Any], context: RequestContext, on_restart: Callable[[], None] | None
    ) -> AsyncGenerator[C, None]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.wait_s
        ends_at = None if self._limits.answer_s is None else loop.time() + self._limits.answer_s
        num_broken_calls, is_begun, busy = 0, False, set[int]()
        while num_broken_calls < MAX_BROKEN_CALLS:
            try:
                async with asyncio.timeout_at(ends_at):
                    eligible = await self._instances.eligible(request, context, deadline)
            except TimeoutError:
                raise self._too_late() from None
            if not eligible:
                return
            if busy.issuperset(eligible):
                raise Unavailable(f"All instances of {self._client} are busy.")
            delivered: list[C] = []
            try:
                async with self.choose(request, [each for each in eligible if each not in busy], context) as chosen:
                    if context.is_stopped():
                        return
                    instance_id = chosen.instance_id
                    record = context.record.calling(instance_id, chosen.route)
                    async with aclosing(self._attempt(request, instance_id, context, ends_at)) as chunks:
                        async for chunk in chunks:
                            record.received(chunk)
                            delivered.append(chunk)
                            yield chunk
                    return
            except Busy:
                record.broke()
                if context.is_stopped():
                    return
                if is_begun or delivered:  # what was delivered is worth waiting for the rest
                    await asyncio.sleep(_BUSY_PAUSE_S)
                else:
                    busy.add(instance_id)
            except InstanceFailed as failure:
                record.broke()
                if context.is_stopped():
                    return
                self._instances.quarantine(instance_id, failure)
                if not isinstance(failure, NotDelivered):  # until now it was being answered, and nobody waited for
                    num_broken_calls += 1
                    deadline = loop.time() + self._limits.wait_s
            if loop.time() > deadline:
                raise Unavailable(f"No instance of {self._client} answers.")
            is_begun = is_begun or bool(delivered)
            (self._metrics.migrations if delivered else self._metrics.retries).inc()
            if delivered and on_restart is not None:
                on_restart()
            elif delivered:
                rest = self._kind.rest_of(request, delivered)
                if rest is None:
                    raise BadUpstream(f"An instance of {self._client} broke in the middle of its answer.")
                if not isinstance(rest, dict):
                    yield rest
                    return
                request = rest
            await asyncio.sleep(_RETRY_PAUSE_S)
        raise BadUpstream(f"{MAX_BROKEN_CALLS} calls of {self._client} broke; giving up on this request.")

    async def _attempt(
        self, request: dict[str, Any], instance_id: int, context: RequestContext, ends_at: float | None
    ) -> AsyncGenerator[C, None]:
        """The chunks of one instance, until it has finished all choices. Lone tokens may come several at once.

        Raises:
            InstanceFailed: it has not. Busy: it refused the request.
        """
        num_unfinished, num_empty = request.get("n") or 1, 0
        held: C | None = None
        async with self._call(request, instance_id, context, ends_at) as call:
            while num_unfinished:
                try:
                    chunk = self._read(await call.next())
                except Exception:
                    if held is not None:  # it came before
                        yield held
                    raise
                num_empty = 0 if chunk.has_content or chunk.finish_reason else num_empty + 1
                if num_empty > MAX_EMPTY_CHUNKS:
                    raise BadUpstream(f"An instance of {self._client} sends nothing but empty chunks.")
                num_unfinished -= chunk.finish_reason is not None
                if held is not None:
                    held.add(chunk)
                held = held or chunk
                if chunk.may_wait and await self._waits_for_more(call, is_streamed=context.record.is_streamed):
                    continue
                call.pace.pass_on()
                yield held
                held = None

    async def _waits_for_more(self, call: InstanceCall, *, is_streamed: bool) -> bool:
        """Whether a token waits for the next one. All streams share a budget of chunks, as in `StreamPace`."""
        if not is_streamed:  # nobody minds when it comes
            return call.pace.is_passed_on_within(MAX_GAP_S)
        return await call.comes_within(min(MAX_GAP_S, self._instances.num_calls / CHUNKS_PER_SECOND))

    def _read(self, data: Any) -> C:
        try:
            return self._kind.read(data)
        except Aborted as aborted:
            raise InstanceFailed("it gave the request up") from aborted

    @asynccontextmanager
    async def _call(
        self, request: dict[str, Any], instance_id: int, context: RequestContext, ends_at: float | None
    ) -> AsyncIterator[InstanceCall]:
        """One call of one instance. What Dynamo raises meanwhile becomes InstanceFailed, or what it means."""
        loop = asyncio.get_running_loop()
        call = InstanceCall(releases.child_of(context.raw), self._client.generation)
        with when_given_up(context.raw, call.stop):
            timer = None if ends_at is None else loop.call_at(ends_at, lambda: call.end(self._too_late()))
            try:
                with self._instances.calling(instance_id, call):
                    await call.open(self._client.direct(request, instance_id, context=call.context))
                    yield call
            except CallBroke as broke:
                error = broke.__cause__
                assert isinstance(error, Exception)
                raise await self._meaning_of(error, request, instance_id, call) from error
            finally:
                if timer is not None:
                    timer.cancel()

    async def _meaning_of(
        self, error: Exception, request: dict[str, Any], instance_id: int, call: InstanceCall
    ) -> Exception:
        if releases.is_raised_by_worker(error):
            return BadUpstream(f"{self._client} failed on this request.")
        if too_large := await too_large_for_nats(request, error):
            return too_large
        self._instances.give_up_on(instance_id)
        releases.log_unknown(error)
        kind = NotDelivered if not call.is_delivered and releases.is_unanswered(error) else InstanceFailed
        return kind(str(error))

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"The answer took longer than {self._limits.answer_s:g} seconds.")


async def too_large_for_nats(request: dict[str, Any], error: Exception) -> RequestTooLarge | None:
    """What to tell the client where `error`, of a call, came of the request's size: no other instance would take it."""
    is_told = releases.is_too_large(error)
    if not is_told and not releases.is_unanswered(error):
        return None
    size, limit = releases.size_on_nats(request), await nats_max_payload()
    if not is_told and (limit is None or size <= limit - _HEADERS_BYTES):
        return None
    return RequestTooLarge(f"The request takes {size} bytes on NATS, which carries {limit or 'less'} (max_payload).")
