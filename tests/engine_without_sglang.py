"""engine.py as it is, without SGLang under it: its own handler and worker, on an object that counts upwards."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import cast

import uvloop

from common.dynamo.runtime import configure_dynamo_logging
from common.dynamo.service import RequestContext
from common.sglang.engine import SGLangEngine
from common.sglang.pacing import Output
from common.wire import EngineDescription, EngineRequest
from engine import worker

logger = logging.getLogger("counting_engine")


class CountingEngine:
    """Answers like SGLang, with all tokens so far in each item: 1000, 1001, 1002, ..."""

    description = EngineDescription("counting", context_length=8192, vocab_size=49152)
    cache_events = None

    async def describe(self) -> EngineDescription:
        return self.description

    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Output, None]:
        num_tokens = request.stop_conditions.max_tokens or 16
        output_ids: list[int] = []
        try:
            while len(output_ids) < num_tokens and not context.is_stopped():
                output_ids.append(1000 + len(output_ids))
                finish_reason = {"type": "length"} if len(output_ids) == num_tokens else None
                if finish_reason is not None:
                    context.record.waited(0.25)
                yield {"output_ids": [*output_ids], "meta_info": {"finish_reason": finish_reason}}
                await asyncio.sleep(0.01)
        finally:
            logger.info("ended after %d of %d", len(output_ids), num_tokens)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker(cast("SGLangEngine", CountingEngine())))
