"""Waiting that somebody else can end."""

import asyncio

import pytest

from common.dynamo.instances import InstanceCall, InstanceFailed
from common.dynamo.runtime import Context


async def nothing() -> None:
    await asyncio.Event().wait()


def test_giving_up_ends_the_waiting_and_stops_the_worker() -> None:
    async def scenario() -> None:
        context = Context()
        call = InstanceCall(context, generation=1)
        asyncio.get_running_loop().call_soon(call.give_up, "it is gone")
        async with asyncio.timeout(5):
            with pytest.raises(InstanceFailed, match="it is gone"):
                await call.wait_for(nothing())
        assert context.is_stopped()

    asyncio.run(scenario())


def test_a_call_that_was_given_up_between_two_dicts_waits_for_none() -> None:
    async def scenario() -> None:
        call = InstanceCall(Context(), generation=1)
        assert await call.wait_for(asyncio.sleep(0, "first")) == "first"
        call.give_up("it is gone")
        async with asyncio.timeout(5):
            with pytest.raises(InstanceFailed, match="it is gone"):
                await call.wait_for(nothing())

    asyncio.run(scenario())


@pytest.mark.parametrize("is_given_up", [False, True])
def test_who_is_cancelled_itself_is_cancelled(is_given_up: bool) -> None:
    async def scenario() -> None:
        call = InstanceCall(Context(), generation=1)
        waiting = asyncio.create_task(call.wait_for(nothing()))
        await asyncio.sleep(0)
        waiting.cancel()
        if is_given_up:
            call.give_up("it is gone")
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())


def test_the_end_of_a_stream_and_its_errors_arrive_as_they_are() -> None:
    async def items() -> None:
        raise StopAsyncIteration

    async def scenario() -> None:
        call = InstanceCall(Context(), generation=1)
        with pytest.raises(StopAsyncIteration):
            await call.wait_for(items())

    asyncio.run(scenario())
