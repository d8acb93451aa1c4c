"""More than the pipeline can take: too many requests, too slow clients, too large input."""

import asyncio
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.frontends import frontend_beside
from tests.processes import MODEL, Infra, Pipeline, Process, new_pipeline, running, wait_until
from tests.raw_http import CHAT, CHAT_HEAD, chat_request, connect, open_request, read_until_closed

pytestmark = [pytest.mark.process, pytest.mark.timed]

LIMIT = 8
DEADLINES = ("--header-timeout", "1", "--body-timeout", "1", "--send-timeout", "2")


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """A frontend with a low limit and short deadlines, on an engine of 100 tokens a second and request."""
    with new_pipeline(tmp_path_factory.mktemp("overload")) as pipeline:
        pipeline.frontend("--max-concurrency", str(LIMIT), *DEADLINES)
        pipeline.processor()
        pipeline.fake_engine("--token-interval-ms", "10")
        pipeline.wait_ready()
        yield pipeline


def p99(durations: list[float]) -> float:
    return statistics.quantiles(durations, n=100)[98]


def test_too_many_requests_are_refused_fast_and_those_inside_finish(paced: Pipeline) -> None:
    frontend = psutil.Process(paced.processes[0].pid)
    answered_s: list[float] = []
    refused_s: list[float] = []

    async def client(http: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            started = time.monotonic()
            answer = await http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 100})
            if answer.status_code == 429:
                refused_s.append(time.monotonic() - started)
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "overloaded"
                await asyncio.sleep(0.5)
            else:
                answered_s.append(time.monotonic() - started)
                assert answer.status_code == 200
                assert answer.json()["usage"]["completion_tokens"] == 100

    async def overload(duration_s: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=paced.url, timeout=60, limits=limits) as http:
            until = time.monotonic() + duration_s
            await asyncio.gather(*(client(http, until) for _ in range(10 * LIMIT)))

    asyncio.run(overload(2))  # connections, and what memory they take once
    warm = frontend.memory_info().rss
    answered_s.clear()
    refused_s.clear()
    asyncio.run(overload(5))
    grown = frontend.memory_info().rss - warm
    # The client's own figures say how busy this machine is; the log says how long the frontend took.
    inside_the_frontend_s = [
        int(ms) / 1000 for ms in re.findall(r"completions 429, overloaded, (\d+) ms", paced.processes[0].log)
    ]
    print(f"{len(answered_s)} answered in {statistics.median(answered_s):.2f} s, {len(refused_s)} refused, "
          f"p50 {statistics.median(refused_s) * 1000:.0f} ms, p99 {p99(refused_s) * 1000:.0f} ms, "
          f"in the frontend p99 {p99(inside_the_frontend_s) * 1000:.0f} ms, "
          f"memory {grown / 1e6:+.1f} MB")  # fmt: skip
    assert len(refused_s) > 100
    assert len(answered_s) >= 2 * LIMIT
    assert statistics.median(refused_s) < statistics.median(answered_s)
    assert p99(inside_the_frontend_s) < min(answered_s)  # a refusal waits for nobody's answer
    assert grown < 20_000_000


def started_and_stopped(engine: Process) -> tuple[int, int]:
    """How many requests the engine took on, and how many of them are over."""
    lines = [line for line in engine.log.splitlines() if ": running " in line]
    num_over = sum("stopped" in line for line in lines)
    return len(lines) - num_over, num_over


