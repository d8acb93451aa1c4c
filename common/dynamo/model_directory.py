"""Which models can be asked for: what the processors say they serve."""

from common.dynamo.descriptions import Descriptions
from common.dynamo.runtime import Client
from common.wire import ProcessorDescription


class ModelDirectory:
    """The processors, by what they serve. One that cannot tell is believed to serve anything."""

    def __init__(self, client: Client) -> None:
        self._processors = Descriptions(client, ProcessorDescription)

    async def models(self) -> dict[str, int]:
        """The names that clients may use, each with the Unix time since when."""
        found: dict[str, int] = {}
        for description in (await self._processors.current()).values():
            if description is None:
                continue
            for name in description.models:
                found[name] = min(description.created, found.get(name, description.created))
        return dict(sorted(found.items()))

    async def instances(self) -> dict[int, list[str]]:
        """The processors, each with the names that it answers to; none where it does not tell."""
        return {
            instance_id: description.models if description else []
            for instance_id, description in (await self._processors.current()).items()
        }

    async def knows_all(self) -> bool:
        """Whether there is a processor, and each of them has said what it serves."""
        return await self._processors.are_complete()

    async def instances_for(self, model: str) -> set[int]:
        """The processors that may serve `model`."""
        return {
            instance_id
            for instance_id, description in (await self._processors.current()).items()
            if description is None or model in description.models
        }
