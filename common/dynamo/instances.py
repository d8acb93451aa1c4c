"""The instances of one endpoint: which may be called now, and which calls of them must be given up.

A killed instance stays in etcd until its lease ends (10 s), so etcd alone would send every other call to it.
"""

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from common.dynamo.runtime import Client, Context
from common.dynamo.service import RequestContext
from common.environment import DRAIN_TIMEOUT_S
from common.errors import Unavailable

logger = logging.getLogger(__name__)

# A failed instance rests for this long before anybody tries it again.
QUARANTINE_S = 3.0
_POLL_S = 0.1
_LOOK_S = 1.0
# One that is asked to stop leaves etcd at once, and may take until then to finish what it is answering. It keeps its
# lease meanwhile; one that hangs or has vanished does not.
SILENCE_S = DRAIN_TIMEOUT_S + 5.0
SILENCE_WITHOUT_LEASE_S = 5.0
OPENING_S = 10.0  # as long as Dynamo waits for a connection

T = TypeVar("T")


class Directory(Protocol):
    """Knows which instances are eligible. ineligible_reason: what is wrong with the others, for an error message."""

    ineligible_reason: str

    async def eligible(self, request: dict[str, Any]) -> Collection[int]: ...


class InstanceFailed(Exception):
    """The instance went away before its stream was complete."""


class NotDelivered(InstanceFailed):
    """The instance was not there: the request has not reached it."""


class CallBroke(Exception):
    """Dynamo raised its cause."""


class Pace:
    """When the dicts of a stream are passed on: those that come within a gap may go together."""

    def __init__(self) -> None:
        self._passed_on_at = -math.inf
        self._due: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    def pass_on(self) -> None:
        """Note that what came so far is passed on."""
        self._passed_on_at = asyncio.get_running_loop().time()
        self.stop()

    def is_passed_on_within(self, seconds: float) -> bool:
        return asyncio.get_running_loop().time() < self._passed_on_at + seconds

    async def wait(self, coming: asyncio.Future[Any], gap_s: float) -> None:
        """Until `coming` is done, or `gap_s` after something was passed on.

        As `asyncio.wait` would, in a third of its time: one timer does for all dicts of such a gap.
        """
        loop = asyncio.get_running_loop()
        self._due = self._due or loop.call_at(self._passed_on_at + gap_s, self._on_due)
        self._waiter = loop.create_future()
        coming.add_done_callback(self._wake)
        await self._waiter

    def _on_due(self) -> None:
        self._due = None
        self._wake()

    def _wake(self, _coming: object = None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stop(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


class InstanceCall:
    """A stream that is being read.

    context: of this call alone. is_delivered: whether the instance has accepted the request; a non-streaming answer is
    then silent until its end. heard_at: when its last dict came, on the event loop's clock; None before the first.
    generation: of our connection. pace: of what is passed on of it.
    """

    def __init__(self, context: Context, generation: int) -> None:
        self.generation = generation
        self.is_delivered = False
        self.heard_at: float | None = None
        self.pace = Pace()
        self.context = context
        self._opening: asyncio.Future[AsyncIterator[Any]] | None = None
        self._stream: AsyncIterator[Any]
        self._next: asyncio.Future[Any] | None = None
        self._failure: Exception | None = None

    async def open(self, opening: Awaitable[AsyncIterator[Any]]) -> None:
        """Send the request. opening: the runtime's call, which gives its stream.

        Raises:
            CallBroke. InstanceFailed, or what `end` was given: the call was given up.
        """
        self._opening = asyncio.ensure_future(opening)
        self._stream = await self._result_of(asyncio.shield(self._opening))
        self.is_delivered = True

    def stop(self) -> None:
        """Tell the worker that nobody waits, once its stream is open: of an earlier stop not every Dynamo tells it, and
        it would finish a silent answer for nobody.
        """
        if self._opening is None or self._opening.done():
            self.context.stop_generating()
        else:
            self._opening.add_done_callback(lambda _: self.context.stop_generating())
            asyncio.get_running_loop().call_later(OPENING_S, self.context.stop_generating)

    async def next(self) -> Any:
        """The next dict.

        Raises:
            InstanceFailed: there is none. And what `open` raises.
        """
        data = await self._result_of(self._looking_ahead())
        self.heard_at = asyncio.get_running_loop().time()
        return data

    def _looking_ahead(self) -> asyncio.Future[Any]:
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._stream))
        return self._next

    async def comes_within(self, gap_s: float) -> bool:
        """Whether another dict comes less than `gap_s` after something was passed on; it is waited for."""
        if not self.pace.is_passed_on_within(gap_s):
            return False
        coming = self._looking_ahead()
        await self.pace.wait(coming, gap_s)
        return coming.done() and not coming.cancelled() and coming.exception() is None

    async def _result_of(self, future: asyncio.Future[T]) -> T:
        self._next = future
        if self._failure is not None:  # while nobody was waiting
            future.cancel()
        try:
            result = await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._failure is None or (task is not None and task.cancelling()):  # it is we who are cancelled
                raise
            raise self._failure from None
        except StopAsyncIteration:
            raise InstanceFailed("its stream ended without a finish_reason") from None
        except Exception as error:
            raise CallBroke from error
        if self._failure is not None:  # a first dict that was on its way; the others will not come
            raise self._failure
        self._next = None
        return result

    def give_up(self, reason: str) -> None:
        self.end(InstanceFailed(reason) if self.is_delivered else NotDelivered(reason))

    def end(self, failure: Exception) -> None:
        """End the waiting. Dynamo itself would go on: up to 10 s for a connection, indefinitely when there is one."""
        self._failure = failure
        self.stop()
        self.drop()

    def drop(self) -> None:
        """Read no further. What comes after a complete answer, its end, is read by Dynamo alone."""
        self.pace.stop()
        if self._next is not None and not self._next.cancel() and not self._next.cancelled():
            self._next.exception()  # seen by nobody else


