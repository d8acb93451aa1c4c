"""What goes along with a request: the record of it in this process, and whether anybody still waits for the answer.

Cancellation crosses processes: whoever stops waiting for an answer stops whoever makes it. Dynamo can wake a coroutine
when a context is stopped, but each such wait costs a task on its side and a hand-over of the interpreter lock, for
every request, though hardly any is ever cancelled. Looking at all contexts in turn, twenty times a second, costs next
to nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from common.dynamo.releases import Context
from common.observability.request_records import RequestRecord

logger = logging.getLogger(__name__)

POLL_S = 0.05


class _Watcher:
    """Looks at the contexts of all requests in flight, as long as there are any."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[Context, Callable[[], None]]] = {}
        self._keys = count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, context: Context, action: Callable[[], None]) -> int:
        key = next(self._keys)
        self._watched[key] = (context, action)
        loop = asyncio.get_running_loop()
        if self._timer is None or self._loop is not loop:  # the timer of a loop that has ended rings no more
            self._loop, self._timer = loop, loop.call_later(POLL_S, self._look)
        return key

    def remove(self, key: int) -> None:
        self._watched.pop(key, None)

    def _look(self) -> None:
        # A copy: asking Dynamo lets other threads run, and what they drop may add or remove.
        stopped = [(key, action) for key, (context, action) in self._watched.copy().items() if context.is_stopped()]
        for key, action in stopped:
            self.remove(key)
            try:
                action()
            except Exception:  # one action's bug is not the others'
                logger.exception("could not stop what a caller gave up")
        self._timer = asyncio.get_running_loop().call_later(POLL_S, self._look) if self._watched else None


_watcher = _Watcher()


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a handler gets beside the request, and passes on to the calls that it makes for it.

    raw: Dynamo's own context, which is stopped when the caller gives up. record: of the request, in this process.
    """

    raw: Context
    record: RequestRecord

    def is_stopped(self) -> bool:
        return bool(self.raw.is_stopped())

    async def stopped(self) -> None:
        """Return when the caller has given up, or has all that it wanted."""
        is_stopped = asyncio.Event()
        with when_stopped(self.raw, is_stopped.set):
            await is_stopped.wait()


@contextmanager
def when_stopped(context: Context, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` within POLL_S after the caller gave up, as long as the block lasts."""
    key = _watcher.add(context, action)
    try:
        yield
    finally:
        _watcher.remove(key)


@contextmanager
def when_given_up(context: Context, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` when the caller gave up, and when the block is left early.

    So an engine is told to stop when the client goes away, when a stop string was found, and when we fail.
    """
    key = _watcher.add(context, action)
    try:
        yield
    except BaseException:  # GeneratorExit and CancelledError above all
        action()
        raise
    finally:
        _watcher.remove(key)
