"""Load on a server: closed loop (each user sends again once answered) or open loop (arrivals at random).

Several processes where one would be the limit; they share nothing, and start at the same moment.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import uvloop

from bench.http_client import Connection, Reply, http_request
from bench.prompts import prompt

_START_DELAY_S = 0.3  # to build the requests and open the connections
_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Load:
    """What to send. Closed loop: `num_users` at once, each `requests_per_user` times. Open loop: with `rate_per_s`,
    requests arrive at random (Poisson) for `duration_s`, however many are still unanswered.

    first_prompt: no two loads of a run share prompts, or the prefix cache would answer for the model.
    """

    url: str
    model: str
    num_users: int = 1
    requests_per_user: int = 1
    is_stream: bool = False
    max_tokens: int = 128
    num_prompt_words: int = 64
    first_prompt: int = 0
    rate_per_s: float | None = None
    duration_s: float = 10.0

    @property
    def num_requests(self) -> int:
        if self.rate_per_s is None:
            return self.num_users * self.requests_per_user
        return int(self.rate_per_s * self.duration_s)

    def share(self, index: int, num_shares: int) -> "Load":
        """A part of this load, for one process of several."""
        first_prompt = self.first_prompt + index * self.num_requests
        if self.rate_per_s is not None:
            return replace(self, rate_per_s=self.rate_per_s / num_shares, first_prompt=first_prompt)
        num_users = self.num_users // num_shares + (index < self.num_users % num_shares)
        return replace(self, num_users=num_users, first_prompt=first_prompt)

    def requests(self) -> list[bytes]:
        host = urlsplit(self.url).netloc
        return [
            http_request(host, _PATH, json.dumps(self._body(self.first_prompt + index)).encode())
            for index in range(self.num_requests)
        ]

    def _body(self, index: int) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt(index, self.num_prompt_words)}],
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": self.is_stream,
        }
        return body | ({"stream_options": {"include_usage": True}} if self.is_stream else {})


@dataclass
class Outcome:
    """What came back. Times of `time.perf_counter`, which all processes of a machine share."""

    replies: list[Reply]
    started_at: float
    client_cpu_s: float


class Pool:
    """Idle connections; a new one where there is none."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._idle: list[Connection] = []

    async def open(self, num_connections: int) -> None:
        self._idle += [await Connection.connect(*self._address) for _ in range(num_connections)]

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        connection = self._idle.pop() if self._idle else await Connection.connect(*self._address)
        if not connection.is_open:
            connection.close()
            connection = await Connection.connect(*self._address)
        try:
            yield connection
        finally:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


async def _ask(pool: Pool, request: bytes, is_stream: bool) -> Reply:
    try:
        async with pool.connection() as connection:
            return await connection.ask(request, is_stream=is_stream)
    except OSError as error:
        now = time.perf_counter()
        return Reply(sent_at=now, finished_at=now, error=f"no connection: {error}")


async def _closed_loop(pool: Pool, load: Load, requests: list[bytes]) -> list[Reply]:
    async def user(index: int) -> list[Reply]:
        return [await _ask(pool, request, load.is_stream) for request in requests[index :: load.num_users]]

    answered = await asyncio.gather(*(user(index) for index in range(load.num_users)))
    return [reply for replies in answered for reply in replies]


async def _open_loop(pool: Pool, load: Load, requests: list[bytes], started_at: float) -> list[Reply]:
    """A request's time counts from when it was due: a late client must not hide a slow server."""
    assert load.rate_per_s is not None
    gaps = random.Random(load.first_prompt)
    due_at = started_at

    async def at(due_at: float, request: bytes) -> Reply:
        reply = await _ask(pool, request, load.is_stream)
        reply.sent_at = due_at
        return reply

    tasks = []
    for request in requests:
        due_at += gaps.expovariate(load.rate_per_s)
        await asyncio.sleep(due_at - time.perf_counter())
        tasks.append(asyncio.create_task(at(due_at, request)))
    return list(await asyncio.gather(*tasks))


async def _run(load: Load, start_at: float) -> Outcome:
    requests = load.requests()
    pool = Pool(load.url)
    await pool.open(load.num_users)
    await asyncio.sleep(start_at - time.perf_counter())
    started_at, cpu_before = time.perf_counter(), time.process_time()
    if load.rate_per_s is None:
        replies = await _closed_loop(pool, load, requests)
    else:
        replies = await _open_loop(pool, load, requests, started_at)
    pool.close()
    return Outcome(replies, started_at, time.process_time() - cpu_before)


def _run_share(load: Load, start_at: float) -> Outcome:
    return uvloop.run(_run(load, start_at))


def run_load(load: Load, executor: Executor, num_processes: int) -> Outcome:
    """Put the load on the server, and wait for all answers."""
    shares = [load.share(index, num_processes) for index in range(min(num_processes, load.num_users))]
    start_at = time.perf_counter() + _START_DELAY_S
    outcomes = list(executor.map(_run_share, shares, [start_at] * len(shares)))
    return Outcome(
        [reply for outcome in outcomes for reply in outcome.replies],
        min(outcome.started_at for outcome in outcomes),
        sum(outcome.client_cpu_s for outcome in outcomes),
    )
