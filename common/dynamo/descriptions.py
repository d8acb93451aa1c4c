"""What each instance of an endpoint says of itself: asked when it appears in etcd, until it has answered."""

import asyncio
import itertools
import logging
from typing import Generic, TypeVar

import msgspec

from common.dynamo import releases
from common.dynamo.runtime import Client, Context
from common.wire import DESCRIBE

logger = logging.getLogger(__name__)

T = TypeVar("T")

# For the first answer; twice as long each time, so that one that is always slow is understood, too.
_TIMEOUT_S = 2.0
_MAX_TIMEOUT_S = 32.0
_NUM_SILENT_ATTEMPTS = 2
_PAUSE_S = 1.0
# How long a request waits for those who have just appeared; afterwards it makes do with the others.
_PATIENCE_S = 0.5


class Descriptions(Generic[T]):
    """The answers to `{"describe": true}`, each a `kind`; None of an instance that does not know the question."""

    def __init__(self, client: Client, kind: type[T]) -> None:
        self._client, self._kind = client, kind
        self._known: dict[int, T | None] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._patient_until = 0.0

    async def current(self) -> dict[int, T | None]:
        """By instance; one that has not answered yet is missing."""
        instance_ids = await self._client.instance_ids()
        if self._known.keys() != set(instance_ids):
            await self._update(set(instance_ids))
        return self._known

    async def are_complete(self) -> bool:
        """Whether there is an instance, and each has said what it is."""
        known = await self.current()
        return bool(known) and not self._asking and all(description is not None for description in known.values())

    async def _update(self, instance_ids: set[int]) -> None:
        for instance_id in self._known.keys() - instance_ids:
            del self._known[instance_id]
        for instance_id in self._asking.keys() - instance_ids:
            self._asking.pop(instance_id).cancel()
        now = asyncio.get_running_loop().time()
        for instance_id in instance_ids - self._known.keys() - self._asking.keys():
            self._asking[instance_id] = asyncio.create_task(self._ask(instance_id))
            self._patient_until = now + _PATIENCE_S
        if self._asking and now < self._patient_until:
            await asyncio.wait(self._asking.values(), timeout=self._patient_until - now)

    async def _ask(self, instance_id: int) -> None:
        """Until it has said what it is, or that it does not know the question; `_update` ends it for one that left."""
        for attempt in itertools.count():
            try:
                async with asyncio.timeout(min(_TIMEOUT_S * 2**attempt, _MAX_TIMEOUT_S)):
                    self._known[instance_id] = await self._answer(instance_id)
                break
            except Exception as error:  # it is just starting, or going away, or busy, or it hangs
                if attempt == _NUM_SILENT_ATTEMPTS:
                    logger.warning(
                        "%x of %s gets no requests until it has said what it is: %r", instance_id, self._client, error
                    )
            await asyncio.sleep(_PAUSE_S)
        del self._asking[instance_id]

    async def _answer(self, instance_id: int) -> T | None:
        try:
            async for chunk in await self._client.direct(DESCRIBE, instance_id, context=Context()):
                return msgspec.convert(chunk.data(), self._kind)
        except Exception as error:
            if not isinstance(error, msgspec.ValidationError) and not releases.is_raised_by_worker(error):
                raise
            logger.warning("%x of %s does not describe itself: %s", instance_id, self._client, error)
        return None
