"""Minutes of mixed load while parts are killed, restarted and cut off: python -m tests.soak

Two processors and two engines of made-up tokens behind one frontend, with real NATS and etcd. SOAK_MINUTES is how
long (default 10), SOAK_SEED which faults (default: new ones each time). It ends with 1 where an answer was wrong, a
request hung past its deadline, a process was lost or grew, or the pipeline did not come back.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.processes import MODEL, Infra, Pipeline, Process, running

REQUEST_TIMEOUT_S = 60.0
HANG_S = REQUEST_TIMEOUT_S + 10
NUM_CLIENTS = 6
MAX_GROWTH_BYTES = 60_000_000

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
STOP = "<stop>"  # replaced by a piece of the answer, once that is known
KINDS: dict[str, dict[str, Any]] = {
    "whole": {"max_tokens": 40},
    "long": {"max_tokens": 300},
    "stream": {"max_tokens": 100, "stream": True},
    "two choices": {"max_tokens": 40, "n": 2},
    "two streamed choices": {"max_tokens": 40, "n": 2, "stream": True},
    "stop string": {"max_tokens": 200, "stop": STOP},
    "streamed stop string": {"max_tokens": 200, "stop": STOP, "stream": True},
    "abandoned": {"max_tokens": 2000, "stream": True},
}
Answer = dict[int, tuple[str, str]]


@dataclass
class Record:
    """What the clients saw. outcomes: how often each kind of request ended in which way. journal: faults and failed
    requests in the order of time, so that each failure can be traced to a fault.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    journal: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def note(self, what: str) -> None:
        self.journal.append(f"{time.monotonic() - self.started:6.1f} s  {what}")

    def note_fault(self, what: str, detail: str = "") -> None:
        self.faults[what] += 1
        self.note(f"{what}{detail}")


async def ask(client: httpx.AsyncClient, body: dict[str, Any], *, is_abandoned: bool = False) -> Answer | str:
    """Text and finish_reason of each choice, or in a word what came in their place."""
    if not body.get("stream"):
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return f"{response.status_code} {response.json()['error']['code']}"
        choices = response.json()["choices"]
        return {choice["index"]: (choice["message"]["content"], choice["finish_reason"]) for choice in choices}
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return f"{response.status_code} {json.loads(await response.aread())['error']['code']}"
        num_events = 0
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not data:
                continue
            if data == "[DONE]":
                return {index: (texts[index], reasons[index]) for index in reasons}
            event = json.loads(data)
            if "error" in event:
                return f"in the stream: {event['error']['code']}"
            for choice in event["choices"]:
                index = choice["index"]
                texts[index] = texts.get(index, "") + choice["delta"].get("content", "")
                if choice["finish_reason"]:
                    reasons[index] = choice["finish_reason"]
            num_events += 1
            if is_abandoned and num_events > 10:
                return "left"
    return "in the stream: no end"


async def learn(client: httpx.AsyncClient) -> dict[str, Answer]:
    """The right answer to each kind, from the undisturbed pipeline; puts the stop string in its place."""
    whole = await ask(client, BODY | {"max_tokens": 200})
    assert isinstance(whole, dict), whole
    stop = whole[0][0][150:156]
    right: dict[str, Answer] = {}
    for kind, fields in KINDS.items():
        if fields.get("stop") == STOP:
            fields["stop"] = stop
        if kind != "abandoned":
            answer = await ask(client, BODY | fields)
            assert isinstance(answer, dict), (kind, answer)
            right[kind] = answer
    # What is streamed is what is sent whole, and an answer is the beginning of every longer one.
    assert right["two choices"] == right["two streamed choices"]
    assert right["stop string"] == right["streamed stop string"]
    assert right["stop string"][0] == (whole[0][0][: whole[0][0].index(stop)], "stop")
    assert whole[0][0].startswith(right["stream"][0][0])
    return right


async def load(client: httpx.AsyncClient, right: dict[str, Answer], record: Record, end: float) -> None:
    while time.monotonic() < end:
        kind = random.choice(list(KINDS))
        started = time.monotonic()
        try:
            async with asyncio.timeout(HANG_S):
                answer = await ask(client, BODY | KINDS[kind], is_abandoned=kind == "abandoned")
        except TimeoutError:
            answer = "hung"
            record.problems.append(f"{kind}: no end after {HANG_S:.0f} s")
        except httpx.HTTPError as error:
            answer = type(error).__name__
        took_s = time.monotonic() - started
        record.longest_s = max(record.longest_s, took_s)
        if isinstance(answer, dict):
            if answer != right[kind]:
                record.problems.append(f"{kind}: wrong: {answer!r} instead of {right[kind]!r}")
            answer = "answered"
        record.outcomes[kind, answer] += 1
        if answer not in ("answered", "left"):
            record.note(f"FAILED after {took_s:.1f} s: {kind}: {answer}")
            await asyncio.sleep(0.5)