class Instances:
    """The instances of one endpoint, as this process has found them to be."""

    def __init__(self, client: Client, directory: Directory) -> None:
        self._client, self._directory = client, directory
        self._quarantined: dict[int, float] = {}
        self._calls: defaultdict[int, set[InstanceCall]] = defaultdict(set)
        self._watching: asyncio.Task[None] | None = None
        self.num_calls = 0

    async def eligible(self, request: dict[str, Any], context: RequestContext, deadline: float) -> list[int]:
        """The instances that may be called, at least one; none when the caller gave up waiting for one.

        deadline: in the loop's time.

        Raises:
            Unavailable: nobody came until then.
        """
        loop = asyncio.get_running_loop()
        is_announced = False
        while not (instances := await self._eligible_now(request)):
            if loop.time() >= deadline:
                raise Unavailable(f"No instance of {self._client} is available. {await self._why_none(request)}")
            if context.is_stopped():
                return []
            if not is_announced:
                logger.warning("waiting for an instance of %s", self._client)
                is_announced = True
            await asyncio.sleep(_POLL_S)
        return instances

    async def _why_none(self, request: dict[str, Any]) -> str:
        present = set(await self._client.instance_ids())
        are_ineligible = present and present.isdisjoint(await self._directory.eligible(request))
        return (are_ineligible and self._directory.ineligible_reason) or "Is it running?"

    async def _eligible_now(self, request: dict[str, Any]) -> list[int]:
        now = asyncio.get_running_loop().time()
        self._quarantined = {instance: until for instance, until in self._quarantined.items() if until > now}
        return [each for each in await self._directory.eligible(request) if each not in self._quarantined]

    def quarantine(self, instance_id: int, failure: Exception) -> None:
        """Leave an instance alone for a while, after a call of it failed."""
        logger.warning("instance %x of %s failed: %s", instance_id, self._client, failure)
        self._quarantined[instance_id] = asyncio.get_running_loop().time() + QUARANTINE_S

    @contextmanager
    def calling(self, instance_id: int, call: InstanceCall) -> Iterator[None]:
        """For as long as `call` runs: it is given up when the instance turns out to be dead."""
        calls = self._calls[instance_id]
        calls.add(call)
        self.num_calls += 1
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            call.drop()
            self.num_calls -= 1
            calls.discard(call)
            if not calls and self._calls.get(instance_id) is calls:
                del self._calls[instance_id]

    def give_up_on(self, instance_id: int) -> None:
        """End the calls that it has not answered: it is probably dead, and they may go elsewhere."""
        for call in list(self._calls.get(instance_id, ())):
            if call.heard_at is None:
                call.give_up("it failed on another request and has not answered this one")

    async def _watch(self) -> None:
        """Give up calls of instances that have left etcd and fallen silent, as long as there are calls."""
        loop = asyncio.get_running_loop()
        gone_since: dict[int, float] = {}
        lost_since: dict[int, float] = {}
        while self._calls:
            await asyncio.sleep(_LOOK_S)
            try:
                present = set(await self._client.instance_ids())
            except Exception:  # etcd is away, and nothing is known
                continue
            now = loop.time()
            gone_since = {each: gone_since.get(each, now) for each in self._calls.keys() - present}
            for instance_id, since in gone_since.items():
                if instance_id not in lost_since and not await self._client.is_lease_known(instance_id):
                    lost_since[instance_id] = loop.time()
                for call in list(self._calls.get(instance_id, ())):
                    self._give_up_if_silent(call, since, lost_since.get(instance_id))
        self._watching = None

    def _give_up_if_silent(self, call: InstanceCall, gone_since: float, lost_since: float | None) -> None:
        since, limit_s, what = gone_since, SILENCE_S, "it left etcd"
        # A lease that ended together with ours, because etcd forgot everybody, tells nothing of the instance.
        if lost_since is not None and call.generation == self._client.generation:
            since, limit_s, what = lost_since, SILENCE_WITHOUT_LEASE_S, "its lease has ended"
        if asyncio.get_running_loop().time() - max(since, call.heard_at or since) > limit_s:
            call.give_up(f"{what} and it has said nothing for {limit_s:.0f} s")
