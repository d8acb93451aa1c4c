"""Giving up on a stream in time, whatever the one who makes it does."""

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

T = TypeVar("T")


async def before(deadline: float, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items of `stream`, waited for until the event loop's time is `deadline`.

    Raises:
        TimeoutError: the stream had not ended by then.
    """
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                item = await anext(stream)
        except StopAsyncIteration:
            return
        yield item