def is_serving(worker: Process) -> bool:
    """Whether the process has come up since it was last started: before that, SIGTERM finds nobody to drain."""
    return "serving inference/" in worker.log_since_start


async def one_fault(infra: Infra, workers: list[Process], record: Record) -> None:
    what = random.choice(["kill", "kill", "restart", "restart", "etcd", "nats"])
    ready = [worker for worker in workers if is_serving(worker)]
    if not ready and what == "restart":
        what = "kill"
    if what in ("etcd", "nats"):
        server: Process = getattr(infra, what)
        away_s = random.choice([3, 3, 12])
        record.note_fault(f"{what} away for {away_s} s")
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(away_s)
        server.start()
        return
    worker = random.choice(ready or workers)
    record.note_fault(f"{what} {Path(worker.name).stem}", f" ({worker.log_path.stem})")
    if what == "kill":
        await asyncio.to_thread(worker.kill)
    elif (code := await asyncio.to_thread(worker.terminate, 90)) != 0:
        record.problems.append(f"{worker.name} ended with {code} on SIGTERM")
    worker.start()


async def harm(pipeline: Pipeline, record: Record, end: float) -> None:
    """A fault every few seconds. The frontend is spared: it is the one that everything is seen through."""
    frontend, *workers = pipeline.processes
    while True:
        await asyncio.sleep(random.uniform(2, 6))
        if time.monotonic() > end:
            return
        await one_fault(pipeline.infra, workers, record)
        for process in pipeline.processes:
            if not process.is_alive:
                record.problems.append(f"{process.name} is gone: {process.log[-1500:]}")
                process.start()
        if not frontend.is_alive:
            return


def memory(pipeline: Pipeline) -> list[tuple[str, int, int]]:
    """Name, pid and bytes of each process."""
    infra = pipeline.infra
    return [
        (p.name, p.pid, psutil.Process(p.pid).memory_info().rss) for p in [*pipeline.processes, infra.nats, infra.etcd]
    ]


async def soak(pipeline: Pipeline, duration_s: float) -> Record:
    record = Record()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=pipeline.url, timeout=HANG_S + 5, limits=limits) as client:
        right = await learn(client)
        warm_up = time.monotonic() + min(10, duration_s / 6)
        await asyncio.gather(*(load(client, right, record, warm_up) for _ in range(NUM_CLIENTS)))
        before = memory(pipeline)
        end = time.monotonic() + duration_s
        clients = [load(client, right, record, end) for _ in range(NUM_CLIENTS)]
        await asyncio.gather(harm(pipeline, record, end - 15), *clients)
        await asyncio.to_thread(pipeline.wait_ready, 60, processors=2, engines=2)
        for kind, answer in right.items():
            if await ask(client, BODY | KINDS[kind]) != answer:
                record.problems.append(f"{kind}: wrong after the end")
    for (name, old_pid, old), (_, pid, new) in zip(before, memory(pipeline), strict=True):
        note = "" if pid == old_pid else " (started anew)"
        print(f"memory of {name}: {old / 1e6:.0f} MB, at the end {new / 1e6:.0f} MB{note}")
        if new > old + MAX_GROWTH_BYTES:
            record.problems.append(f"{name} grew by {(new - old) / 1e6:.0f} MB")
    return record


def report(record: Record) -> None:
    sent = sum(record.outcomes.values())
    answered = sum(count for (_, outcome), count in record.outcomes.items() if outcome == "answered")
    left = sum(count for (_, outcome), count in record.outcomes.items() if outcome == "left")
    print(f"{sent} sent, {answered} answered, {left} left early, {sent - answered - left} failed")
    for (kind, outcome), count in sorted(record.outcomes.items()):
        if outcome not in ("answered", "left"):
            print(f"  {kind}: {outcome}: {count}")
    if sent > answered + left:
        print("\n".join(record.journal))
    print(f"longest wait {record.longest_s:.1f} s")
    print("faults: " + ", ".join(f"{what}: {count}" for what, count in sorted(record.faults.items())))
    for problem in record.problems:
        print(f"PROBLEM: {problem}")


def main() -> int:
    duration_s = float(os.environ.get("SOAK_MINUTES", "10")) * 60
    seed = int(os.environ.get("SOAK_SEED") or random.randrange(10**6))
    random.seed(seed)
    print(f"soak: {duration_s:.0f} s, SOAK_SEED={seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    infra = Infra(folder / "infra")
    with running(infra.start()), running(pipeline := Pipeline(infra, folder / "scripts")):
        pipeline.frontend("--request-timeout", str(REQUEST_TIMEOUT_S))
        for _ in range(2):
            pipeline.processor()
            pipeline.fake_engine("--token-interval-ms", "5")
        pipeline.wait_ready(120, processors=2, engines=2)
        record = asyncio.run(soak(pipeline, duration_s))
    report(record)
    print(f"logs: {folder}")
    return bool(record.problems)


if __name__ == "__main__":
    sys.exit(main())
