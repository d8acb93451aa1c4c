import asyncio
from collections.abc import AsyncGenerator

import pytest

from common.dynamo.failover import within
from common.errors import DeadlineExceeded


async def stream(*pauses_s: float) -> AsyncGenerator[int, None]:
    for number, pause_s in enumerate(pauses_s):
        await asyncio.sleep(pause_s)
        yield number


async def read(deadline_s: float, *pauses_s: float) -> list[int]:
    items = []
    try:
        async for item in within(deadline_s, stream(*pauses_s)):
            items.append(item)
    except DeadlineExceeded:
        items.append(-1)
    return items


def test_a_stream_in_time_is_passed_on_whole() -> None:
    assert asyncio.run(read(10, 0, 0, 0)) == [0, 1, 2]


def test_a_stream_that_stalls_is_given_up_at_the_deadline() -> None:
    assert asyncio.run(read(0.05, 0, 0, 10)) == [0, 1, -1]


def test_a_stream_that_goes_on_indefinitely_is_given_up_at_the_deadline() -> None:
    assert asyncio.run(read(0.05, *[0.001] * 10_000))[-1] == -1


def test_an_error_of_the_stream_is_passed_on() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("its own")

    async def read_failing() -> None:
        async for _ in within(10, failing()):
            pass

    with pytest.raises(ValueError, match="its own"):
        asyncio.run(read_failing())
