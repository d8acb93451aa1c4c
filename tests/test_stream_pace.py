"""How many tokens an item of a stream holds."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from common.sglang.pacing import (
    ITEMS_PER_SECOND,
    MAX_GAP_S,
    MAX_ITEMS_PER_SECOND,
    MAX_TOKENS_PER_ITEM,
    STREAMS_PER_TOKEN,
    Output,
    StreamPace,
)


def output(num_tokens: int, *, is_last: bool = False) -> Output:
    return {
        "output_ids": list(range(num_tokens)),
        "meta_info": {"finish_reason": {"type": "stop"} if is_last else None},
    }


async def spoken(num_tokens: int, seconds_per_token: float) -> AsyncIterator[Output]:
    for number in range(1, num_tokens + 1):
        yield output(number, is_last=number == num_tokens)
        await asyncio.sleep(seconds_per_token)


def pace_of(num_streams: int, seconds_per_token: float, *, num_tokens: int = 30) -> StreamPace:
    """A pace that has seen a stream of that speed, with so many others running."""
    pace = StreamPace()

    async def listen() -> None:
        async for _ in pace.paced(spoken(num_tokens, seconds_per_token)):
            pass

    asyncio.run(listen())
    pace.num_streams = num_streams
    return pace


def test_nothing_is_known_at_first_and_every_token_is_an_item() -> None:
    assert StreamPace().tokens_per_item() == 1


def test_one_stream_gets_every_token_as_it_is_made() -> None:
    assert pace_of(1, 0.005).tokens_per_item() == 1


@pytest.mark.parametrize(("num_streams", "gap_s"), [(8, 8 / ITEMS_PER_SECOND), (40, MAX_GAP_S), (170, MAX_GAP_S)])
def test_many_streams_share_the_items_but_none_waits_longer_than_the_gap(num_streams: int, gap_s: float) -> None:
    pace = pace_of(num_streams, 0.005)
    assert gap_s <= pace.tokens_per_item() * pace.seconds_per_token < gap_s + pace.seconds_per_token


def test_more_streams_than_can_be_carried_at_that_gap_wait_longer() -> None:
    assert pace_of(500, 0.005).gap_s == 500 / MAX_ITEMS_PER_SECOND


@pytest.mark.parametrize("num_streams", [200, 256, 512])
def test_an_overload_does_not_last(num_streams: int) -> None:
    """Where items limit the tokens, each round's speed asks for larger items than it had, until the model limits."""
    carried_per_s, models_seconds_per_token = 5000, 0.004
    tokens_per_item = 1
    for _ in range(20):
        slowed = num_streams / (carried_per_s * tokens_per_item)
        pace = StreamPace()
        pace.num_streams = num_streams
        pace._measure(max(models_seconds_per_token, slowed) * 1000, 1000)
        tokens_per_item = pace.tokens_per_item()
    assert pace.seconds_per_token == pytest.approx(models_seconds_per_token)


def test_tokens_slower_than_the_gap_still_share_an_item_where_there_are_many_streams() -> None:
    pace = pace_of(256, 0.08, num_tokens=5)
    assert pace.seconds_per_token > pace.gap_s
    assert pace.tokens_per_item() == 256 / STREAMS_PER_TOKEN


def test_an_item_has_a_largest_size() -> None:
    assert pace_of(10**6, 0.005).tokens_per_item() == MAX_TOKENS_PER_ITEM


def test_a_stream_that_is_left_is_not_counted_any_more() -> None:
    pace = StreamPace()

    async def leave() -> int:
        stream = pace.paced(spoken(5, 0.001))
        await anext(stream)
        num_streams = pace.num_streams
        await stream.aclose()
        return num_streams

    assert asyncio.run(leave()) == 1
    assert pace.num_streams == 0
