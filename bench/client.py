"""A closed loop of keep-alive connections: each user sends again once answered.

It shares the machine's cores with the servers that it measures, so nothing is parsed as JSON here: an answer costs it
less than a twentieth of what any of the servers takes (docs/performance.md).
"""

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea body information
back parent face others level office door health person art war history party result change morning reason
research
"""
_NUM_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_CONTENT = re.compile(rb'"content":\s*"[^"]')
_ERROR = re.compile(rb'(^|data: )\{"error"')
_TAIL_BYTES = 2048
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Load:
    """`num_users` at once, each `requests_per_user` times.

    first_prompt: no two loads of a run share prompts, or the prefix cache would answer for the model.
    """

    num_users: int = 1
    requests_per_user: int = 1
    is_stream: bool = False
    max_tokens: int = 128
    num_prompt_words: int = 64
    first_prompt: int = 0

    @property
    def num_requests(self) -> int:
        return self.num_users * self.requests_per_user

    @property
    def prompts(self) -> list[str]:
        words, indices = _WORDS.split(), range(self.first_prompt, self.first_prompt + self.num_requests)
        return [" ".join(random.Random(index).choices(words, k=self.num_prompt_words)) for index in indices]


@dataclass
class Reply:
    """Times in seconds of `time.perf_counter`, which all processes of a machine share.

    first_content_at: of a stream's first text. arrivals: of each read that brought events.
    """

    sent_at: float
    finished_at: float = 0.0
    first_content_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


@dataclass
class Outcome:
    replies: list[Reply]
    seconds: float
    client_cpu_s: float = 0.0


class Connection(asyncio.Protocol):
    """Sends one request at a time; `ask` returns once the whole answer is there."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, request: bytes, load: Load) -> Reply:
        self._tail, self._is_stream = b"", load.is_stream
        self._done = asyncio.get_running_loop().create_future()
        self._reply = reply = Reply(sent_at=time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._done
        except (TimeoutError, ConnectionError) as error:
            reply.error = f"no whole answer: {error!r}"
        reply.finished_at = time.perf_counter()
        counts = _NUM_TOKENS.findall(self._tail)
        reply.num_tokens = int(counts[-1]) if counts else 0
        has_end = b"[DONE]" in self._tail or not load.is_stream
        if reply.error is None and (reply.num_tokens != load.max_tokens or not has_end or _ERROR.search(self._tail)):
            reply.error = f"{reply.num_tokens} tokens instead of {load.max_tokens}: {self._tail[-300:]!r}"
        return reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._now, self._has_event = time.perf_counter(), False
        self._parser.feed_data(data)
        if self._has_event:
            self._reply.arrivals.append(self._now)

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "_done") and not self._done.done():
            self._done.set_exception(ConnectionError("closed"))

    def close(self) -> None:
        self._transport.close()

    def on_body(self, body: bytes) -> None:
        self._has_event = self._is_stream
        if self._is_stream and not self._reply.first_content_at and _CONTENT.search(body):
            self._reply.first_content_at = self._now
        self._tail = (self._tail + body)[-_TAIL_BYTES:]

    def on_message_complete(self) -> None:
        if (status := self._parser.get_status_code()) != 200:
            self._reply.error = f"{status}: {self._tail[:300]!r}"
        if not self._done.done():
            self._done.set_result(None)


def _requests(url: str, model: str, load: Load) -> list[bytes]:
    body = {"model": model, "max_tokens": load.max_tokens, "ignore_eos": True, "stream": load.is_stream}
    if load.is_stream:
        body["stream_options"] = {"include_usage": True}
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    bodies = (json.dumps(body | {"messages": [{"role": "user", "content": prompt}]}) for prompt in load.prompts)
    return [f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode() for text in bodies]


async def _run(url: str, model: str, load: Load) -> Outcome:
    requests, loop = _requests(url, model, load), asyncio.get_running_loop()
    host, port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)
    connections = [(await loop.create_connection(Connection, host, port))[1] for _ in range(load.num_users)]

    async def user(index: int, connection: Connection) -> list[Reply]:
        return [await connection.ask(request, load) for request in requests[index :: load.num_users]]

    started_at, cpu_before = time.perf_counter(), time.process_time()
    answered = await asyncio.gather(*(user(*each) for each in enumerate(connections)))
    seconds, client_cpu_s = time.perf_counter() - started_at, time.process_time() - cpu_before
    for connection in connections:
        connection.close()
    return Outcome([reply for replies in answered for reply in replies], seconds, client_cpu_s)


def run_load(url: str, model: str, load: Load) -> Outcome:
    """Put the load on the server, and wait for all answers."""
    return uvloop.run(_run(url, model, load))
