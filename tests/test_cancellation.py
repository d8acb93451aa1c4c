"""Requests that nobody waits for any more: who notices, and what is left of them."""

import asyncio
from contextlib import ExitStack
from typing import Any, cast

import pytest

from common.dynamo import service
from common.dynamo.runtime import Context
from common.dynamo.service import when_stopped
from tests.processes import Pipeline, wait_until
from tests.raw_http import open_request

NUM_ABANDONED = 10


@pytest.fixture(autouse=True)
def own_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one for a process, which has one event loop; each test here has a loop of its own."""
    monkeypatch.setattr(service, "_watcher", service._Watcher())


class LookedAt:
    """A context that was stopped; `meanwhile` happens while it is asked, as in another thread."""

    def __init__(self, meanwhile: Any) -> None:
        self._meanwhile = meanwhile

    def is_stopped(self) -> bool:
        self._meanwhile()
        return True


def test_requests_that_come_and_go_while_others_are_looked_at_stop_nothing() -> None:
    async def run() -> tuple[list[str], list[str]]:
        stopped: list[str] = []
        with ExitStack() as watched:

            def meanwhile() -> None:
                stopped_one = cast("Context", LookedAt(lambda: None))
                watched.enter_context(when_stopped(stopped_one, lambda: stopped.append("new")))

            for name in ("first", "second"):
                looked_at = cast("Context", LookedAt(meanwhile))
                watched.enter_context(when_stopped(looked_at, lambda name=name: stopped.append(name)))  # type: ignore[misc]
            async with asyncio.timeout(30):
                while len(stopped) < 2:
                    await asyncio.sleep(0)
                at_first = stopped.copy()
                while len(stopped) < 4:
                    await asyncio.sleep(0)
        return at_first, stopped

    at_first, stopped = asyncio.run(run())
    assert at_first == ["first", "second"]
    assert stopped == ["first", "second", "new", "new"]


def test_an_action_that_fails_takes_the_cancellation_from_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    async def run() -> None:
        for _ in range(2):  # both those that are looked at together with it, and those that come later
            stopped = asyncio.Event()
            with ExitStack() as watched:
                for action in (fail, stopped.set):
                    watched.enter_context(when_stopped(cast("Context", LookedAt(lambda: None)), action))
                async with asyncio.timeout(10):
                    await stopped.wait()

    asyncio.run(run())
    assert caplog.text.count("RuntimeError: a bug") == 2


@pytest.mark.process
def test_abandoned_handlers_are_closed_on_the_loop_and_hold_up_no_stop(own_scripts: Pipeline) -> None:
    """A handler may wait for something in its last moments, though Dynamo drops its stream in a thread of its own.

    It is closed soon though the worker is idle then.
    """
    worker = own_scripts.script("tests/slow_farewell.py", env={"DYN_CHAT_DRAIN_TIMEOUT_S": "5"})
    own_scripts.wait_ready()
    for number in range(NUM_ABANDONED):
        with open_request(own_scripts, max_tokens=8000, stream=True) as client:
            assert client.recv(1000)
        wait_until(lambda closed=number + 1: worker.log.count("closed ") == closed, 5, "the handler to end")  # type: ignore[misc]
    for process in (worker, own_scripts.processes[1]):
        assert process.terminate() == 0
        assert "finishing 0 requests" in process.log
        assert "Exception" not in process.log
    assert "closed elsewhere" not in worker.log
