"""A stand-in for engine.py where the model adds nothing: real Dynamo, real wire, made-up tokens.

The token at position p of a sequence is `TOKEN_IDS[p % len]`, prompt included: so an answer that goes on elsewhere
after a fault is the answer that would have been. Its faults are chosen on the command line.
"""

import argparse
import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import uvloop

from common.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.wire import EngineDescription, EngineRequest, read_engine_request, to_wire

logger = logging.getLogger("fake_engine")

GARBAGE: dict[str, list[Any]] = {
    "not-a-dict": ["text"],
    "wrong-types": [{"token_ids": "abc"}],
    "negative-id": [{"token_ids": [-1]}],
    "huge-id": [{"token_ids": [2**40]}],
    "wrong-finish-reason": [{"token_ids": [1], "finish_reason": 7}],
    "error-text": [{"error": "some internal text"}],
    "logprobs-do-not-match": [{"token_ids": [1, 2], "log_probs": [-0.5]}],
    "empty-stream": [],
}


class FakeEngine:
    """Answers `generate` requests at a set pace. token_ids: what the answers are made of."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.num_running = 0
        self.description = EngineDescription("fake", context_length=8192, vocab_size=49152, is_seed_supported=True)

    async def generate(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        if request.get("describe"):
            if self.args.plain:
                raise KeyError("token_ids")
            yield {**to_wire(self.description), "finish_reason": "stop"}
            return
        self.num_running += 1
        logger.info("running %d", self.num_running)
        try:
            async for item in self.answer(request, context):
                yield item
        finally:
            self.num_running -= 1
            logger.info("running %d, stopped %s", self.num_running, context.is_stopped())

    async def answer(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        args = self.args
        if args.garbage == "endless":
            while not context.is_stopped():
                yield {"token_ids": [1] * 100}
                await asyncio.sleep(0)
            return
        if args.garbage:
            for item in GARBAGE[args.garbage]:
                yield item
            return
        engine_request: EngineRequest = read_engine_request(request)
        max_tokens = engine_request.stop_conditions.max_tokens or 16
        position = len(engine_request.token_ids)
        end = position + max_tokens
        while position < end:
            num_new = min(args.tokens_per_chunk, end - position)
            new = [args.token_ids[at % len(args.token_ids)] for at in range(position, position + num_new)]
            position += num_new
            if context.is_stopped():
                return
            yield {"token_ids": new}
            if args.token_interval_ms:
                await asyncio.sleep(args.token_interval_ms * num_new / 1000)
        yield {"finish_reason": "length"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--token-ids", type=lambda text: [int(token_id) for token_id in text.split(",")], required=True)
    parser.add_argument("--tokens-per-chunk", type=int, default=1)
    parser.add_argument("--token-interval-ms", type=float, default=0.0)
    parser.add_argument("--garbage", choices=[*GARBAGE, "endless"])
    parser.add_argument("--plain", action="store_true", help="know no more than the chapter")
    return parser.parse_args()


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, engine: FakeEngine) -> None:
    component = runtime.namespace("inference").component("engine")
    await component.create_service()
    await component.endpoint("generate").serve_endpoint(engine.generate)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker(FakeEngine(parse_args())))
