"""engine.py as it is, without SGLang under it: its own handler and worker, on an object that counts upwards."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import uvloop

from common.dynamo.runtime import configure_dynamo_logging
from common.sglang.engine import SGLangEngine
from common.sglang.output import Output
from common.wire import EngineDescription, OutputOptions
from engine import worker

logger = logging.getLogger("counting_engine")


class CountingEngine:
    """Answers like SGLang, with all tokens so far in each item: 1000, 1001, 1002, ..."""

    description = EngineDescription("counting", context_length=8192, vocab_size=49152)

    def __init__(self) -> None:
        self._aborted: set[str] = set()

    def leave_signals_to(self, request_stop: Callable[[], None]) -> None:
        """Nothing takes them."""

    def abort(self, rid: str) -> None:
        self._aborted.add(rid)

    async def generate(
        self, token_ids: list[int], sampling_params: dict[str, Any], *, rid: str, output_options: OutputOptions
    ) -> AsyncGenerator[Output, None]:
        num_tokens = sampling_params["max_new_tokens"]
        output_ids: list[int] = []
        try:
            while len(output_ids) < num_tokens and rid not in self._aborted:
                output_ids.append(1000 + len(output_ids))
                finish_reason = {"type": "length"} if len(output_ids) == num_tokens else None
                yield {"output_ids": [*output_ids], "meta_info": {"finish_reason": finish_reason, "queue_time": 0.25}}
                await asyncio.sleep(0.01)
        finally:
            logger.info("ended after %d of %d", len(output_ids), num_tokens)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker(cast("SGLangEngine", CountingEngine())))
