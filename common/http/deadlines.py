"""Connections that make no progress are closed: uvicorn by itself waits for ever for headers and for readers."""

import asyncio
import socket

from common.http.protocol import GuardedProtocol

# What a client that does not read makes us keep in the kernel, at most (it doubles the number).
_SEND_BUFFER_BYTES = 128 * 1024


class DeadlineProtocol(GuardedProtocol):
    """uvicorn's protocol with a deadline for each thing that a client may take its time over.

    header_timeout_s: from the connection, or a request's first byte, to its last header. body_timeout_s: from there
    to its last byte. send_timeout_s: until a client that lets answers pile up has read some of them.
    """

    header_timeout_s: float
    body_timeout_s: float
    send_timeout_s: float

    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._receive_within(self.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._received()
        self._sent()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receive_within(self.header_timeout_s)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._receive_within(self.body_timeout_s)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._received()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sent()
        self._sending = self.loop.call_later(self.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sent()

    def _receive_within(self, timeout_s: float) -> None:
        self._received()
        self._receiving = self.loop.call_later(timeout_s, self._on_late_request, timeout_s)

    def _on_late_request(self, timeout_s: float) -> None:
        """Close, unless an answer is still going out: it has deadlines of its own."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._receive_within(timeout_s)
        else:
            self.transport.close()

    def _received(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _sent(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None


def protocol_with(*, header_timeout_s: float, body_timeout_s: float, send_timeout_s: float) -> type[DeadlineProtocol]:
    """The class that uvicorn makes its connections of."""
    deadlines = {"header_timeout_s": header_timeout_s, "body_timeout_s": body_timeout_s}
    return type("Protocol", (DeadlineProtocol,), {**deadlines, "send_timeout_s": send_timeout_s})


def limit_unread(listener: socket.socket, timeout_s: float) -> None:
    """For all connections of `listener`: how much may lie unread in the kernel, and for how long after we closed."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
