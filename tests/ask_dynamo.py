"""Asks the installed Dynamo what docs/dynamo-releases.md says of it, and prints the answer as JSON.

Each question gets a process of its own: 0.5 opens one runtime a process, and Rust reads its variables once.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop

from tests.processes import Infra, Pipeline

Items = AsyncGenerator[dict[str, Any], None]


async def until(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def vocabulary(infra: Infra) -> dict[str, Any]:
    """Which of the chapter's words does Dynamo itself know?"""
    from dynamo import runtime

    try:
        runtime.dynamo_worker(static=False)
    except TypeError:
        takes_static = False
    else:
        takes_static = True
    return {
        "dynamo_worker(static=False)": takes_static,
        "namespace()": hasattr(runtime.DistributedRuntime, "namespace"),
        "endpoint()": hasattr(runtime.DistributedRuntime, "endpoint"),
    }


async def registration(infra: Infra) -> dict[str, Any]:
    """With nothing said about planes: what does serving need, and what does it write to etcd?"""
    from dynamo.runtime import dynamo_worker

    found: dict[str, Any] = {}

    async def handler(request: Any, context: Any) -> Items:
        yield {}

    @dynamo_worker()
    async def worker(runtime: Any) -> None:
        if hasattr(runtime, "namespace"):
            component = runtime.namespace("inference").component("engine")
            try:
                await component.endpoint("too_early").serve_endpoint(handler)
            except Exception as error:
                found["without create_service()"] = str(error)
            await component.create_service()
            found["create_service() writes"] = infra.etcdctl("get", "--prefix", "")
            endpoint = component.endpoint("generate")
        else:
            endpoint = runtime.endpoint("inference.engine.generate")
        served = asyncio.ensure_future(endpoint.serve_endpoint(handler))
        await until(infra.instance_keys)
        key, _, entry = infra.etcdctl("get", "--prefix", "").partition("\n")
        found["key"] = key.rstrip("0123456789abcdef")
        found["transport"] = list(json.loads(entry)["transport"])
        served.cancel()

    await worker()
    return found


async def etcd_away(infra: Infra) -> dict[str, Any]:
    """What becomes of a service when etcd comes back with nothing in it?"""
    from common.dynamo import releases

    async def handler(request: Any, context: Any) -> Items:
        yield {}

    runtime = await releases.open_runtime()
    endpoint = await releases.open_endpoint(runtime, "inference", "engine", "generate", serve=True)
    served = asyncio.ensure_future(endpoint.serve_endpoint(handler))
    await until(infra.instance_keys)
    infra.etcd.kill()
    infra.forget()
    started = time.monotonic()
    infra.etcd.start()
    await until(served.done)
    found: dict[str, Any] = {"ends at once": time.monotonic() - started < 5}
    try:
        await releases.open_runtime()
    except Exception as error:
        found["another runtime"] = str(error)
    else:
        found["another runtime"] = "opens"
    return found | {"CAN_REOPEN": releases.CAN_REOPEN}


class ABug(Exception):
    """One whose name does not tell that it is an exception."""


async def calls(infra: Infra) -> dict[str, Any]:
    """How do calls fail, and what becomes of a stop before the first item?"""
    from common.dynamo import releases
    from common.dynamo.failover import too_large_for_nats

    async def handler(request: dict[str, Any], context: Any) -> Items:
        if request["ask"] == "raise":
            raise ValueError("a bug")
        if request["ask"] == "raise another":
            raise ABug
        if request["ask"] == "what cannot be sent":
            yield {"object": object()}
        for number in range(20):
            if context.is_stopped():
                return
            yield {"number": number}
            await asyncio.sleep(0.05)

    runtime = await releases.open_runtime()
    endpoint = await releases.open_endpoint(runtime, "inference", "engine", "generate", serve=True)
    served = asyncio.ensure_future(endpoint.serve_endpoint(handler))
    client = await releases.open_client(endpoint)
    await until(client.instance_ids)
    (instance_id,) = client.instance_ids()

    async def meaning(request: dict[str, Any], instance_id: int) -> list[str]:
        try:
            async for _ in await client.direct(request, instance_id, context=releases.Context()):
                pass
        except Exception as error:
            rules = {
                "raised": releases.is_raised_by_worker(error),
                "too large": await too_large_for_nats(request, error) is not None,
                "unanswered": releases.is_unanswered(error),
                "ruled out": releases.is_ruled_out(client, instance_id, error),
            }
            return [rule for rule, holds in rules.items() if holds]
        return ["no error"]

    async def num_items_after_a_stop() -> int:
        context = releases.Context()
        stream = await client.direct({"ask": "count"}, instance_id, context=context)
        context.stop_generating()
        return len([item async for item in stream])

    found = {
        "a stop of an open stream arrives": await num_items_after_a_stop() < 20,
        "raise": await meaning({"ask": "raise"}, instance_id),
        "raise another": await meaning({"ask": "raise another"}, instance_id),
        "what cannot be sent": await meaning({"ask": "what cannot be sent"}, instance_id),
        "nobody": await meaning({"ask": "count"}, 1234),
    }
    started = time.monotonic()
    found["too large"] = await meaning({"ask": "x" * 2_000_000}, instance_id)
    found["too large is known at once"] = time.monotonic() - started < 2
    runtime.shutdown()
    await served
    return found


