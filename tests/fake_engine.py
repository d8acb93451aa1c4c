"""A stand-in for engine.py where the model adds nothing: real Dynamo, real wire, made-up tokens.

The token at position p of a sequence is `TOKEN_IDS[p % len]`, prompt included: so an answer that goes on elsewhere
after a fault is the answer that would have been. With --echo the answer is the text of the last message, in SmolLM2's
template, less its first SEED tokens, and an end-of-sequence token. Its faults are chosen on the command line.

With --kv-events it has a cache of prompts, tells of it, and takes its time for each block that it has not cached.
"""

import argparse
import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import uvloop

from common.dynamo.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.observability.request_records import RequestPath
from common.wire import KV_BLOCK_SIZE, EngineDescription, EngineRequest, Envelope, to_wire

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
    "huge-junk": [{"junk": "x" * 10_000_000, "token_ids": "abc"}],
    "huge-list": [{"token_ids": list(range(1_000_000))}],
}
ENDLESS: dict[str, Any] = {"endless": {"token_ids": [1] * 100}, "endless-nothing": {}}


IM_START, IM_END = 1, 2


def last_message(token_ids: list[int]) -> list[int]:
    """The tokens between "<|im_start|>user\\n" and "<|im_end|>", before the answer's own "<|im_start|>"."""
    end = len(token_ids) - 1 - token_ids[::-1].index(IM_END)
    start = end - token_ids[:end][::-1].index(IM_START)
    return token_ids[start + 2 : end]


def with_logprobs(token_ids: list[int], num_top: int | None) -> dict[str, Any]:
    """A chunk. Each token has a logprob of its own: -0.001 times its id; those next to it are a little worse."""
    chunk: dict[str, Any] = {"token_ids": token_ids}
    if num_top is not None:
        chunk["log_probs"] = [-token_id / 1000 for token_id in token_ids]
        chunk["top_logprobs"] = [
            [[(token_id + rank) % 49152, -token_id / 1000 - rank] for rank in range(num_top)] for token_id in token_ids
        ]
    return chunk


class FakeCache:
    """The blocks of prompts that were used last. Prompts are computed one after the other."""

    def __init__(self, num_blocks: int, ms_per_block: float) -> None:
        from common.routing.kv_blocks import CachedBlocks  # not on a Dynamo that is older than its index

        self.told = CachedBlocks()
        self._num_blocks, self._ms_per_block = num_blocks, ms_per_block
        self._prefixes: dict[int, None] = {}  # the hashes, the one that is to go first in front
        self._computing = asyncio.Lock()

    async def compute(self, token_ids: list[int]) -> int:
        """How many tokens were cached."""
        async with self._computing:
            ends = range(KV_BLOCK_SIZE, len(token_ids) + 1, KV_BLOCK_SIZE)
            prefixes = {hash(tuple(token_ids[:end])): token_ids[end - KV_BLOCK_SIZE : end] for end in ends}
            new = [prefix for prefix in prefixes if prefix not in self._prefixes]
            await asyncio.sleep(self._ms_per_block * len(new) / 1000)
            parent = None
            for prefix, block in prefixes.items():
                self.told.store(prefix, parent, block)
                parent = prefix
            for prefix in reversed(prefixes):  # a block goes before the one that it follows
                self._prefixes.pop(prefix, None)
                self._prefixes[prefix] = None
            self.told.remove([self._pop() for _ in range(len(self._prefixes) - self._num_blocks)])
            self.told.publish()
            return (len(prefixes) - len(new)) * KV_BLOCK_SIZE

    def _pop(self) -> int:
        oldest = next(iter(self._prefixes))
        del self._prefixes[oldest]
        return oldest


