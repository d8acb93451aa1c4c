"""Which instance to call next: round robin over those that did not just fail.

A killed instance stays in etcd until its lease ends (10 s), so etcd alone would send every other call to it.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from common.errors import Unavailable
from common.runtime import Client, Context

logger = logging.getLogger(__name__)

# A failed instance rests for this long before anybody tries it again.
QUARANTINE_S = 3.0
_POLL_S = 0.1

Among = Callable[[], Awaitable[set[int]]]


class InstancePool:
    """The instances of one endpoint, as this process has found them to be."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._quarantined: dict[int, float] = {}
        self._awaiting_first_chunk: defaultdict[int, set[Callable[[], None]]] = defaultdict(set)
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
                raise Unavailable(f"No instance of {self._client} is available. Is it running?")
            if context.is_stopped():
                return None
            if not is_announced:
                logger.warning("waiting for an instance of %s", self._client)
                is_announced = True
            await asyncio.sleep(_POLL_S)
        self._turn += 1
        return instances[self._turn % len(instances)]

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
    def awaiting_first_chunk(self, instance_id: int, give_up: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """A call of an instance that has not answered yet, and how to end it; the function given says that it has."""
        calls = self._awaiting_first_chunk[instance_id]
        calls.add(give_up)
        try:
            yield lambda: calls.discard(give_up)
        finally:
            calls.discard(give_up)
            if not calls and self._awaiting_first_chunk.get(instance_id) is calls:
                del self._awaiting_first_chunk[instance_id]

    def give_up_on(self, instance_id: int) -> None:
        """End the calls that it has not answered: it is probably dead, and they may go elsewhere."""
        for give_up in self._awaiting_first_chunk.pop(instance_id, ()):
            give_up()
