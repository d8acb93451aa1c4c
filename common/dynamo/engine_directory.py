"""Which engines a processor may call: those whose model has the processor's tokenizer."""

import logging

from common.dynamo.descriptions import Descriptions
from common.dynamo.runtime import Client
from common.wire import EngineDescription

logger = logging.getLogger(__name__)


class EngineDirectory:
    """The engines, by whether their token ids mean what ours mean. One that cannot tell is taken as it is.

    ours: the processor's model, described as its engine would. A tokenizer_sha256 of "" is not known.
    """

    def __init__(self, client: Client, ours: EngineDescription) -> None:
        self._engines = Descriptions(client, EngineDescription)
        self._ours = ours
        self._fits: dict[int, bool] = {}
        self._context_length = ours.context_length

    async def context_length(self) -> int:
        """Tokens that prompt and answer share: the least of what our model has and what its engines were given."""
        await self._refresh()
        return self._context_length

    async def _refresh(self) -> None:
        known = await self._engines.current()
        if known.keys() == self._fits.keys():
            return
        self._fits = {
            instance_id: self._fits[instance_id] if instance_id in self._fits else self._judge(instance_id, description)
            for instance_id, description in known.items()
        }
        callable_engines = [known[instance_id] for instance_id, fits in self._fits.items() if fits]
        lengths = [engine.context_length for engine in callable_engines if engine is not None]
        self._context_length = min([self._ours.context_length, *lengths])

    async def fitting(self) -> set[int]:
        """The engines that may be called."""
        await self._refresh()
        return {instance_id for instance_id, fits in self._fits.items() if fits}

    def _judge(self, instance_id: int, engine: EngineDescription | None) -> bool:
        if engine is None:
            return True
        if has_same_tokenizer(engine, self._ours):
            logger.info("engine %x runs %s, %d tokens of context", instance_id, engine.model, engine.context_length)
            return True
        logger.error(
            "engine %x gets no requests: it runs %s, and the tokenizer of %s is another one. Give processor.py the "
            "engine's model (--model), or the engine this one (--model-path).",
            instance_id, engine.model, self._ours.model,
        )  # fmt: skip
        return False


def has_same_tokenizer(engine: EngineDescription, ours: EngineDescription) -> bool:
    """By the tokenizers' hashes; by the size of the models' vocabularies where one of the hashes is not known."""
    if engine.tokenizer_sha256 and ours.tokenizer_sha256:
        return engine.tokenizer_sha256 == ours.tokenizer_sha256
    return engine.vocab_size == ours.vocab_size
