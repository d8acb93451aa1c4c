"""`CallLimits.answer_s`: how long an answer may take."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from common.dynamo.failover import CallLimits
from common.dynamo.runtime import Context
from common.errors import BadUpstream, DeadlineExceeded
from common.wire import ProcessorChunk
from tests.contexts import request_context
from tests.test_failover import failover_client

Item = dict[str, Any]
WORD, END = {"content": "word"}, {"finish_reason": "stop"}


class Pausing:
    """One instance, whose dicts come after some seconds each."""

    generation = 1

    def __init__(self, *items: tuple[float, Item]) -> None:
        self._items = items

    async def instance_ids(self) -> list[int]:
        return [1]

    async def direct(self, request: Item, instance_id: int, context: Context) -> AsyncIterator[Item]:
        return self._stream()

    async def _stream(self) -> AsyncGenerator[Item, None]:
        for pause_s, item in self._items:
            await asyncio.sleep(pause_s)
            yield item


def read(answer_s: float, instances: Any) -> str:
    """The text of an answer, and a mark where it was given up."""

    async def run() -> str:
        client = failover_client(instances, ProcessorChunk, CallLimits(answer_s=answer_s))
        text = ""
        try:
            async for chunk in await client.generate({}, context=request_context()):
                text += chunk.data().content
        except DeadlineExceeded:
            text += " (late)"
        return text

    return asyncio.run(run())


def test_a_stream_in_time_is_passed_on_whole() -> None:
    assert read(10, Pausing((0, WORD), (0, WORD), (0, END))) == "wordword"


def test_a_stream_that_stalls_is_given_up_at_the_deadline() -> None:
    assert read(0.5, Pausing((0, WORD), (0, WORD), (60, END))) == "wordword (late)"


def test_a_stream_that_goes_on_indefinitely_is_given_up_at_the_deadline() -> None:
    text = read(0.5, Pausing(*[(0.001, WORD)] * 60_000))
    assert text.startswith("word")
    assert text.endswith(" (late)")


def test_nobody_waits_for_an_instance_longer_than_that() -> None:
    class Nobody(Pausing):
        async def instance_ids(self) -> list[int]:
            return []

    assert read(0.1, Nobody()) == " (late)"


def test_an_error_of_the_stream_is_passed_on() -> None:
    with pytest.raises(BadUpstream, match="not part of the protocol"):
        read(10, Pausing((0, WORD), (0, {"content": 7})))
