"""Which instance to call next: round robin over those that did not just fail.

A killed instance stays in etcd until its lease ends (10 s), so etcd alone would send every other call to it.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from common.dynamo.instance_call import InstanceCall
from common.dynamo.runtime import DRAIN_TIMEOUT_S, Client, Context
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

Among = Callable[[], Awaitable[set[int]]]


class InstancePool:
    """The instances of one endpoint, as this process has found them to be.

    misfit: what is wrong with those that a call may not use, for its error message.
    """

    def __init__(self, client: Client, *, misfit: str = "") -> None:
        self._client = client
        self._misfit = misfit
        self._quarantined: dict[int, float] = {}
        self._calls: defaultdict[int, set[InstanceCall]] = defaultdict(set)
        self._watching: asyncio.Task[None] | None = None
        self._turn = 0

    async def next(self, context: Context, among: Among | None, deadline: float) -> int | None:
        """The instance to call; None when the caller gave up waiting for one.

        deadline: in the loop's time.

        Raises:
            Unavailable: nobody came until then.
        """
        loop = asyncio.get_running_loop()
        is_announced = False
        while not (instances := await self._candidates(among)):
            if loop.time() >= deadline:
                raise Unavailable(f"No instance of {self._client} is available. {await self._why_none(among)}")
            if context.is_stopped():
                return None
            if not is_announced:
                logger.warning("waiting for an instance of %s", self._client)
                is_announced = True
            await asyncio.sleep(_POLL_S)
        self._turn += 1
        return instances[self._turn % len(instances)]

    async def _why_none(self, among: Among | None) -> str:
        there = set(await self._client.instance_ids())
        is_misfit = there and among is not None and there.isdisjoint(await among())
        return self._misfit if is_misfit and self._misfit else "Is it running?"

    async def _candidates(self, among: Among | None) -> list[int]:
        now = asyncio.get_running_loop().time()
        instances = await self._client.instance_ids()
        if self._quarantined:
            self._quarantined = {instance: until for instance, until in self._quarantined.items() if until > now}
            instances = [instance for instance in instances if instance not in self._quarantined]
        if among is not None:
            allowed = await among()
            instances = [instance for instance in instances if instance in allowed]
        return instances

    def quarantine(self, instance_id: int, failure: Exception) -> None:
        """Leave an instance alone for a while, after a call of it failed."""
        logger.warning("instance %x of %s failed: %s", instance_id, self._client, failure)
        self._quarantined[instance_id] = asyncio.get_running_loop().time() + QUARANTINE_S

    @contextmanager
    def calling(self, instance_id: int, call: InstanceCall) -> Iterator[None]:
        """For as long as `call` runs: it is given up when the instance turns out to be dead."""
        calls = self._calls[instance_id]
        calls.add(call)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
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
