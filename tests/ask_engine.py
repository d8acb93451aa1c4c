"""Asks an engine without a processor in between: a JSON list of requests on stdin, a line of JSON for each answer."""

import asyncio
import json
import os
import sys
from typing import Any

import uvloop

from common.dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, requests: list[dict[str, Any]]) -> None:
    client = await runtime.namespace("inference").component("engine").endpoint("generate").client()
    while not await client.instance_ids():
        await asyncio.sleep(0.02)
    for request in requests:
        chunks = [chunk.data() async for chunk in await client.generate(request, context=Context())]
        print(json.dumps(chunks), flush=True)


if __name__ == "__main__":
    uvloop.run(worker(json.load(sys.stdin)))
    os._exit(0)  # Dynamo's threads outlive the loop
