"""uvicorn's connections, guarded: upgrades, endless headers, broken framing, slow clients, and closing without a reset.

httptools is kept for its speed: h11 costs 115 µs more per request, and 9 µs more per chunk of a stream.
"""

import asyncio
import socket
import uuid
from types import SimpleNamespace

import orjson
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from common.arguments import FrontendArgs
from common.errors import HeadersTooLarge, InvalidRequest, PipelineError

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100
LINGER_S = 5.0
LINGER_BYTES = 64 * 2**20
_GONE_CHECK_S = 0.1


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, and what clients may rely on beyond it.

    An Upgrade is ignored, as RFC 9110 allows (7.8). Headers above MAX_HEADER_BYTES or MAX_HEADERS are a 431 and bad
    framing is a 400, both in OpenAI's envelope. An answer given before the end of its request is not lost in a reset.
    A client that closes its own direction after its request gets its answer.

    deadlines: how long a client may take from the connection, or a request's first byte, to its last header; from
    there to its last byte; and, when it lets answers pile up, until it has read some of them.
    """

    deadlines = FrontendArgs()
    _num_header_bytes = 0  # of the target and the headers that were parsed
    _num_unparsed_bytes = 0  # since the parser last told of something
    _is_input_over = False
    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._receive_within(self.deadlines.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._received()
        self._sent()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_unparsed_bytes += len(data)
        if self._is_input_over:
            if self._num_unparsed_bytes > LINGER_BYTES:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
            self._limit_headers()
        except PipelineError as error:
            self._refuse(error)
        except HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, PipelineError) else InvalidRequest("This is not valid HTTP/1.1."))

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as upgrade:
                # What follows would be another protocol's. Begin again, with the same request without that wish.
                (num_parsed,) = upgrade.args
                data = self._head_without_upgrade() + data[num_parsed:]
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _limit_headers(self) -> None:
        num_bytes = max(self._num_header_bytes, self._num_unparsed_bytes)
        if num_bytes > MAX_HEADER_BYTES or len(self.headers or ()) > MAX_HEADERS:
            raise HeadersTooLarge(f"The headers are more than {MAX_HEADERS}, or {MAX_HEADER_BYTES} bytes.")

    def _header_parsed(self, num_bytes: int) -> None:
        self._num_unparsed_bytes = 0
        self._num_header_bytes += num_bytes
        self._limit_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_unparsed_bytes = self._num_header_bytes = 0
        self._receive_within(self.deadlines.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._header_parsed(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_parsed(len(name) + len(value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise InvalidRequest("This is no proxy.")
            return  # `_parse` begins again
        super().on_headers_complete()
        # The app itself answers 408 first; this is for a client that goes on sending after that.
        self._receive_within(self.deadlines.body_timeout_s + 1)
        self.headers = []  # trailers are counted, and are no headers
        self.cycle.transport = SimpleNamespace(  # type: ignore[assignment]
            write=self.transport.write, is_closing=self.transport.is_closing, close=self._close
        )

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._num_unparsed_bytes = 0

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._received()

    def _receive_within(self, timeout_s: float) -> None:
        self._received()
        self._receiving = self.loop.call_later(timeout_s, self._on_late_request, timeout_s)

    def _received(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()

    def _on_late_request(self, timeout_s: float) -> None:
        """Close, unless an answer is still going out: it has deadlines of its own."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._receive_within(timeout_s)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(self.deadlines.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sent()

    def _sent(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    def _refuse(self, error: PipelineError) -> None:
        """Answer what no request can be made of, after the answers that are owed, and read no further."""
        self._is_input_over = True
        if (cycle := self.cycle) is not None and not cycle.response_complete:
            if self.pipeline or cycle.response_started or not cycle.more_body:
                cycle.keep_alive = False
                return
            cycle.disconnected = True  # it waits for the rest of a body that is none
            cycle.message_event.set()
        request_id = f"req-{uuid.uuid4().hex}"
        self.logger.warning("request %s: refused with %d: %s", request_id, error.status, error.message)
        body = orjson.dumps(error.to_wire())
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINE[error.status], len(body), request_id.encode(), body)
        )
        self._linger()

    def _close(self) -> None:
        """Close after the last answer."""
        if self.transport.is_closing() or not (self._is_input_over or self.cycle.more_body):
            self.transport.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Close, but read on for a while: what arrives at a closed socket resets it and costs the client the answer."""
        self._is_input_over = True
        self._num_unparsed_bytes = 0
        self.pipeline.clear()
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether an answer is owed to a client that sends no more. It may have gone away altogether.

        That cannot be told apart until something is sent to it, for which HTTP/1.1 has interim responses.
        """
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete or cycle.scope["http_version"] == "1.0":
            return False
        cycle.keep_alive = False
        if not cycle.response_started and not self.pipeline:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._drop_if_gone()
        return True

    def _drop_if_gone(self) -> None:
        """Look for the reset that follows what was sent to a closed socket: nobody else does after the end of input."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self.loop.call_later(_GONE_CHECK_S, self._drop_if_gone)
