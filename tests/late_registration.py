"""A worker for one test: it begins to serve in the moment in which etcd is away."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import uvloop

from common.dynamo.network import ServersMissing, wait_for_servers
from common.dynamo.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker


async def generate(request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
    yield {"finish_reason": "stop"}


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime) -> None:
    print("connected", flush=True)
    while True:
        try:
            await wait_for_servers(0)
        except ServersMissing:
            break
        await asyncio.sleep(0.02)
    await runtime.namespace("inference").component("engine").endpoint("generate").serve_endpoint(generate)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker())
