"""Waiting that somebody else can end."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from common.dynamo import instances
from common.dynamo.instances import CallBroke, InstanceCall, InstanceFailed, NotDelivered
from common.dynamo.runtime import Context


async def dicts(*items: Any) -> AsyncIterator[Any]:
    """These, and then nothing more for a long time; an exception among them is raised."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item
    await asyncio.Event().wait()


async def opened(stream: AsyncIterator[Any], context: Context | None = None) -> InstanceCall:
    async def opening() -> AsyncIterator[Any]:
        return stream

    call = InstanceCall(context or Context(), generation=1)
    await call.open(opening())
    return call


async def nothing() -> AsyncIterator[Any]:
    return await asyncio.Future()


def test_giving_up_ends_the_waiting_and_stops_the_worker() -> None:
    async def scenario() -> None:
        context = Context()
        call = await opened(dicts(), context)
        asyncio.get_running_loop().call_soon(call.give_up, "it is gone")
        async with asyncio.timeout(5):
            with pytest.raises(InstanceFailed, match="it is gone"):
                await call.next()
        assert context.is_stopped()

    asyncio.run(scenario())


def test_a_call_that_is_given_up_before_it_has_arrived_may_be_made_again() -> None:
    async def scenario() -> None:
        call = InstanceCall(Context(), generation=1)
        asyncio.get_running_loop().call_soon(call.give_up, "it is gone")
        async with asyncio.timeout(5):
            with pytest.raises(NotDelivered, match="it is gone"):
                await call.open(nothing())

    asyncio.run(scenario())


@pytest.mark.parametrize("is_left", [False, True])
def test_a_worker_is_told_to_stop_as_soon_as_its_stream_is_open(is_left: bool) -> None:
    """Not before, when Dynamo would forget it; also where nobody waits for the stream any more."""

    async def scenario() -> None:
        context, opening = Context(), asyncio.get_running_loop().create_future()
        call = InstanceCall(context, generation=1)
        waiting = asyncio.create_task(call.open(opening))
        await asyncio.sleep(0)
        if is_left:
            waiting.cancel()
            await asyncio.wait([waiting])
        call.stop()
        assert not context.is_stopped()
        opening.set_result(dicts())
        await asyncio.sleep(0)
        assert context.is_stopped()
        await asyncio.wait([waiting])

    asyncio.run(scenario())


def test_the_wait_for_a_stream_that_nobody_wants_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "OPENING_S", 0.01)

    async def scenario() -> None:
        context = Context()
        call = InstanceCall(context, generation=1)
        waiting = asyncio.create_task(call.open(nothing()))
        await asyncio.sleep(0)
        call.give_up("it is gone")
        with pytest.raises(NotDelivered):
            await waiting
        async with asyncio.timeout(5):
            while not context.is_stopped():
                await asyncio.sleep(0.001)

    asyncio.run(scenario())


def test_a_call_that_was_given_up_between_two_dicts_waits_for_none() -> None:
    async def scenario() -> None:
        call = await opened(dicts("first"))
        assert await call.next() == "first"
        call.give_up("it is gone")
        async with asyncio.timeout(5):
            with pytest.raises(InstanceFailed, match="it is gone"):
                await call.next()

    asyncio.run(scenario())


@pytest.mark.parametrize("is_given_up", [False, True])
def test_who_is_cancelled_itself_is_cancelled(is_given_up: bool) -> None:
    async def scenario() -> None:
        call = await opened(dicts())
        waiting = asyncio.create_task(call.next())
        await asyncio.sleep(0)
        waiting.cancel()
        if is_given_up:
            call.give_up("it is gone")
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())


def test_the_end_of_a_stream_is_a_failure_and_its_errors_arrive_as_they_are() -> None:
    async def ended() -> AsyncIterator[Any]:
        for item in ():
            yield item

    async def scenario() -> None:
        with pytest.raises(InstanceFailed, match="without a finish_reason"):
            await (await opened(ended())).next()
        raised = ValueError("by the worker")
        with pytest.raises(CallBroke) as broke:
            await (await opened(dicts(raised))).next()
        assert broke.value.__cause__ is raised

    asyncio.run(scenario())