def test_a_client_that_does_not_read_is_dropped_and_its_engine_stops(paced: Pipeline) -> None:
    engine = paced.processes[2]
    num_started, num_over = started_and_stopped(engine)
    assert num_started == num_over
    fields = {"stream": True, "max_tokens": 8000, "n": 8}
    with open_request(paced, receive_buffer=4096, **fields) as deaf:
        wait_until(lambda: started_and_stopped(engine)[0] == num_started + 8, 20, "the engine to begin")
        began = time.monotonic()
        slowest_s = 0.0
        while started_and_stopped(engine)[1] < num_over + 8:
            assert time.monotonic() - began < 60  # 8000 tokens take 80 s
            started = time.monotonic()
            assert httpx.post(f"{paced.url}/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
            num_over += 1  # that one
            slowest_s = max(slowest_s, time.monotonic() - started)
        print(f"dropped after {time.monotonic() - began:.1f} s; others took at most {slowest_s:.2f} s")
        assert slowest_s < 2  # 20 tokens take 0.2 s
        assert not read_until_closed(deaf).endswith(b"[DONE]\n\n")


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=str)
def test_a_client_that_goes_away_stops_its_engine(paced: Pipeline, fields: dict[str, object]) -> None:
    engine = paced.processes[2]
    num_started, num_over = started_and_stopped(engine)
    with open_request(paced, max_tokens=8000, **fields):
        wait_until(lambda: started_and_stopped(engine)[0] == num_started + 1, 20, "the engine to begin")
    wait_until(lambda: started_and_stopped(engine)[1] == num_over + 1, 20, "the engine to stop")  # 8000 tokens: 80 s


def test_a_client_that_reads_slowly_gets_everything(paced: Pipeline) -> None:
    expected = httpx.post(f"{paced.url}/v1/chat/completions", json=CHAT | {"max_tokens": 150}, timeout=30).json()
    with open_request(paced, receive_buffer=4096, stream=True, max_tokens=150) as slow:
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += slow.recv(1000)
            time.sleep(0.01)
    assert expected["usage"]["completion_tokens"] == 150
    assert received.count(b'"delta":{"content"') > 100
    assert b"data: [DONE]" in received


