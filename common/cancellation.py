"""Cancellation that crosses processes: whoever stops waiting for an answer stops whoever makes it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from common.runtime import Context


@contextmanager
def when_stopped(context: Context, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` at once when the caller gives up, as long as the block lasts."""
    watcher = asyncio.ensure_future(context.async_killed_or_stopped())
    watcher.add_done_callback(lambda done: None if done.cancelled() else action())
    try:
        yield
    finally:
        watcher.cancel()


@asynccontextmanager
async def child_context(parent: Context) -> AsyncIterator[Context]:
    """A context for a call made on behalf of `parent`: stopped with it, and in any case when the block ends.

    So an engine is told to stop when the client goes away, when a stop string was found, and when we fail.
    """
    child = Context()
    with when_stopped(parent, child.stop_generating):
        try:
            yield child
        finally:
            child.stop_generating()
