"""How a processor asks the router, and does without one."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec

from common.dynamo.failover import Chosen, RequestContext, RoundRobin
from common.dynamo.runtime import Client, Context
from common.wire import KV_BLOCK_SIZE, RouteTrace, WorkerFound, WorkerQuestion, to_wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A router decides about a thousand times a second. More questions than these wait here, not for its answer.
MAX_QUESTIONS = 8
ANSWER_TIMEOUT_S = 0.05
ASKING_TIMEOUT_S = 0.25  # from the request's arrival here: for its turn to ask, and for the answer
_NUM_LOOKS = 10
# A router that failed, or has answered nobody for SILENCE_S, is not asked for REST_S, or until a late answer comes.
REST_S = 0.5
SILENCE_S = 0.1
_ENDING_TIMEOUT_S = 30.0


class AskRouter:
    """A `Choose`: the worker that the router names, or where none names one in time, the next in turn.

    All processors ask the same one of several routers, so that it knows of all that is booked.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._without = RoundRobin()
        self._questions = asyncio.Semaphore(MAX_QUESTIONS)
        self._rests_until: dict[int, float] = {}
        self._takes_hashes: set[int] = set()  # which routers: 2 KB of 4,096 tokens instead of 12, and no list
        self._last_answer_s = -SILENCE_S
        self._is_announced = False  # that there are no answers
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def __call__(
        self, request: dict[str, Any], instance_ids: Sequence[int], context: RequestContext
    ) -> AsyncIterator[Chosen]:
        async with AsyncExitStack() as booking:
            chosen: Chosen | None = None
            if await self._router() is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(ASKING_TIMEOUT_S):
                        chosen = await self._ask(request, instance_ids, context, booking)
            yield self._without.next(instance_ids) if chosen is None else chosen

    async def _ask(
        self, request: dict[str, Any], instance_ids: Sequence[int], context: RequestContext, booking: AsyncExitStack
    ) -> Chosen | None:
        """None where nobody answers, or names none of these. What is booked ends with `booking`."""
        async with self._questions:
            while not context.is_stopped() and (router_id := await self._router()) is not None:
                question = context.record.envelope.around(self._question(router_id, request["token_ids"], instance_ids))
                asked_s = time.monotonic()
                try:
                    found = await booking.enter_async_context(self._booked(router_id, question))
                except TimeoutError as error:
                    if time.monotonic() - self._last_answer_s > SILENCE_S:  # otherwise it is only slow
                        self._rest(router_id, error)
                    return None
                except Exception as error:  # one that was killed is still listed; another one may be there
                    self._rest(router_id, error)
                    continue
                if found.hashed_block_size == KV_BLOCK_SIZE:
                    self._takes_hashes.add(router_id)
                if found.worker_id in instance_ids:
                    took_us = round((time.monotonic() - asked_s) * 1e6)
                    return Chosen(found.worker_id, RouteTrace(f"{router_id:x}", took_us, found.num_cached_tokens))
                await booking.aclose()
                return None
        return None

    def _question(self, router_id: int, token_ids: list[int], instance_ids: Sequence[int]) -> dict[str, Any]:
        if router_id not in self._takes_hashes:
            return to_wire(WorkerQuestion(list(instance_ids), token_ids))
        from common.routing.kv_blocks import block_hashes, packed  # not on a Dynamo that is older than routers

        hashes = packed(block_hashes(token_ids))
        return to_wire(WorkerQuestion(list(instance_ids), num_tokens=len(token_ids), tokens_hashes=hashes))

    @asynccontextmanager
    async def _booked(self, router_id: int, question: dict[str, Any]) -> AsyncIterator[WorkerFound]:
        """The router's answer. Its stream stays open, and so the worker is booked, for as long as the block lasts.

        Raises:
            TimeoutError: no answer within ANSWER_TIMEOUT_S.
            Exception: what the runtime raises, and ValidationError for an answer that names no worker.
        """
        context = Context()

        async def ask() -> tuple[WorkerFound, AsyncIterator[Any]]:
            stream = await self._client.direct(question, router_id, context)
            found = msgspec.convert(await anext(stream), WorkerFound)
            # Also if it is too late for the request: in a burst of long prompts this process may be slow.
            self._last_answer_s, self._is_announced = time.monotonic(), False
            self._rests_until.pop(router_id, None)
            return found, stream

        async def end() -> None:
            """Stop it, and hold it until the router has heard: one that is dropped at once may stay booked.

            So may one that is stopped before its answer: Dynamo 1.6 cancels such a call here, and does not tell the
            router.
            """
            with suppress(Exception):
                async with asyncio.timeout(_ENDING_TIMEOUT_S):
                    _, stream = await answer
                    context.stop_generating()
                    async for _ in stream:
                        pass
            context.stop_generating()

        answer = asyncio.create_task(ask())
        try:
            found, _ = await within_loop_time(answer)
            yield found
        finally:
            ending = asyncio.create_task(end())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def _router(self) -> int | None:
        now, ids = time.monotonic(), await self._client.instance_ids()
        return min((each for each in ids if self._rests_until.get(each, now) <= now), default=None)

    def _rest(self, router_id: int, error: Exception) -> None:
        """Ask it no more for a while."""
        self._rests_until[router_id] = time.monotonic() + REST_S
        if not self._is_announced:
            logger.warning("router %x does not answer: %r", router_id, error)
            self._is_announced = True


async def within_loop_time(answer: asyncio.Future[T]) -> T:
    """Its result, if it comes within ANSWER_TIMEOUT_S. Of time in which the event loop is busy little counts: answers
    that are there already wait to be seen.

    Raises:
        TimeoutError: nothing until then.
    """
    for _ in range(_NUM_LOOKS):
        if (await asyncio.wait((answer,), timeout=ANSWER_TIMEOUT_S / _NUM_LOOKS))[0]:
            return answer.result()
    raise TimeoutError
