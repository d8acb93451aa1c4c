"""One keep-alive HTTP/1.1 connection that times what comes back.

Knows OpenAI's chat completions only as bytes: nothing is parsed as JSON while a stream runs, so that the client
costs a few microseconds an event and is not what limits a measurement.
"""

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import cast

import httptools

_NUM_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_CONTENT = re.compile(rb'"content":\s*"[^"]')
_ERROR = re.compile(rb'(^|data: )\{"error"')
_TAIL_BYTES = 2048
_TIMEOUT_S = 120.0


@dataclass
class Reply:
    """What one request brought. Times in seconds of `time.perf_counter`.

    first_content_at: when the first text of a stream arrived; 0 without streaming.
    arrivals: when each batch of events was read; several events in one read are one arrival, as for any client.
    """

    sent_at: float
    finished_at: float = 0.0
    first_content_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    num_events: int = 0
    num_tokens: int = 0
    error: str | None = None


def http_request(host: str, path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection(asyncio.Protocol):
    """Sends one request at a time; `ask` returns once the whole answer is there."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)

    @classmethod
    async def connect(cls, host: str, port: int) -> "Connection":
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def ask(self, request: bytes, *, is_stream: bool) -> Reply:
        assert self._transport is not None
        self._is_stream = is_stream
        self._tail = b""
        self._done = asyncio.get_running_loop().create_future()
        self._reply = reply = Reply(sent_at=time.perf_counter())
        timer = asyncio.get_running_loop().call_later(_TIMEOUT_S, self._give_up)
        self._transport.write(request)
        await self._done
        timer.cancel()
        reply.finished_at = time.perf_counter()
        self._judge(reply)
        return reply

    def _give_up(self) -> None:
        self._reply.error = f"no whole answer within {_TIMEOUT_S:.0f} s"
        self.close()

    def _judge(self, reply: Reply) -> None:
        counts = _NUM_TOKENS.findall(self._tail)
        if reply.error is None and (_ERROR.search(self._tail) or not counts):
            reply.error = self._tail[-300:].decode(errors="replace") or "an empty answer"
        if reply.error is None and self._is_stream and b"[DONE]" not in self._tail:
            reply.error = "a stream without [DONE]"
        reply.num_tokens = int(counts[-1]) if counts else 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        num_events_before = self._reply.num_events
        self._now = time.perf_counter()
        self._parser.feed_data(data)
        if self._reply.num_events != num_events_before:
            self._reply.arrivals.append(self._now)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._done is not None and not self._done.done():
            self._reply.error = self._reply.error or f"the connection was closed: {exc}"
            self._done.set_result(None)

    # httptools calls these

    def on_body(self, body: bytes) -> None:
        reply = self._reply
        if self._is_stream:
            reply.num_events += body.count(b"data: ")
            if not reply.first_content_at and _CONTENT.search(body):
                reply.first_content_at = self._now
            self._tail = (self._tail + body)[-_TAIL_BYTES:] if len(body) < _TAIL_BYTES else body
        else:
            self._tail += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._reply.error = f"{status}: {self._tail[:300].decode(errors='replace')}"
        if not self._parser.should_keep_alive():
            self.is_open = False
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
