"""A processor and its routers, without processes: routers that answer, are slow, silent or gone."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

import pytest

from common.dynamo.failover import Chosen, RequestContext
from common.dynamo.runtime import Client, Context
from common.routing.ask_router import ASKING_TIMEOUT_S, MAX_QUESTIONS, REST_S, AskRouter, within_loop_time
from tests.contexts import request_context

ERRORS = {
    "gone": ConnectionError("no responders"),
    "small": Exception("nats: payload is too large"),
    "wrong": Exception("BackendUnknown: ValueError: no such token"),
}
ANSWERS_AFTER_S = {"slow": 0.03, "silent": 60}


class Routers:
    """A client of some routers: one that is gone is listed still, one that is silent takes questions, and one that is
    late answers when `may_answer` is set.
    """

    def __init__(self, **kinds: str) -> None:
        self.kinds = {int(name.removeprefix("r")): kind for name, kind in kinds.items()}
        self.asked: list[int] = []
        self.contexts: list[Context] = []
        self.may_answer = asyncio.Event()

    async def instance_ids(self) -> list[int]:
        return list(self.kinds)

    async def direct(self, question: dict[str, Any], router_id: int, context: Context) -> AsyncGenerator[Any, None]:
        self.asked.append(router_id)
        self.contexts.append(context)
        prompt: dict[str, Any] = {"token_ids": [1, 2]}
        if self.kinds[router_id] == "hashing" and self.asked.count(router_id) > 1:
            prompt = {"num_tokens": 2}
        assert question == {**prompt, "worker_ids": [7, 8, 9], "request_id": "req-1"}
        if error := ERRORS.get(self.kinds[router_id]):
            raise error
        return self._answer(self.kinds[router_id])

    async def _answer(self, kind: str) -> AsyncGenerator[Any, None]:
        await (self.may_answer.wait() if kind == "late" else asyncio.sleep(ANSWERS_AFTER_S.get(kind, 0)))
        size = {"hashing": {"hashed_block_size": 16}, "otherwise": {"hashed_block_size": 64}}.get(kind, {})
        yield {"worker_id": {"lost": 5, "garbage": None}.get(kind, 8), "num_cached_tokens": 32, **size}

    def num_open(self) -> int:
        return sum(not context.is_stopped() for context in self.contexts)


async def chosen_by(ask: AskRouter, context: RequestContext | None = None) -> Chosen:
    async with attempt(ask, context or request_context()) as chosen:
        return chosen


def attempt(ask: AskRouter, context: RequestContext) -> AbstractAsyncContextManager[Chosen]:
    return ask({"token_ids": [1, 2], "sampling_options": {"seed": 1}, "request_id": "req-1"}, [7, 8, 9], context)


async def some_turns() -> None:
    """Of the event loop: as many as what is due anyway takes."""
    for _ in range(20):
        await asyncio.sleep(0)


def ask_of(routers: Routers) -> AskRouter:
    return AskRouter(cast("Client", routers))


def test_all_processors_ask_the_router_with_the_lowest_id_and_tell_it_when_the_attempt_is_over() -> None:
    routers = Routers(r2="good", r1="good")
    chosen = asyncio.run(chosen_by(ask_of(routers)))
    assert chosen.instance_id == 8
    assert chosen.route is not None
    assert (chosen.route.router, chosen.route.num_cached_tokens) == ("1", 32)
    assert routers.asked == [1]
    assert all(context.is_stopped() for context in routers.contexts)


@pytest.mark.parametrize("kind", ["good", "hashing", "otherwise"])
def test_a_router_that_takes_hashes_is_asked_with_them_from_then_on(kind: str) -> None:
    async def ask_twice(routers: Routers) -> list[int]:
        ask = ask_of(routers)
        return [(await chosen_by(ask)).instance_id for _ in range(2)]

    routers = Routers(r1=kind)
    assert asyncio.run(ask_twice(routers)) == [8, 8]
    assert routers.asked == [1, 1]


@pytest.mark.parametrize("kind", [*ERRORS, "garbage"])
def test_where_one_router_fails_another_one_is_asked_at_once_and_that_one_not_again(kind: str) -> None:
    async def ask_twice(routers: Routers) -> list[int]:
        ask = ask_of(routers)
        return [(await chosen_by(ask)).instance_id for _ in range(2)]

    routers = Routers(r1=kind, r2="good")
    assert asyncio.run(ask_twice(routers)) == [8, 8]
    assert routers.asked == [1, 2, 2]


@pytest.mark.parametrize("kind", [None, *ERRORS, "silent", "lost", "garbage"])
def test_without_a_router_that_names_one_of_these_workers_they_take_turns(kind: str | None) -> None:
    async def ask_often() -> set[int]:
        ask = ask_of(Routers(**({"r1": kind} if kind else {})))
        return {(await chosen_by(ask)).instance_id for _ in range(3)}

    assert asyncio.run(ask_often()) == {7, 8, 9}


def test_a_router_that_is_silent_is_left_alone_for_a_while() -> None:
    async def ask_often(routers: Routers) -> None:
        ask = ask_of(routers)
        for _ in range(5):
            await chosen_by(ask)

    routers = Routers(r1="silent")
    asyncio.run(ask_often(routers))
    assert len(routers.asked) == 1


def test_a_router_that_answered_too_late_is_asked_again_at_once() -> None:
    async def ask_twice(routers: Routers) -> int:
        ask, context = ask_of(routers), request_context()
        await chosen_by(ask, context)
        routers.may_answer.set()
        await some_turns()
        routers.kinds[1] = "good"
        return (await chosen_by(ask, context)).instance_id

    routers = Routers(r1="late")
    assert asyncio.run(ask_twice(routers)) == 8
    assert routers.asked == [1, 1]


@pytest.mark.parametrize("kind", [*ERRORS, "garbage"])
def test_a_router_that_fails_rests_and_is_asked_again(kind: str) -> None:
    async def ask_thrice(routers: Routers) -> int:
        ask = ask_of(routers)
        await chosen_by(ask)
        routers.kinds[1] = "good"
        await chosen_by(ask)
        await asyncio.sleep(REST_S)
        return (await chosen_by(ask)).instance_id

    routers = Routers(r1=kind)
    assert asyncio.run(ask_thrice(routers)) == 8
    assert routers.asked == [1, 1]


def test_many_at_once_wait_for_a_slow_router_no_longer_than_the_deadline() -> None:
    async def ask_all(routers: Routers) -> tuple[float, set[int]]:
        ask, context, started_s = ask_of(routers), request_context(), time.monotonic()
        chosen = await asyncio.gather(*(chosen_by(ask, context) for _ in range(1024)))
        return time.monotonic() - started_s, {each.instance_id for each in chosen}

    routers = Routers(r1="slow")
    waited_s, instance_ids = asyncio.run(ask_all(routers))
    assert waited_s < ASKING_TIMEOUT_S + 1.5  # 1,024 answers would take 3.8 s
    assert instance_ids == {7, 8, 9}
    assert len(routers.asked) > 2 * MAX_QUESTIONS


def test_a_router_that_hangs_makes_those_who_wait_take_turns_soon() -> None:
    async def ask_all(routers: Routers) -> None:
        ask, context = ask_of(routers), request_context()
        await chosen_by(ask, context)
        routers.kinds[1] = "silent"
        await asyncio.gather(*(chosen_by(ask, context) for _ in range(256)))

    routers = Routers(r1="good")
    asyncio.run(ask_all(routers))
    assert len(routers.asked) <= 1 + 2 * MAX_QUESTIONS


@pytest.mark.parametrize("kind", ["late", "lost", "garbage"])
def test_what_is_not_followed_is_not_booked_while_the_attempt_goes_on(kind: str) -> None:
    async def ask(routers: Routers) -> bool:
        async with attempt(ask_of(routers), request_context()):
            await some_turns()
            assert routers.num_open() == (kind == "late")  # a stop before the answer would be lost
            routers.may_answer.set()
            async with asyncio.timeout(5):
                while routers.num_open():
                    await asyncio.sleep(0.01)
            return True

    routers = Routers(r1=kind)
    assert asyncio.run(ask(routers))
    assert routers.asked == [1]


def test_of_two_routers_only_the_one_that_is_followed_has_it_booked() -> None:
    async def ask(routers: Routers) -> list[bool]:
        async with attempt(ask_of(routers), request_context()):
            await some_turns()
            return [context.is_stopped() for context in routers.contexts]

    assert asyncio.run(ask(Routers(r1="gone", r2="good"))) == [True, False]


def test_for_a_client_that_has_left_no_router_is_asked() -> None:
    async def ask(routers: Routers) -> None:
        context = request_context()
        context.raw.stop_generating()
        async with attempt(ask_of(routers), context):
            pass

    routers = Routers(r1="good")
    asyncio.run(ask(routers))
    assert routers.asked == []


def test_a_busy_event_loop_is_not_taken_for_a_silent_router() -> None:
    async def answer() -> int:
        await asyncio.sleep(0.01)
        return 7

    async def ask() -> int:
        asyncio.get_running_loop().call_later(0.001, time.sleep, 0.1)
        return await within_loop_time(asyncio.ensure_future(answer()))

    assert asyncio.run(ask()) == 7


def test_a_loop_that_stays_busy_is_not_taken_for_a_silent_router_either() -> None:
    async def answer() -> int:
        for _ in range(8):  # as many steps as it may take here
            await asyncio.sleep(0.001)
        return 7

    def keep_busy() -> None:
        time.sleep(0.03)
        asyncio.get_running_loop().call_soon(keep_busy)

    async def ask() -> int:
        keep_busy()
        return await within_loop_time(asyncio.ensure_future(answer()))

    assert asyncio.run(ask()) == 7


def test_a_silent_router_is_waited_for_no_longer_than_the_deadline() -> None:
    async def ask() -> float:
        started_s = time.monotonic()
        with pytest.raises(TimeoutError):
            await within_loop_time(asyncio.ensure_future(asyncio.sleep(60)))
        return time.monotonic() - started_s

    assert asyncio.run(ask()) < 5  # a look that took the machine too long does not count
