"""What is left of a request that nobody waits for any more: nothing, whichever way it was left.

On the benchmark's stand-in for `sglang.Engine`; that the real one aborts is for test_engine_faults.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.fake_sglang.engine import Engine
from common.sglang.engine import SGLangEngine
from common.sglang.stream_pace import Output, StreamPace
from common.wire import EngineDescription, EngineRequest, OutputOptions, StopConditions
from tests.contexts import request_context

FOREVER = 1_000_000


@pytest.fixture
def engine(embedded_model: str) -> SGLangEngine:
    """An SGLangEngine that did not start SGLang."""
    arguments = SimpleNamespace(
        model_path=embedded_model,
        context_length=None,
        incremental_streaming_output=False,
        stream_interval=1,
        max_running_requests=None,
    )
    bare = SGLangEngine.__new__(SGLangEngine)
    bare._engine = Engine(server_args=arguments)
    bare._tokenizer_manager = bare._engine.tokenizer_manager
    bare._pace = StreamPace()
    bare.description = EngineDescription("bare", context_length=8192, vocab_size=49152)
    return bare


def request(engine: SGLangEngine, *, stream: bool, max_tokens: int = FOREVER) -> AsyncGenerator[Output, None]:
    stop, options = StopConditions(max_tokens=max_tokens), OutputOptions(stream=stream)
    asked = EngineRequest([1, 2, 3], stop_conditions=stop, output_options=options)
    return engine.generate(asked, request_context("engine"))


async def close_it(stream: AsyncGenerator[Output, None]) -> None:
    await anext(stream)
    await stream.aclose()


async def cancel_it(stream: AsyncGenerator[Output, None]) -> None:
    waiting: asyncio.Task[Output] = asyncio.create_task(cast("Coroutine[Any, Any, Output]", anext(stream)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])


@pytest.mark.parametrize(
    ("leave", "stream"),
    [(close_it, True), (cancel_it, True), (cancel_it, False)],
    ids=["closed", "cancelled", "cancelled, non-streaming"],
)
def test_a_request_that_is_left_is_aborted(
    engine: SGLangEngine, leave: Callable[[AsyncGenerator[Output, None]], Coroutine[Any, Any, None]], stream: bool
) -> None:
    async def run() -> None:
        await leave(request(engine, stream=stream))
        async with asyncio.timeout(10):
            while engine._tokenizer_manager.rid_to_state:
                await asyncio.sleep(0.001)

    asyncio.run(run())
    assert engine._pace.num_streams == 0


def test_a_request_that_was_read_to_its_end_is_not_aborted(
    engine: SGLangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted: list[str] = []
    monkeypatch.setattr(engine._tokenizer_manager, "abort_request", lambda rid: aborted.append(rid))

    async def run() -> None:
        async for _ in request(engine, stream=True, max_tokens=3):
            pass
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert aborted == []
