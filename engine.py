"""The engine: token ids in, new token ids out.

    processor --(NATS)--> engine.generate --> SGLang

It serves `inference/engine/generate` and knows nothing about text. SGLang runs inside this process and in children
of it; each request becomes one call of `async_generate`, and whoever stops waiting aborts that call.

With --kv-events it also serves `inference/engine/kv_events`, which tells routers what is cached, and each change of it.
"""

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

import uvloop

from common.dynamo.runtime import DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.dynamo.service import RequestContext, service
from common.sglang.engine import SGLangEngine, new_tokens
from common.wire import EngineChunk, EngineRequest


class RequestHandler:
    """Answers `generate` requests with SGLang."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine

    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[EngineChunk, None]:
        """Yields new token ids as they come; the last chunk has the finish_reason."""
        num_output_tokens_so_far = 0
        async with aclosing(self.engine.generate(request, context)) as outputs:  # leaving it early aborts the request
            async for output in outputs:
                chunk = new_tokens(output, num_output_tokens_so_far)
                num_output_tokens_so_far += len(chunk.token_ids)
                yield chunk


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, engine: SGLangEngine) -> None:
    component = runtime.namespace("inference").component("engine")
    await component.create_service()
    handler = RequestHandler(engine)
    if engine.cache_events is not None:  # --kv-events: tells routers what is cached here
        await engine.cache_events.connect()
        runtime.run_in_background(engine.cache_events.follow())
        kv_events = component.endpoint("kv_events")
        runtime.run_in_background(kv_events.serve_endpoint(engine.cache_events.cached.events, graceful_shutdown=False))
    await component.endpoint("generate").serve_endpoint(service(handler.generate, description=engine.describe))


if __name__ == "__main__":
    configure_dynamo_logging()
    with SGLangEngine(sys.argv[1:]) as sglang_engine:
        uvloop.run(worker(sglang_engine))
