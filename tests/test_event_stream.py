"""A stream of events, as a proxy sees it."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from fastapi.sse import KEEPALIVE_COMMENT
from starlette.types import Message

from common.http.chat import EventStream
from tests.contexts import request_context


@pytest.mark.parametrize(("pause_s", "num_pings"), [(0.0, 0), (0.25, 2)])
def test_a_silent_stream_is_kept_alive_and_a_busy_one_left_alone(
    monkeypatch: pytest.MonkeyPatch, pause_s: float, num_pings: int
) -> None:
    monkeypatch.setattr("common.http.chat.PING_INTERVAL_S", 0.1)
    bodies: list[bytes] = []

    async def rest() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(pause_s)
        yield b"second"

    async def send(message: Message) -> None:
        bodies.append(message.get("body", b""))

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    record = request_context("frontend").record
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    asyncio.run(EventStream(b"first", rest(), record)(scope, receive, send))
    events = [body for body in bodies if body]
    assert (events[0], events[-1]) == (b"first", b"second")
    assert events.count(KEEPALIVE_COMMENT) == len(events) - 2 <= num_pings
    assert (len(events) > 2) == bool(num_pings)
