"""Which models can be asked for: what the processors say they serve."""

import asyncio
import logging

import msgspec

from common.runtime import Client, Context
from common.wire import DESCRIBE, ProcessorDescription

logger = logging.getLogger(__name__)

_DESCRIBE_TIMEOUT_S = 2.0


class ModelDirectory:
    """Asks each processor once, when it appears. One that cannot tell is believed to serve anything."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._descriptions: dict[int, ProcessorDescription | None] = {}

    async def refresh(self) -> None:
        """Forget who left etcd, ask who is new."""
        instance_ids = await self._client.instance_ids()
        if self._descriptions.keys() == set(instance_ids):
            return
        new = [instance_id for instance_id in instance_ids if instance_id not in self._descriptions]
        answers = await asyncio.gather(*(self._describe(instance_id) for instance_id in new))
        self._descriptions |= dict(zip(new, answers, strict=True))
        for instance_id in self._descriptions.keys() - set(await self._client.instance_ids()):
            del self._descriptions[instance_id]

    async def _describe(self, instance_id: int) -> ProcessorDescription | None:
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                async for chunk in await self._client.direct(DESCRIBE, instance_id, context=Context()):
                    return msgspec.convert(chunk.data(), ProcessorDescription)
        except Exception as error:  # a processor of another make, or one that is just going away
            logger.warning("processor %x does not say which models it serves: %s", instance_id, error)
        return None

    async def models(self) -> dict[str, int]:
        """The names that clients may use, each with the Unix time since when."""
        await self.refresh()
        found: dict[str, int] = {}
        for description in self._descriptions.values():
            if description is None:
                continue
            for name in description.models:
                found[name] = min(description.created, found.get(name, description.created))
        return dict(sorted(found.items()))

    async def instances(self) -> dict[int, list[str]]:
        """All processors, each with the names that it answers to; none where it does not tell."""
        await self.refresh()
        return {
            instance_id: description.models if description else []
            for instance_id, description in self._descriptions.items()
        }

    async def knows_all(self) -> bool:
        """Whether there is a processor, and each of them has said what it serves."""
        await self.refresh()
        return bool(self._descriptions) and all(self._descriptions.values())

    async def instances_for(self, model: str) -> set[int]:
        """The processors that may serve `model`."""
        await self.refresh()
        return {
            instance_id
            for instance_id, description in self._descriptions.items()
            if description is None or model in description.models
        }
