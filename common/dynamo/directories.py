"""What each instance of an endpoint says of itself, so which of them are eligible for a request, and who calls those.

Each instance is asked `{"describe": true}` when it appears in etcd, until it has answered.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from common.dynamo import releases
from common.dynamo.failover import CallLimits, FailoverClient
from common.dynamo.runtime import Client
from common.errors import InvalidRequest, ModelNotFound
from common.observability.metrics import Metrics
from common.openai.request import ChatCompletionRequest
from common.sampling import ContextLimits
from common.wire import (
    DESCRIBE,
    EngineChunk,
    EngineDescription,
    ProcessorChunk,
    ProcessorDescription,
    is_constrained,
)

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
    """The answers to `{"describe": true}`, each a `kind`; None of an instance that does not know the question.

    on_described: called with each instance's first answer.
    """

    def __init__(
        self, client: Client, kind: type[T], on_described: Callable[[int, T], None] = lambda _id, _answer: None
    ) -> None:
        self._client, self._kind, self._on_described = client, kind, on_described
        self._known: dict[int, T | None] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._patient_until = 0.0

    async def current(self) -> dict[int, T | None]:
        """By instance; one that has not answered yet is missing."""
        instance_ids = set(await self._client.instance_ids())
        if self._known.keys() != instance_ids:
            await self._update(instance_ids)
        return self._known

    @property
    def are_asked(self) -> bool:
        """Whether one has not answered yet."""
        return bool(self._asking)

    async def asked_again(self, is_outdated: Callable[[T], bool] = lambda _: True) -> dict[int, T | None]:
        """By instance, as it says now; one that does not answer in time, as it said before."""
        known = (await self.current()).items()
        outdated = [each for each, description in known if description is not None and is_outdated(description)]
        await asyncio.gather(*map(self._ask_again, outdated))
        return self._known

    async def _ask_again(self, instance_id: int) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await self._answer(instance_id)
            if instance_id in self._known:  # it may have left meanwhile
                self._known[instance_id] = answer

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
                    description = await self._answer(instance_id)
                break
            except Exception as error:  # it is just starting, or going away, or busy, or it hangs
                if attempt == _NUM_SILENT_ATTEMPTS:
                    logger.warning(
                        "%x of %s gets no requests until it has said what it is: %r", instance_id, self._client, error
                    )
            await asyncio.sleep(_PAUSE_S)
        del self._asking[instance_id]
        self._known[instance_id] = description
        if description is not None:
            self._on_described(instance_id, description)

    async def _answer(self, instance_id: int) -> T | None:
        try:
            return msgspec.convert(await self._client.ask(DESCRIBE, instance_id), self._kind)
        except Exception as error:
            is_unknown_question = isinstance(error, StopAsyncIteration | msgspec.ValidationError)
            if not is_unknown_question and not releases.is_raised_by_worker(error):
                raise
            logger.warning("%x of %s does not describe itself: %s", instance_id, self._client, error)
            return None


class ModelDirectory:
    """The processors, by the models that they serve. One that cannot tell is believed to serve any."""

    ineligible_reason = "Those that run serve other models."

    def __init__(self, client: Client) -> None:
        self._processors = Descriptions(client, ProcessorDescription)

    async def models(self) -> dict[str, ProcessorDescription]:
        """The names that clients may use, each with what all its processors together say of it now."""
        found: dict[str, ProcessorDescription] = {}
        for description in (await self._processors.asked_again()).values():
            if description is None:
                continue
            for name in description.models:
                found[name] = description.together_with(found[name]) if name in found else description
        return dict(sorted(found.items()))

    async def instances(self) -> dict[int, list[str]]:
        """The processors, each with the names that it answers to; none where it does not tell."""
        return {
            instance_id: description.models if description else []
            for instance_id, description in (await self._processors.current()).items()
        }

    async def check(self, model: str) -> None:
        """Raises:
        ModelNotFound: there are processors, each has said what it serves, and none serves `model`.
        """
        if (
            not await self.eligible({"model": model})
            and await self._processors.current()
            and not self._processors.are_asked
        ):
            raise ModelNotFound(f"The model '{model}' does not exist.", param="model")

    async def eligible(self, request: dict[str, Any]) -> list[int]:
        return [
            instance_id
            for instance_id, description in (await self._processors.current()).items()
            if description is None or request["model"] in description.models
        ]


class ProcessorClient(FailoverClient[ProcessorChunk]):
    """Calls processors that serve the model. An answer begins anew with another one, where its caller can do that."""

    def __init__(self, client: Client, metrics: Metrics, limits: CallLimits) -> None:
        self.directory = ModelDirectory(client)
        super().__init__(client, self.directory, ProcessorChunk, metrics, limits)


class EngineDirectory:
    """The engines. Eligible are those whose token ids mean what ours mean; one that cannot tell is accepted unchecked.

    ours: the processor's model, described as its engine would. A tokenizer_sha256 of "" is not known.
    """

    def __init__(self, client: Client, ours: EngineDescription) -> None:
        self._engines = Descriptions(client, EngineDescription, self._tell)
        self._ours = ours
        self.ineligible_reason = f"Those that run have another tokenizer than {ours.model}, or have not said which."

    async def _compatible(self) -> dict[int, EngineDescription | None]:
        engines = (await self._engines.current()).items()
        return {each: engine for each, engine in engines if engine is None or has_same_tokenizer(engine, self._ours)}

    async def limits(self) -> ContextLimits:
        """What fits into our model's context and into each of its engines."""
        engines = (await self._compatible()).values()
        return ContextLimits.of([self._ours, *(engine for engine in engines if engine is not None)])

    async def check(self, request: ChatCompletionRequest) -> None:
        """Raises:
        InvalidRequest: it needs a grammar, and the engines have none: each has said what it is.
        """
        if request.answer_schema is None:
            return
        engines = (await self._compatible()).values()
        if engines and not any(map(_can_constrain, engines)) and not self._engines.are_asked:
            param = request.answer_schema_param.partition(".")[0]
            raise InvalidRequest(f"Invalid value for {param}: no engine of this model has grammars.", param=param)

    async def eligible(self, request: dict[str, Any]) -> list[int]:
        engines = await self._compatible()
        if is_constrained(request):
            return [each for each, engine in engines.items() if _can_constrain(engine)]
        return list(engines)

    def _tell(self, instance_id: int, engine: EngineDescription) -> None:
        if has_same_tokenizer(engine, self._ours):
            logger.info("engine %x runs %s, %d tokens of context", instance_id, engine.model, engine.context_length)
        else:
            logger.error(
                "engine %x gets no requests: it runs %s, and the tokenizer of %s is another one. Give processor.py the "
                "engine's model (--model), or the engine this one (--model-path).",
                instance_id, engine.model, self._ours.model,
            )  # fmt: skip


def _can_constrain(engine: EngineDescription | None) -> bool:
    return engine is not None and engine.can_constrain


class EngineClient(FailoverClient[EngineChunk]):
    """Calls engines that take our token ids. An answer goes on with another engine where the first one broke.

    ours: the caller's model, described as its engine would. wait_s: see `CallLimits`.
    """

    def __init__(self, client: Client, ours: EngineDescription, metrics: Metrics, wait_s: float) -> None:
        self.directory = EngineDirectory(client, ours)
        super().__init__(client, self.directory, EngineChunk, metrics, CallLimits(wait_s))


def has_same_tokenizer(engine: EngineDescription, ours: EngineDescription) -> bool:
    """By the tokenizers' hashes; by the size of the models' vocabularies where one of the hashes is not known."""
    if engine.tokenizer_sha256 and ours.tokenizer_sha256:
        return engine.tokenizer_sha256 == ours.tokenizer_sha256
    return engine.vocab_size == ours.vocab_size
