"""Races of `common.dynamo.failover` that real processes lose too rarely to be tested with them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

import pytest

from common.dynamo.failover import MAX_BROKEN_CALLS, FailoverClient
from common.dynamo.runtime import Client, Context
from common.errors import BadUpstream
from common.observability.metrics import Metrics
from common.wire import PROCESSOR_ANSWERS, ProcessorChunk
from tests.contexts import request_context


class AllOf:
    """A directory in which every instance is eligible."""

    ineligible_reason = ""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def eligible(self, request: dict[str, Any]) -> list[int]:
        return list(await self._client.instance_ids())


def failover_client(client: Any) -> FailoverClient[ProcessorChunk]:
    client.num_instances = lambda: 0
    return FailoverClient(cast("Client", client), AllOf(client), PROCESSOR_ANSWERS, Metrics("processor"))


class Chunk:
    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def data(self) -> dict[str, Any]:
        return self._data


class DyingInstance:
    """Instance 1 has taken "slow", and its first word is on the way when a call of "quick" finds nobody there."""

    generation = 1

    def __init__(self) -> None:
        self.is_slow_taken, self.is_dead = asyncio.Event(), asyncio.Event()

    async def instance_ids(self) -> list[int]:
        return [1, 2] if self.is_dead.is_set() else [1]

    async def direct(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncIterator[Chunk]:
        if instance_id == 2:
            return self._whole()
        if request["ask"] == "quick":
            self.is_dead.set()
            raise ConnectionError("nobody there")
        return self._first_word(context)

    async def _first_word(self, context: Context) -> AsyncGenerator[Chunk, None]:
        self.is_slow_taken.set()
        while not context.is_stopped():
            await asyncio.sleep(0.01)
        yield Chunk({"content": "from 1"})

    async def _whole(self) -> AsyncGenerator[Chunk, None]:
        yield Chunk({"content": "from 2"})
        yield Chunk({"finish_reason": "stop"})


class GoneButListed:
    """An instance that etcd still lists, as it does while etcd itself is away, until another one comes."""

    generation = 1

    def __init__(self) -> None:
        self.num_calls = 0

    async def instance_ids(self) -> list[int]:
        return [1] if self.num_calls < MAX_BROKEN_CALLS + 2 else [2]

    async def direct(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncIterator[Chunk]:
        self.num_calls += 1
        if instance_id == 1:
            raise ConnectionError(self.words)
        return self._whole()

    words = "CannotConnect: NATS request to inference_engine.generate-1 failed"

    async def _whole(self) -> AsyncGenerator[Chunk, None]:
        yield Chunk({"finish_reason": "stop"})


class Breaking(GoneButListed):
    """One that takes requests, and breaks each time."""

    words = "Disconnected: Stream ended before generation completed"


@pytest.fixture
def short_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.dynamo.instances.QUARANTINE_S", 0.01)


def answer_of(client: GoneButListed) -> list[ProcessorChunk]:
    async def run() -> list[ProcessorChunk]:
        response_stream = await failover_client(client).generate({}, context=request_context())
        return [chunk.data() async for chunk in response_stream]

    return asyncio.run(run())


def test_calls_that_nobody_took_do_not_use_up_the_attempts(short_rest: None) -> None:
    assert answer_of(GoneButListed()) == [ProcessorChunk(finish_reason="stop")]


def test_a_request_that_breaks_every_instance_is_given_up(short_rest: None) -> None:
    with pytest.raises(BadUpstream, match=r"8 calls of .* broke"):
        answer_of(Breaking())


def test_nothing_is_delivered_of_a_call_that_was_given_up() -> None:
    """Its stream ends after that word, and where a word was delivered nobody else can begin anew."""

    async def run() -> list[list[str]]:
        dying = DyingInstance()
        client = failover_client(dying)

        async def ask(what: str) -> list[str]:
            response_stream = await client.generate({"ask": what}, context=request_context())
            return [chunk.data().content or "end" async for chunk in response_stream]

        slow = asyncio.create_task(ask("slow"))
        await dying.is_slow_taken.wait()
        return await asyncio.gather(slow, ask("quick"))

    assert asyncio.run(run()) == [["from 2", "end"]] * 2
