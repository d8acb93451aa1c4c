"""Asking instances what they are, however long it takes them."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from common.dynamo.directories import Descriptions, EngineDirectory
from common.dynamo.runtime import Client
from common.wire import EngineDescription, to_wire

DESCRIPTION = EngineDescription("a model", context_length=100, vocab_size=10)
PLAIN = ValueError("a python exception was caught while processing: KeyError: 'token_ids'")
PATIENCE_S = 30


class Instance:
    """One that hangs, or fails, until it is told to answer."""

    def __init__(self, failure: Exception | None = None, delay_s: float = 0.0) -> None:
        self.failure, self.delay_s = failure, delay_s
        self.num_asked = 0
        self.is_answering = asyncio.Event()

    async def instance_ids(self) -> list[int]:
        return [1]

    async def ask(self, question: dict[str, Any], instance_id: int) -> dict[str, Any]:
        self.num_asked += 1
        if self.failure is not None and not self.is_answering.is_set():
            raise self.failure
        await self.is_answering.wait()
        await asyncio.sleep(self.delay_s)
        return to_wire(DESCRIPTION)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TIMEOUT_S", "_PAUSE_S", "_PATIENCE_S"):
        monkeypatch.setattr(f"common.dynamo.directories.{name}", 0.01)


def descriptions_of(instance: Instance) -> Descriptions[EngineDescription]:
    return Descriptions(cast("Client", instance), EngineDescription)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def first_known(descriptions: Descriptions[EngineDescription]) -> EngineDescription | None:
    async with asyncio.timeout(PATIENCE_S):
        while not (known := await descriptions.current()):
            await asyncio.sleep(0.001)
    return known[1]


@pytest.mark.parametrize("failure", [None, ConnectionError("nobody there")], ids=["hangs", "is unreachable"])
def test_one_that_answers_late_is_missing_until_then(failure: Exception | None) -> None:
    async def scenario() -> None:
        instance = Instance(failure)
        descriptions = descriptions_of(instance)
        assert await descriptions.current() == {}
        await until(lambda: instance.num_asked > 4)
        assert await descriptions.current() == {}
        instance.is_answering.set()
        assert await first_known(descriptions) == DESCRIPTION

    asyncio.run(scenario())


def test_one_that_is_always_slow_is_given_the_time_that_it_takes() -> None:
    async def scenario() -> None:
        instance = Instance(delay_s=0.1)
        instance.is_answering.set()
        assert await first_known(descriptions_of(instance)) == DESCRIPTION

    asyncio.run(scenario())


def test_one_that_does_not_know_the_question_is_known_as_such() -> None:
    async def scenario() -> None:
        instance = Instance(PLAIN)
        assert await first_known(descriptions_of(instance)) is None
        assert instance.num_asked == 1

    asyncio.run(scenario())


class Engines:
    """Engines of another model, which all say so."""

    def __init__(self) -> None:
        self.ids = [1]

    async def instance_ids(self) -> list[int]:
        return self.ids

    async def ask(self, question: dict[str, Any], instance_id: int) -> dict[str, Any]:
        return to_wire(DESCRIPTION)


def test_an_engine_of_another_model_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        engines = Engines()
        directory = EngineDirectory(cast("Client", engines), EngineDescription("ours", 100, vocab_size=20))
        for ids in ([1], [1, 2], [1]):
            engines.ids = ids
            assert await directory.eligible({}) == []
            async with asyncio.timeout(PATIENCE_S):
                while not all(f"engine {each} gets no requests" in caplog.text for each in ids):
                    assert await directory.eligible({}) == []
                    await asyncio.sleep(0.001)

    asyncio.run(scenario())
    assert caplog.text.count("engine 1 gets no requests") == 1
    assert caplog.text.count("engine 2 gets no requests") == 1
