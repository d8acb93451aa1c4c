"""A server that answers at once, to find out what the load client itself can do.

`python -m bench.instant_server PORT`: for each request a finished answer of `max_tokens` tokens, streamed as one
event a token. The only question here is how fast a client can read it.
"""

import asyncio
import re
import sys
from typing import cast

import uvloop

_NUM_TOKENS = re.compile(rb'"max(?:_completion)?_tokens": ?(\d+)')
_LENGTH = re.compile(rb"content-length: ?(\d+)", re.IGNORECASE)
_EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"instant","choices":'
    b'[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class InstantServer(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if blank and head.startswith(b"GET"):  # SGLang's client asks for more than chats
            self._received = b""
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        length = _LENGTH.search(head)
        if not blank or length is None or len(body) < int(length[1]):
            return
        self._received = b""
        found = _NUM_TOKENS.search(body)
        num_tokens = int(found[1]) if found else 1
        usage = b'"usage":{"completion_tokens":%d}' % num_tokens
        if b'"stream": true' not in body:
            answer = b'{"choices":[{"message":{"content":"%s"}}],%s}' % (b" token" * num_tokens, usage)
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
            return
        self._transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(num_tokens):  # a write each, as servers do
            self._transport.write(_chunk(_EVENT))
        self._transport.write(_chunk(b'data: {"choices":[],%s}\n\ndata: [DONE]\n\n' % usage) + b"0\r\n\r\n")


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(InstantServer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
