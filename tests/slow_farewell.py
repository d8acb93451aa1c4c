"""A worker for one test: its handler has to wait for something when nobody reads its stream any more."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

import uvloop

from common.dynamo.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker


async def generate(request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
    if request.get("describe"):
        raise KeyError("token_ids")
    try:
        for number in range(request["stop_conditions"]["max_tokens"]):
            yield {"token_ids": [number]}
            await asyncio.sleep(0.02)
    finally:
        await asyncio.sleep(0.1)
        print("closed", "on the loop" if threading.current_thread() is threading.main_thread() else "elsewhere")


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime) -> None:
    await runtime.namespace("inference").component("engine").endpoint("generate").serve_endpoint(generate)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker())