async def killed(infra: Infra) -> dict[str, Any]:
    """Which rules know the error of a stream whose worker is killed midway, and of a call while etcd still lists it?"""
    from common.dynamo import releases

    scripts = Pipeline(infra, infra.folder)
    engine = scripts.fake_engine("--token-interval-ms", "20")
    runtime = await releases.open_runtime()
    endpoint = await releases.open_endpoint(runtime, "inference", "engine", "generate", serve=False)
    client = await releases.open_client(endpoint)
    await until(client.instance_ids)
    (instance_id,) = client.instance_ids()

    async def meaning(num_items: int = 0) -> list[str]:
        rules = (releases.is_raised_by_worker, releases.is_too_large, releases.is_unanswered, releases.is_broken)
        try:
            stream = await client.direct({"token_ids": [1]}, instance_id, context=releases.Context())
            async for _ in stream:
                num_items -= 1
                if not num_items:
                    engine.kill()
        except Exception as error:
            return [rule.__name__ for rule in rules if rule(error)]
        return ["no error"]

    return {"midway": await meaning(3), "afterwards": await meaning()}


async def opened(infra: Infra) -> dict[str, Any]:
    """How long does it take to open an endpoint while streams are read, as a process does that connects anew?"""
    from common.dynamo import releases

    async def handler(request: dict[str, Any], context: Any) -> Items:
        for number in range(5):
            yield {"number": number}

    runtime = await releases.open_runtime()
    endpoint = await releases.open_endpoint(runtime, "inference", "engine", "generate", serve=True)
    served = asyncio.ensure_future(endpoint.serve_endpoint(handler))
    client = await releases.open_client(endpoint)
    await until(client.instance_ids)
    is_over = asyncio.Event()

    async def read() -> None:
        while not is_over.is_set():
            async for _ in await client.direct({}, client.instance_ids()[0], context=releases.Context()):
                pass

    reading = [asyncio.create_task(read()) for _ in range(16)]
    longest_s = 0.0
    for _ in range(300):
        await asyncio.sleep(0.002)
        started = time.monotonic()
        await releases.open_endpoint(runtime, "inference", "processor", "process", serve=False)
        longest_s = max(longest_s, time.monotonic() - started)
    is_over.set()
    await asyncio.gather(*reading)
    runtime.shutdown()
    await served
    return {"longest_s": longest_s}


STALLED_READER = """
import asyncio
from common.dynamo import releases

async def read():
    runtime = await releases.open_runtime()
    endpoint = await releases.open_endpoint(runtime, "inference", "engine", "generate", serve=False)
    client = await releases.open_client(endpoint)
    await client.wait_for_instances()
    stream = await client.direct({"size": 3000, "pause_s": 0.002}, client.instance_ids()[0])
    print("reading", flush=True)
    async for _ in stream:
        pass

asyncio.run(read())
"""


async def stalled(infra: Infra) -> dict[str, Any]:
    """How long does the worst of 64 streams pause while the reader of another one, which gets a lot, stands still? And
    how long before that, on this machine?
    """
    from common.dynamo import releases
    from common.dynamo.runtime import DistributedRuntime
    from common.dynamo.service import Serving

    num_items = 0

    async def handler(request: dict[str, Any], context: Any) -> Items:
        nonlocal num_items
        while not context.is_stopped():
            num_items += request["size"] > 1
            yield {"token_ids": [1] * request["size"]}
            await asyncio.sleep(request["pause_s"])

    runtime = await releases.open_runtime()
    endpoint = await releases.open_endpoint(runtime, "inference", "engine", "generate", serve=True)
    served = asyncio.ensure_future(
        endpoint.serve_endpoint(Serving(handler, DistributedRuntime().run_in_background).answer)
    )
    client = await releases.open_client(endpoint)
    await until(client.instance_ids)

    pauses_s: list[tuple[float, float]] = []  # when it ended, how long it was

    async def note_pauses(context: Any) -> None:
        arrived = None
        request = {"size": 1, "pause_s": 0.03}
        async for _ in await client.direct(request, client.instance_ids()[0], context=context):
            before, arrived = arrived, time.monotonic()
            if before is not None:
                pauses_s.append((arrived, arrived - before))

    contexts = [releases.Context() for _ in range(64)]
    others = [asyncio.create_task(note_pauses(context)) for context in contexts]
    reader = await asyncio.create_subprocess_exec(sys.executable, "-c", STALLED_READER, stdout=asyncio.subprocess.PIPE)
    assert reader.stdout is not None
    assert await reader.stdout.readline() == b"reading\n"
    reader.send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    before = -1
    while before != num_items:  # until nothing more of it is taken
        before = num_items
        await asyncio.sleep(1)
    for context in contexts:
        context.stop_generating()
    await asyncio.gather(*others)
    reader.kill()
    await reader.wait()
    runtime.shutdown()
    await served
    usual_s = max(pause_s for ended, pause_s in pauses_s if ended < stopped_at)
    stalled_s = max(pause_s for ended, pause_s in pauses_s if ended >= stopped_at)
    return {"num_items": num_items, "usual_s": usual_s, "stalled_s": stalled_s}


async def main(question: Callable[[Infra], Awaitable[dict[str, Any]]]) -> None:
    with TemporaryDirectory() as folder:
        infra = Infra(Path(folder))
        os.environ.update(infra.env)
        try:
            infra.start()
            print(json.dumps(await question(infra)), flush=True)
        finally:
            infra.stop()
    os._exit(0)  # Dynamo's threads would complain about the servers' end


if __name__ == "__main__":
    questions = (vocabulary, registration, etcd_away, calls, killed, opened, stalled)
    uvloop.run(main({question.__name__: question for question in questions}[sys.argv[1]]))
