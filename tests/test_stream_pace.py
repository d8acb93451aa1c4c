"""How many tokens an item of a stream holds."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from common.sglang.output import Output
from common.sglang.stream_pace import MAX_GAP_S, MAX_TOKENS_PER_ITEM, STREAMS_PER_TOKEN, StreamPace


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


@pytest.mark.parametrize("num_streams", [200, 1000])
def test_many_streams_share_the_items_but_none_waits_longer_than_the_gap(num_streams: int) -> None:
    pace = pace_of(num_streams, 0.005)
    gap_s = pace.tokens_per_item() * pace.seconds_per_token
    assert MAX_GAP_S <= gap_s < MAX_GAP_S + max(1, num_streams / STREAMS_PER_TOKEN) * pace.seconds_per_token


def test_an_overloaded_engine_cannot_mistake_its_own_slowness_for_the_models() -> None:
    """Tokens that come slowly ask for small items, small items make tokens come slowly."""
    pace = pace_of(256, 0.06, num_tokens=5)
    assert pace.seconds_per_token > MAX_GAP_S
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
