"""HTTP by hand, for clients that no HTTP library would be: they stop in the middle, read slowly, or not at all."""

import json
import socket

from tests.processes import MODEL, Pipeline

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}
CHAT_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def connect(pipeline: Pipeline, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection to the frontend; with a small `receive_buffer`, what is not read soon holds up the sender."""
    client = socket.socket()
    client.settimeout(30)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((pipeline.address, pipeline.http_port))
    return client


def chat_request(**fields: object) -> bytes:
    """A whole chat request."""
    body = json.dumps(CHAT | fields).encode()
    return CHAT_HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def open_request(pipeline: Pipeline, *, receive_buffer: int | None = None, **fields: object) -> socket.socket:
    """A chat request that was sent and not yet answered; closing the socket abandons it."""
    client = connect(pipeline, receive_buffer=receive_buffer)
    client.sendall(chat_request(**fields))
    return client


def read_until_closed(client: socket.socket) -> bytes:
    """What still comes, until the other side closes or resets the connection."""
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received
