"""How a request ends: read to its end, left, cancelled, or aborted by SGLang.

On stand-ins for `sglang.Engine`; what the real one does is for test_engine_faults.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import HTTPException

from bench.fake_sglang import Engine
from common.dynamo.service import RequestContext
from common.errors import Aborted, Busy, InvalidRequest, PipelineError
from common.openai.json_schema import GRAMMAR_FAILED
from common.sglang.engine import SGLangEngine
from common.sglang.pacing import Output, StreamPace
from common.wire import SCHEMA_PARAM, EngineDescription, EngineRequest, OutputOptions, SamplingOptions, StopConditions
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


def request(
    engine: SGLangEngine,
    *,
    stream: bool,
    max_tokens: int = FOREVER,
    context: RequestContext | None = None,
    json_schema: str | None = None,
) -> AsyncGenerator[Output, None]:
    stop, options = StopConditions(max_tokens=max_tokens), OutputOptions(stream=stream)
    sampling = SamplingOptions(json_schema=json_schema)
    asked = EngineRequest([1, 2, 3], sampling, stop, options)
    return engine.generate(asked, context or request_context("engine"))


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


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_was_cancelled_just_ends(engine: SGLangEngine, stream: bool) -> None:
    async def run() -> list[Output]:
        context = request_context("engine")
        asyncio.get_running_loop().call_later(0.01, context.raw.stop_generating)
        async with asyncio.timeout(10):
            return [output async for output in request(engine, stream=stream, context=context)]

    assert all(output["meta_info"]["finish_reason"] is None for output in asyncio.run(run()))


class AbortingEngine:
    """Ends each request as SGLang 0.5.16 does: by an exception where nobody streams and the abort has a status code."""

    def __init__(self, status_code: int | None, message: str = "Told so.") -> None:
        self._finish_reason = {"type": "abort", "message": message, "status_code": status_code, "err_type": None}
        self._status_code, self._message = status_code, message

    async def async_generate(self, *, stream: bool, **_: Any) -> Any:
        output = {"output_ids": [], "meta_info": {"finish_reason": self._finish_reason}}
        if stream:
            return self._stream(output)
        if self._status_code == 400:
            raise ValueError(self._message)
        if self._status_code is not None:
            raise HTTPException(self._status_code, self._message)
        return output

    async def _stream(self, output: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        yield output


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status_code", "kind"), [(400, InvalidRequest), (503, Busy), (500, Aborted), (None, Aborted)])
def test_an_abort_is_the_error_that_its_status_code_says(
    engine: SGLangEngine, status_code: int | None, kind: type[PipelineError], stream: bool
) -> None:
    engine._engine = AbortingEngine(status_code)

    async def run() -> None:
        await anext(request(engine, stream=stream))

    with pytest.raises(PipelineError, match=r": Told so\.$") as caught:
        asyncio.run(run())
    assert type(caught.value) is kind


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status_code", "message", "kind"),
    [
        (400, "Failed to compile json grammar: Invalid type: text", InvalidRequest),
        (None, GRAMMAR_FAILED, InvalidRequest),
        (None, "Aborted", Aborted),
        (500, "Out of memory", Aborted),
    ],
)
def test_a_grammar_that_fails_is_the_clients_and_no_failure_of_the_engine(
    engine: SGLangEngine, status_code: int | None, message: str, kind: type[PipelineError], stream: bool
) -> None:
    engine._engine = AbortingEngine(status_code, message)
    engine.description = EngineDescription("bare", context_length=8192, vocab_size=49152, can_constrain=True)

    async def run() -> None:
        await anext(request(engine, stream=stream, json_schema="{}"))

    with pytest.raises(kind) as caught:
        asyncio.run(run())
    assert caught.value.param == (SCHEMA_PARAM if kind is InvalidRequest else None)


def test_an_engine_without_grammars_takes_no_schema(engine: SGLangEngine) -> None:
    async def run() -> None:
        await anext(request(engine, stream=True, json_schema="{}"))

    with pytest.raises(InvalidRequest, match="does not support grammars"):
        asyncio.run(run())
