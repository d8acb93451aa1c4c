"""HTTP below the routes, byte by byte: upgrades, framing, headers without end, hosts, and how connections close."""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from uvicorn.server import ServerState

from common.arguments import parse_frontend_args
from common.http.protocol import MAX_HEADER_BYTES, MAX_HEADERS, GuardedProtocol
from common.http.server import Pipeline as HttpPipeline
from common.http.server import create_app
from common.observability.metrics import Metrics
from tests.load import error_of
from tests.processes import Pipeline
from tests.raw_http import CHAT, CHAT_HEAD, chat_request, connect, read_until_closed

CHAT_PATH = "/v1/chat/completions"
HELLO = json.dumps(CHAT | {"max_tokens": 3}).encode()
LOOKS_LIKE_A_REQUEST = b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
UPGRADES = {
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZQ==\r\n",
    "nothing known": b"connection: upgrade\r\nupgrade: x/1, y\r\n",
}


def post(body: bytes, more_headers: bytes = b"") -> bytes:
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % CHAT_PATH.encode()
    return head + more_headers + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def exchange(pipeline: Pipeline, sent: bytes) -> bytes:
    """What comes back until the frontend closes."""
    with connect(pipeline) as client:
        client.sendall(sent)
        return read_until_closed(client)


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


def refusal(received: bytes, status: int) -> dict[str, Any]:
    """The error of the last answer, which has everything that an error has and closes the connection."""
    head, _, body = received[received.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert status_line.split(" ")[1] == str(status)
    assert (headers["connection"], headers["content-type"]) == ("close", "application/json")
    assert headers["x-request-id"]
    assert int(headers["content-length"]) == len(body)
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.process
class TestUpgrade:
    @pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
    def test_the_request_is_answered_as_if_there_were_none(self, fake_pipeline: Pipeline, upgrade: bytes) -> None:
        received = exchange(fake_pipeline, post(HELLO, upgrade) + LAST)
        assert statuses(received) == [200, 200]
        assert b'"completion_tokens":3' in received

    @pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
    def test_a_body_that_looks_like_a_request_is_a_body(self, fake_pipeline: Pipeline, upgrade: bytes) -> None:
        received = exchange(fake_pipeline, post(LOOKS_LIKE_A_REQUEST, upgrade) + LAST)
        assert statuses(received) == [400, 200]
        assert b"not valid JSON" in received

    def test_several_in_one_packet_are_all_answered(self, fake_pipeline: Pipeline) -> None:
        requests = [post(HELLO, upgrade) for upgrade in UPGRADES.values()]
        assert statuses(exchange(fake_pipeline, b"".join(requests) + LAST)) == [200] * 4

    def test_a_chunked_body_and_none_at_all(self, fake_pipeline: Pipeline) -> None:
        upgrade = UPGRADES["h2c"]
        chunked = CHAT_HEAD + upgrade + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(HELLO), HELLO)
        bodiless = LAST.replace(b"connection: close\r\n", upgrade)
        assert statuses(exchange(fake_pipeline, chunked + bodiless + LAST)) == [200, 200, 200]

    def test_close_is_still_close(self, fake_pipeline: Pipeline) -> None:
        request = post(HELLO, b"connection: close, upgrade\r\nupgrade: h2c\r\n")
        assert statuses(exchange(fake_pipeline, request)) == [200]

    def test_curl_asks_for_http2_by_upgrade(self, fake_pipeline: Pipeline) -> None:
        curl = shutil.which("curl")
        if curl is None or b"HTTP2" not in subprocess.run([curl, "--version"], capture_output=True, check=True).stdout:
            pytest.skip("curl is not installed, or not with HTTP/2")
        command = [curl, "-s", "--http2", "-d", HELLO, "-H", "content-type: application/json"]
        done = subprocess.run([*command, fake_pipeline.url + CHAT_PATH], capture_output=True, timeout=30, check=True)
        assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3

    def test_there_is_no_connect(self, fake_pipeline: Pipeline) -> None:
        refusal(exchange(fake_pipeline, b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n"), 400)


class Transport:
    """A connection without a socket."""

    def __init__(self) -> None:
        self.written = b""
        self.write_eof = self.resume_reading = self.pause_reading = self.close = self.abort = lambda: None

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return False


def requests_of(parts: list[bytes]) -> list[tuple[str, str, dict[bytes, bytes], bytes]]:
    """What the application sees when a connection brings `parts`."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        seen.append((scope["method"], scope["path"], dict(scope["headers"]), body))
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def run() -> None:
        protocol = GuardedProtocol(uvicorn.Config(app, ws="none", log_config=None), ServerState(), {})
        transport: Any = Transport()
        protocol.connection_made(transport)
        for part in parts:
            protocol.data_received(part)
            await asyncio.sleep(0)
        while protocol.tasks:
            await asyncio.sleep(0)
        protocol.connection_lost(None)

    asyncio.run(run())
    return seen


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_an_upgrade_in_any_two_pieces_is_the_same_request(upgrade: bytes) -> None:
    sent = post(LOOKS_LIKE_A_REQUEST, upgrade) + LAST
    whole = requests_of([sent])
    assert [(method, path, body) for method, path, _, body in whole] == [
        ("POST", CHAT_PATH, LOOKS_LIKE_A_REQUEST),
        ("GET", "/health", b""),
    ]
    assert b"upgrade" not in whole[0][2]
    assert whole[0][2][b"content-type"] == b"application/json"
    for at in range(1, len(sent)):
        assert requests_of([sent[:at], sent[at:]]) == whole
    assert requests_of([sent[at : at + 1] for at in range(len(sent))]) == whole


def test_trailers_are_no_headers() -> None:
    head = b"POST /x HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    ((_, _, headers, body),) = requests_of([head + b"2\r\nhi\r\n0\r\nauthorization: Bearer k\r\n\r\n"])
    assert body == b"hi"
    assert headers.keys() == {b"host", b"transfer-encoding"}


def endless(beginning: bytes, piece: bytes) -> Iterator[bytes]:
    yield beginning
    while True:
        yield piece


def send_until_closed(client: socket.socket, pieces: Iterator[bytes], max_bytes: int) -> int:
    """How much was sent until the other side reset the connection, or `max_bytes`."""
    num_sent = 0
    try:
        while num_sent < max_bytes:
            num_sent += client.send(next(pieces))
    except OSError:
        pass
    return num_sent


HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n"
ENDLESS = {
    "one value": (HEAD + b"x-a: ", b"a" * 2**20),
    "one name": (HEAD, b"a" * 2**20),
    "the path": (b"GET /", b"a" * 2**20),
    "short headers": (HEAD, b"a: b\r\n" * 2**17),
    "blank lines": (b"", b"\r\n" * 2**19),
    "a trailer": (CHUNKED + b"0\r\nx-a: ", b"a" * 2**20),
    "short trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 2**17),
    "a chunk's extension": (CHUNKED + b"1;", b"a" * 2**20),
}


@pytest.mark.process
class TestHeaderLimits:
    @pytest.mark.parametrize("kind", ENDLESS)
    def test_endless_ones_end_the_connection_and_cost_no_memory(self, fake_pipeline: Pipeline, kind: str) -> None:
        (frontend,) = (p for p in fake_pipeline.processes if p.name == "frontend.py")
        before = psutil.Process(frontend.pid).memory_info().rss
        with connect(fake_pipeline) as client:
            assert send_until_closed(client, endless(*ENDLESS[kind]), 2**30) < 2**28
        assert psutil.Process(frontend.pid).memory_info().rss < before + 20_000_000

    @pytest.mark.parametrize("kind", ENDLESS)
    def test_above_the_limit_it_is_a_431(self, fake_pipeline: Pipeline, kind: str) -> None:
        beginning, piece = ENDLESS[kind]
        error = refusal(exchange(fake_pipeline, beginning + piece), 431)
        assert error["code"] == "headers_too_large"

    def test_each_limit_is_where_it_is_said(self, fake_pipeline: Pipeline) -> None:
        others = [b"host: localhost", b"connection: close"]
        room = MAX_HEADER_BYTES - len(b"/health" + b"".join(others).replace(b": ", b"")) - len(b"x-a")
        many = [b"x-a: b"] * (MAX_HEADERS - len(others))
        for headers, status in (
            ([*others, *many], 200),
            ([*others, *many, b"x-a: b"], 431),
            ([*others, b"x-a: " + b"a" * room], 200),
            ([*others, b"x-a: " + b"a" * (room + 1)], 431),
        ):
            received = exchange(fake_pipeline, b"GET /health HTTP/1.1\r\n" + b"\r\n".join(headers) + b"\r\n\r\n")
            assert statuses(received) == [status]

    def test_a_large_body_is_no_header(self, fake_pipeline: Pipeline) -> None:
        body = json.dumps(CHAT | {"max_tokens": 3, "user": "x" * 800_000}).encode()
        assert statuses(exchange(fake_pipeline, post(body) + post(body, b"connection: close\r\n"))) == [200, 200]


BROKEN = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two lengths": HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
    "a length and chunks": HEAD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": HEAD + b"x-a : b\r\n\r\n",
    "a broken chunk": post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked") + b"z\r\n",
}


@pytest.mark.process
class TestFraming:
    @pytest.mark.parametrize("kind", BROKEN)
    def test_what_is_broken_is_a_400_in_the_envelope(self, fake_pipeline: Pipeline, kind: str) -> None:
        received = exchange(fake_pipeline, BROKEN[kind])
        assert statuses(received) == [400]
        assert refusal(received, 400)["type"] == "invalid_request_error"

    def test_what_follows_a_request_does_not_disturb_its_answer(self, fake_pipeline: Pipeline) -> None:
        received = exchange(fake_pipeline, chat_request(stream=True) + b"hello\r\n\r\n" * 1000)
        assert statuses(received) == [200]
        assert received.endswith(b"0\r\n\r\n")
        assert b"data: [DONE]" in received

    @pytest.mark.parametrize(
        ("hosts", "version", "status"),
        [
            (b"", b"1.1", 400),
            (b"host: localhost\r\nhost: localhost\r\n", b"1.1", 400),
            (b"host: localhost\r\nHost: evil.example\r\n", b"1.1", 400),
            (b"", b"1.0", 200),
        ],
    )
    def test_a_request_has_one_host(self, fake_pipeline: Pipeline, hosts: bytes, version: bytes, status: int) -> None:
        sent = b"GET /health HTTP/%b\r\n%bconnection: close\r\n\r\n" % (version, hosts)
        assert statuses(exchange(fake_pipeline, sent)) == [status]


@pytest.mark.process
class TestHostNames:
    @pytest.mark.parametrize(
        "host", ["localhost", "127.0.0.1", "127.8.9.1:80", "[::1]", "LOCALHOST:8080", "a.localhost"]
    )
    def test_loopback_answers_to_its_names(self, fake_client: httpx.Client, host: str) -> None:
        assert fake_client.get("/health", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1:80", "notlocalhost", ""])
    @pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing"])
    def test_loopback_answers_to_no_other(self, fake_client: httpx.Client, host: str, path: str) -> None:
        error = error_of(fake_client.get(path, headers={"host": host}), 421)
        assert error["code"] == "misdirected_request"
        assert "--allowed-hosts" in error["message"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("flags", "host", "status"),
    [
        (["--host", "0.0.0.0"], "any.example", 200),
        (["--host", "10.0.0.1"], "any.example", 200),
        (["--host", "::1"], "any.example", 421),
        (["--host", "localhost"], "any.example", 421),
        (["--allowed-hosts", "chat.example", "Other.Example"], "chat.example", 200),
        (["--allowed-hosts", "chat.example", "Other.Example"], "other.EXAMPLE:80", 200),
        (["--allowed-hosts", "chat.example", "Other.Example"], "localhost", 200),
        (["--allowed-hosts", "chat.example", "Other.Example"], "any.example", 421),
        (["--allowed-hosts", "chat.example", "--host", "0.0.0.0"], "any.example", 421),
    ],
)
async def test_which_names_are_served_is_told(flags: list[str], host: str, status: int) -> None:
    nobody: Any = None
    app = create_app(nobody, HttpPipeline(nobody, nobody, nobody), parse_frontend_args(flags), Metrics("frontend"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/health", headers={"host": host})).status_code == status


@pytest.mark.process
class TestClosing:
    def test_a_client_that_first_sends_everything_sees_the_413(self, fake_pipeline: Pipeline) -> None:
        for _ in range(4):
            received = exchange(fake_pipeline, post(b"x" * 20_000_000, b"connection: close\r\n"))
            assert refusal(received, 413)["code"] == "request_too_large"

    def test_what_never_ends_is_not_read_for_ever(self, fake_pipeline: Pipeline) -> None:
        sent = endless(CHAT_HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % 10**12, b"x" * 2**20)
        with connect(fake_pipeline) as client:
            assert send_until_closed(client, sent, 2**30) < 2**28

    @pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=str)
    def test_a_client_that_sends_no_more_gets_its_answer(self, fake_pipeline: Pipeline, fields: dict[str, Any]) -> None:
        with connect(fake_pipeline) as client:
            client.sendall(chat_request(**fields))
            client.shutdown(socket.SHUT_WR)
            received = read_until_closed(client)
        *interim, status = statuses(received)
        assert status == 200
        assert set(interim) <= {100}
        assert received.endswith(b"0\r\n\r\n" if fields else b"}")
        assert (b"data: [DONE]" if fields else b'"completion_tokens":20') in received

    def test_all_that_it_asked_before_is_answered(self, fake_pipeline: Pipeline) -> None:
        with connect(fake_pipeline) as client:
            client.sendall(chat_request(stream=True) + chat_request() + chat_request(max_tokens=3))
            client.shutdown(socket.SHUT_WR)
            received = read_until_closed(client)
        assert [status for status in statuses(received) if status != 100] == [200, 200, 200]
        assert b'"completion_tokens":3' in received