@pytest.mark.parametrize("head", [b"", b"POST /v1", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: "])
def test_headers_that_do_not_come_close_the_connection(paced: Pipeline, head: bytes) -> None:
    with connect(paced) as slow:
        started = time.monotonic()
        slow.sendall(head)
        slow.settimeout(0.1)
        while time.monotonic() - started < 10:
            try:
                if slow.recv(1000) == b"":
                    break
            except TimeoutError:
                if head:
                    slow.sendall(b"a")
            except (ConnectionResetError, BrokenPipeError):
                break
        assert 0.5 < time.monotonic() - started < 10


def test_a_body_that_does_not_come_is_a_408_and_the_end_of_the_connection(paced: Pipeline) -> None:
    with connect(paced) as slow:
        started = time.monotonic()
        slow.sendall(CHAT_HEAD + b"content-length: 1000\r\n\r\n{")
        received = read_until_closed(slow)
        assert received.startswith(b"HTTP/1.1 408")
        assert b'"request_timeout"' in received
        assert time.monotonic() - started < 20


def test_a_refused_body_does_not_keep_the_connection_open(paced: Pipeline) -> None:
    with connect(paced) as slow:
        slow.sendall(CHAT_HEAD.replace(b"application/json", b"text/plain") + b"content-length: 1000\r\n\r\n")
        started = time.monotonic()
        slow.settimeout(0.1)
        received = b""
        while time.monotonic() - started < 15:
            try:
                piece = slow.recv(1000)
                received += piece
                if not piece:
                    break
            except TimeoutError:
                slow.sendall(b"x")
            except (ConnectionResetError, BrokenPipeError):
                break
        assert b" 415 " in received
        assert time.monotonic() - started < 15


def test_many_slow_clients_hold_up_nobody(paced: Pipeline) -> None:
    sockets = [connect(paced) for _ in range(300)]
    try:
        for slow in sockets:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
        started = time.monotonic()
        assert httpx.post(f"{paced.url}/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
        assert time.monotonic() - started < 2
        frontend = psutil.Process(paced.processes[0].pid)
        wait_until(lambda: len(frontend.net_connections("tcp")) < 50, 30, "the slow ones to be dropped")
    finally:
        for slow in sockets:
            slow.close()


@pytest.mark.needs("slowhttptest")
@pytest.mark.parametrize(
    ("attack", "path"),
    [
        (["-H"], "/v1/chat/completions"),
        (["-B", "-f", "application/json"], "/v1/chat/completions"),
        (["-X", "-k", "3"], "/openapi.json"),
    ],
    ids=["slow headers", "slow bodies", "slow reading"],
)
def test_slowhttptest_makes_the_frontend_unavailable_to_nobody(paced: Pipeline, attack: list[str], path: str) -> None:
    shape = ["-c", "300", "-r", "100", "-i", "1", "-l", "6", "-p", "2", "-v", "1"]
    command = ["slowhttptest", *attack, *shape, "-u", f"{paced.url}{path}"]
    slowest_s = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as attacker:
        try:
            while attacker.poll() is None:
                started = time.monotonic()
                assert httpx.post(f"{paced.url}/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
                slowest_s = max(slowest_s, time.monotonic() - started)
            assert attacker.stdout is not None
            said = attacker.stdout.read()
        finally:
            attacker.kill()
    print(f"others took at most {slowest_s:.2f} s")
    assert "service available:" in said
    assert not re.search(r"service available:\W*(\x1b\S*)?NO", said)
    assert slowest_s < 2  # 20 tokens take 0.2 s
    frontend = psutil.Process(paced.processes[0].pid)
    wait_until(lambda: len(frontend.net_connections("tcp")) < 50, 30, "the slow ones to be dropped")


def test_two_requests_in_one_packet_are_both_answered(paced: Pipeline) -> None:
    with connect(paced) as client:
        client.sendall(chat_request(max_tokens=150) + chat_request(max_tokens=3))
        received = b""
        while received.count(b"HTTP/1.1 200") < 2:
            received += client.recv(65536)
        assert b'"completion_tokens":150' in received


BIG = "x" * 1_500_000


def test_a_request_above_max_payload_is_a_413_with_size_and_limit(fake_pipeline: Pipeline, tmp_path: Path) -> None:
    with frontend_beside(fake_pipeline, tmp_path, "--max-body-bytes", "4000000") as frontend:
        answer = httpx.post(f"{frontend.url}/v1/chat/completions", json=CHAT | {"user": BIG}, timeout=60)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert "1048576" in answer.json()["error"]["message"]
        assert "15001" in answer.json()["error"]["message"] or "15002" in answer.json()["error"]["message"]
        assert httpx.post(f"{frontend.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200


def with_max_payload(folder: Path, num_bytes: int) -> Infra:
    (folder / "nats.conf").write_text(f"max_payload: {num_bytes}\n")
    return Infra(folder / "infra", nats_args=["-c", str(folder / "nats.conf")])


def test_a_larger_max_payload_carries_larger_requests(tmp_path: Path) -> None:
    infra = with_max_payload(tmp_path, 8 * 2**20)
    with running(infra.start()), running(pipeline := Pipeline(infra, tmp_path / "scripts")):
        pipeline.frontend("--max-body-bytes", "4000000")
        pipeline.script("tests/fake_processor.py")
        pipeline.fake_engine()
        pipeline.wait_ready()
        answer = httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT | {"user": BIG}, timeout=60)
        assert answer.status_code == 200


def test_token_ids_above_max_payload_are_a_413_with_size_and_limit(tmp_path: Path, embedded_model: str) -> None:
    infra = with_max_payload(tmp_path, 8192)
    with running(infra.start()), running(pipeline := Pipeline(infra, tmp_path / "scripts")):
        pipeline.frontend()
        pipeline.processor()
        pipeline.fake_engine()
        pipeline.wait_ready()
        # Two tokens of three bytes in each four characters: first small enough for the processor, then not even that.
        for num_characters in (6000, 7700):
            text = " q w" * (num_characters // 4)
            body = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": text}]}
            answer = httpx.post(f"{pipeline.url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 413, answer.text
            assert "8192" in answer.json()["error"]["message"]
        assert httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
