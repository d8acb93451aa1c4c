"""An endpoint asked directly, without the processes before it: python -m tests.call_endpoint COMPONENT ENDPOINT

Reads requests, a line of JSON each, and prints for each a line of JSON with the dicts that came back.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import uvloop

from common.dynamo.runtime import DistributedRuntime, dynamo_worker
from tests.processes import ROOT, Pipeline


def call_endpoint(
    pipeline: Pipeline, component: str, endpoint: str, requests: Sequence[dict[str, Any]]
) -> list[list[dict[str, Any]]]:
    """One request after the other, in a process of its own; what came back of each."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.call_endpoint", component, endpoint],
        input="\n".join(map(json.dumps, requests)), cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, **pipeline.env, "DYN_LOG": "error"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@dynamo_worker(static=False)
async def _worker(runtime: DistributedRuntime, component: str, endpoint: str, requests: list[dict[str, Any]]) -> None:
    client = await runtime.namespace("inference").component(component).endpoint(endpoint).client()
    while not (instance_ids := await client.instance_ids()):
        await asyncio.sleep(0.05)
    for request in requests:
        print(json.dumps([chunk async for chunk in await client.direct(request, instance_ids[0])]))
    runtime.request_stop()


if __name__ == "__main__":
    uvloop.run(_worker(*sys.argv[1:], list(map(json.loads, sys.stdin))))
