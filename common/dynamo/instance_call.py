"""One call of one instance, which somebody else may find to be in vain."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from common.dynamo.runtime import Context

T = TypeVar("T")


class InstanceFailed(Exception):
    """The instance went away before its stream was complete."""


class NotTaken(InstanceFailed):
    """The instance was not there to take the request."""


class InstanceCall:
    """A stream that is being waited for.

    is_taken: whether the instance has accepted the request; a whole answer is then silent until its end.
    heard_at: when its last dict came, on the event loop's clock; None before the first. generation: of our connection.
    """

    def __init__(self, context: Context, generation: int) -> None:
        self.generation = generation
        self.is_taken = False
        self.heard_at: float | None = None
        self._context = context
        self._awaited: asyncio.Future[Any] | None = None
        self._failure: InstanceFailed | None = None

    async def wait_for(self, awaitable: Awaitable[T]) -> T:
        """What comes of `awaitable`, unless the call is given up meanwhile.

        Raises:
            InstanceFailed: it was given up.
        """
        future = asyncio.ensure_future(awaitable)
        self._awaited = future
        if self._failure is not None:  # while nobody was waiting
            future.cancel()
        try:
            result = await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._failure is None or (task is not None and task.cancelling()):  # it is we who are cancelled
                raise
            raise self._failure from None
        if self._failure is not None:  # a first dict that was on its way; the others will not come
            raise self._failure
        return result

    def give_up(self, reason: str) -> None:
        """End the waiting. Dynamo itself would go on: up to 10 s for a connection, for ever when there is one."""
        self._failure = InstanceFailed(reason) if self.is_taken else NotTaken(reason)
        self._context.stop_generating()
        if self._awaited is not None:
            self._awaited.cancel()
