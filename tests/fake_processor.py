"""A stand-in for processor.py: as little as the chapter asks of a processor, or the garbage that `user` names."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import uvloop

from common.dynamo.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker

END = {"finish_reason": "stop", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
GARBAGE: dict[str, list[Any]] = {
    "not-a-dict": ["text"],
    "a-list": [[1, 2, 3]],
    "null": [None],
    "number-as-content": [{"content": 7}],
    "wrong-finish-reason": [{"content": "a"}, {"finish_reason": "tired"}],
    "negative-choice": [{"index": -1, "content": "a"}],
    "choice-nobody-asked-for": [{"index": 5, "content": "a"}],
    "wrong-usage": [{"content": "a", "finish_reason": "stop", "usage": {"prompt_tokens": "many"}}],
    "wrong-logprobs": [{"content": "a", "logprobs": [7]}],
    "bytes-in-logprobs": [{"content": "a", "logprobs": [{"token": b"\xff", "logprob": 0.0, "bytes": None}]}],
    "error-text": [{"error": "some internal text"}],
    "error-number": [{"error": 7}],
    "huge-junk": [{"junk": "x" * 10_000_000, "content": 7}],
    "huge-list": [{"content": list(range(1_000_000))}],
}
ENDLESS: dict[str, Any] = {
    "endless-nothing": {},
    "endless-empty": {"content": "", "finish_reason": None},
    "endless-text": {"content": "x" * 10_000},
}


async def process(request: dict[str, Any], context: Context) -> AsyncGenerator[Any, None]:
    if request.get("describe"):
        raise KeyError("messages")
    kind = request.get("user")
    if kind in ENDLESS:
        while not context.is_stopped():
            yield ENDLESS[kind]
            await asyncio.sleep(0)
    else:
        for item in GARBAGE.get(kind, [{"content": "Hello from afar."}, END]):
            yield item


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime) -> None:
    component = runtime.namespace("inference").component("processor")
    await component.create_service()
    await component.endpoint("process").serve_endpoint(process)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker())
