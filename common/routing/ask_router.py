"""How a processor asks the router, and does without one."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec

from common.dynamo.failover import Choose, Chosen, RoundRobin
from common.dynamo.runtime import Client, Context
from common.wire import Envelope, RouteTrace, WorkerFound, WorkerQuestion, to_wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A router decides about a thousand times a second. More questions than these wait here, not for its answer.
MAX_QUESTIONS = 8
ANSWER_TIMEOUT_S = 0.05
_NUM_LOOKS = 5
REST_S = 0.5  # of a router that has answered nobody for SILENCE_S
SILENCE_S = 0.25
_ENDING_TIMEOUT_S = 1.0


class AskRouter:
    """A `Choose`: the worker that the router names, or where none names one in ANSWER_TIMEOUT_S, the next in turn.

    All processors ask the same one of several routers, so that it knows of all that is booked.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._without: Choose = RoundRobin()
        self._questions = asyncio.Semaphore(MAX_QUESTIONS)
        self._resting: dict[int, float] = {}  # until when
        self._heard_s = -SILENCE_S  # any answer
        self._is_announced = False  # that one is silent
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def __call__(self, request: dict[str, Any], instance_ids: Sequence[int]) -> AsyncIterator[Chosen]:
        booking = _Booking()
        try:
            chosen = await self._ask(booking, request, instance_ids)
            if chosen is not None:
                yield chosen
            else:
                async with self._without(request, instance_ids) as chosen:
                    yield chosen
        finally:
            if booking.context is not None:
                ending = asyncio.create_task(booking.end(booking.context))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    async def _ask(self, booking: "_Booking", request: dict[str, Any], instance_ids: Sequence[int]) -> Chosen | None:
        """None where nobody answers, or names none of these."""
        if await self._router() is None:
            return None
        question = to_wire(WorkerQuestion(request["token_ids"], list(instance_ids)))
        question = Envelope.taken_from({**request}).around(question)
        async with self._questions:
            while (router_id := await self._router()) is not None:
                started_s = time.monotonic()
                try:
                    found = await within_loop_time(self._ask_one(router_id, question, booking))
                except TimeoutError as error:
                    if time.monotonic() - self._heard_s > SILENCE_S:  # otherwise it is only slow
                        self._rest(router_id, error)
                    return None
                except Exception as error:  # one that was killed is still listed; another one may be there
                    self._rest(router_id, error)
                    continue
                self._heard_s, self._is_announced = time.monotonic(), False
                route = RouteTrace(f"{router_id:x}", round((self._heard_s - started_s) * 1e6), found.num_cached_tokens)
                return Chosen(found.worker_id, route) if found.worker_id in instance_ids else None
        return None

    async def _ask_one(self, router_id: int, question: dict[str, Any], booking: "_Booking") -> WorkerFound:
        booking.context = Context()
        booking.stream = stream = await self._client.direct(question, router_id, booking.context)
        return msgspec.convert((await anext(stream)).data(), WorkerFound)

    async def _router(self) -> int | None:
        now = time.monotonic()
        self._resting = {router_id: until for router_id, until in self._resting.items() if until > now}
        return min((each for each in await self._client.instance_ids() if each not in self._resting), default=None)

    def _rest(self, router_id: int, error: Exception) -> None:
        """Ask it no more for a while."""
        self._resting[router_id] = time.monotonic() + REST_S
        if not self._is_announced:
            logger.warning("router %x does not answer: %r", router_id, error)
            self._is_announced = True


class _Booking:
    """The open stream of a router's answer. When it is stopped, the booking there ends."""

    context: Context | None = None
    stream: AsyncIterator[Any] | None = None

    async def end(self, context: Context) -> None:
        """Stop it, and hold it until the router has heard: one that is dropped at once may stay booked."""
        context.stop_generating()
        if self.stream is not None:
            with suppress(Exception):
                async with asyncio.timeout(_ENDING_TIMEOUT_S):
                    async for _ in self.stream:
                        pass


async def within_loop_time(coroutine: Coroutine[Any, Any, T]) -> T:
    """What it returns within ANSWER_TIMEOUT_S, in several looks: while the loop is busy, answers wait to be seen.

    Raises:
        TimeoutError: nothing until then.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        for _ in range(_NUM_LOOKS):
            if (await asyncio.wait((task,), timeout=ANSWER_TIMEOUT_S / _NUM_LOOKS))[0]:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()