class FakeEngine:
    """Answers `generate` requests at a set pace. token_ids: what the answers are made of."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.num_running = 0
        self.cache = FakeCache(args.cache_blocks, args.ms_per_block) if args.kv_events else None
        self.description = EngineDescription(
            "fake",
            context_length=args.context_length,
            vocab_size=args.vocab_size,
            is_seed_supported=True,
            tokenizer_sha256=args.tokenizer_sha256,
            can_constrain=args.can_constrain,
        )

    async def generate(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        if request.get("describe"):
            if self.args.plain:
                raise KeyError("token_ids")
            if self.cache is not None:
                self.description.cache = self.cache.told.describe(self.args.cache_blocks * KV_BLOCK_SIZE)
            yield {**to_wire(self.description), "finish_reason": "stop"}
            return
        envelope = Envelope.taken_from(request)
        path = RequestPath() if envelope.show_path and not self.args.plain else None
        self.num_running += 1
        request_id = envelope.request_id
        logger.info("request %s: running %d", request_id, self.num_running)
        try:
            async for item in self.answer(request, context):
                if path is not None:
                    path.answering()
                    if item.get("finish_reason"):
                        item = {**item, "path": to_wire(path.trace)}
                yield item
        finally:
            self.num_running -= 1
            logger.info("request %s: running %d, stopped %s", request_id, self.num_running, context.is_stopped())

    async def answer(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        args = self.args
        if args.garbage in ENDLESS:
            while not context.is_stopped():
                yield ENDLESS[args.garbage]
                await asyncio.sleep(0)
            return
        if args.garbage:
            for item in GARBAGE[args.garbage]:
                yield item
            return
        engine_request: EngineRequest = EngineRequest.read(request)
        token_ids, finish_reason = self.answer_to(engine_request)
        first_token_at = asyncio.get_running_loop().time() + args.first_token_ms / 1000
        while (rest_s := first_token_at - asyncio.get_running_loop().time()) > 0 and not context.is_stopped():
            await asyncio.sleep(min(rest_s, 0.05))
        end: dict[str, Any] = {"finish_reason": finish_reason}
        if self.cache is not None:
            num_cached = await self.cache.compute(engine_request.token_ids)
            logger.info("cached %d of %d", num_cached, len(engine_request.token_ids))
            end["cached_tokens"] = num_cached
        if args.whole and not engine_request.output_options.stream:
            await asyncio.sleep(args.token_interval_ms * len(token_ids) / 1000)
            yield with_logprobs(token_ids, engine_request.output_options.logprobs) | end
            return
        for at in range(0, len(token_ids), args.tokens_per_chunk):
            if context.is_stopped():
                return
            new = token_ids[at : at + args.tokens_per_chunk]
            yield with_logprobs(new, engine_request.output_options.logprobs)
            if args.token_interval_ms:
                await asyncio.sleep(args.token_interval_ms * len(new) / 1000)
        yield end

    def answer_to(self, request: EngineRequest) -> tuple[list[int], str]:
        """All tokens of an answer, and why it ends."""
        max_tokens = request.stop_conditions.max_tokens or 16
        if self.args.echo:
            whole = [*last_message(request.token_ids)[request.sampling_options.seed or 0 :], IM_END]
            return whole[:max_tokens], "stop" if len(whole) <= max_tokens else "length"
        source, start = self.args.token_ids, len(request.token_ids)
        return [source[at % len(source)] for at in range(start, start + max_tokens)], "length"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--token-ids", type=lambda text: [int(token_id) for token_id in text.split(",")], default=[1000]
    )
    parser.add_argument("--echo", action="store_true", help="answer the last message with itself")
    parser.add_argument("--tokens-per-chunk", type=int, default=1)
    parser.add_argument("--token-interval-ms", type=float, default=0.0)
    parser.add_argument("--first-token-ms", type=float, default=0.0, help="how long the prompt takes")
    parser.add_argument("--whole", action="store_true", help="say nothing until the end, where nobody streams")
    parser.add_argument("--garbage", choices=[*GARBAGE, *ENDLESS])
    parser.add_argument("--context-length", type=int, default=8192)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--tokenizer-sha256", default="")
    parser.add_argument("--can-constrain", action="store_true", help="say that it has grammars, and ignore them")
    parser.add_argument("--kv-events", action="store_true", help="have a cache, and tell of it")
    parser.add_argument("--cache-blocks", type=int, default=10_000)
    parser.add_argument("--ms-per-block", type=float, default=0.0, help="how long a block takes that is not cached")
    parser.add_argument("--plain", action="store_true", help="know no more than the chapter")
    return parser.parse_args()


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, engine: FakeEngine) -> None:
    component = runtime.namespace("inference").component("engine")
    await component.create_service()
    endpoints = [component.endpoint("generate").serve_endpoint(engine.generate)]
    if engine.cache is not None:
        kv_events = component.endpoint("kv_events")
        endpoints.append(kv_events.serve_endpoint(engine.cache.told.events, graceful_shutdown=False))
    await asyncio.gather(*endpoints)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker(FakeEngine(parse_args())))
