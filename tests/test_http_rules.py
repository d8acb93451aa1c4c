"""Keys, limits, deadlines, ids, models and logs: what the HTTP side does whatever the chat is about."""

import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from common.arguments import FrontendArgs, parse_frontend_args
from common.dynamo.directories import ModelDirectory
from common.http.server import Pipeline as HttpPipeline
from common.http.server import create_app
from common.observability.logs import OneLineFormatter
from common.observability.metrics import Metrics
from tests.frontends import frontend_beside
from tests.load import error_of
from tests.processes import MODEL, Pipeline, Process, wait_until
from tests.raw_http import CHAT_HEAD, open_request
from tests.streams import ask_stream, read_stream

pytestmark = pytest.mark.process

CHAT_PATH = "/v1/chat/completions"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


KEYS = ("sk-first-7d41", "sk-second-9e52", "sk-third-0f63", "sk-fourth-1a74")


@pytest.fixture(scope="module")
def keyed(fake_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A frontend with four keys."""
    flags = ("--api-key", KEYS[0], "--api-key", KEYS[1])
    env = {"DYN_CHAT_API_KEY": f"{KEYS[2]}, {KEYS[3]}"}
    with frontend_beside(fake_pipeline, tmp_path_factory.mktemp("keyed"), *flags, env=env) as keyed:
        yield keyed


class TestApiKeys:
    def test_each_key_opens_the_door(self, keyed: Pipeline) -> None:
        for key in KEYS:
            assert httpx.post(keyed.url + CHAT_PATH, json=CHAT, headers=bearer(key)).status_code == 200
            assert httpx.get(f"{keyed.url}/v1/models", headers={"authorization": f"bearer  {key}"}).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": "Bearer"},
            bearer("wrong"),
            bearer("sk-first-7d4"),
            bearer("sk-first-7d411"),
            bearer("sk-first-7d41,sk-second-9e52"),
            {"authorization": "sk-first-7d41"},
            {"authorization": "Basic sk-first-7d41"},
            {"x-api-key": "sk-first-7d41"},
        ],
        ids=str,
    )
    def test_everything_else_is_the_same_401(self, keyed: Pipeline, headers: dict[str, str]) -> None:
        answers = [
            httpx.post(keyed.url + CHAT_PATH, json=CHAT, headers=headers),
            httpx.post(keyed.url + CHAT_PATH, json=CHAT | {"stream": True}, headers=headers),
            httpx.post(keyed.url + CHAT_PATH, content=b"{", headers=headers),
            httpx.get(f"{keyed.url}/v1/models", headers=headers),
            httpx.get(f"{keyed.url}/v1/models/{MODEL}", headers=headers),
            httpx.get(f"{keyed.url}/v1/nothing", headers=headers),
        ]
        for answer in answers:
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
        assert len({answer.content for answer in answers}) == 1

    def test_health_and_docs_need_none(self, keyed: Pipeline) -> None:
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert httpx.get(keyed.url + path).status_code == 200

    def test_no_key_is_ever_logged(self, keyed: Pipeline) -> None:
        for key in (*KEYS, "sk-wrong-2b85"):
            httpx.post(keyed.url + CHAT_PATH, json=CHAT, headers=bearer(key))
        wait_until(lambda: keyed.logs().count(" 401,") > 0, 10, "the log line of a 401")
        for key in (*KEYS, "sk-wrong-2b85"):
            assert key not in keyed.logs()
            assert key.removeprefix("sk-") not in keyed.logs()


class TestCors:
    ORIGIN = "https://example.com"

    def preflight(self, url: str, origin: str) -> httpx.Response:
        asks = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        return httpx.options(url + CHAT_PATH, headers=asks)

    def test_is_off_unless_asked_for(self, fake_pipeline: Pipeline) -> None:
        error_of(self.preflight(fake_pipeline.url, self.ORIGIN), 405)
        answer = httpx.post(fake_pipeline.url + CHAT_PATH, json=CHAT, headers={"origin": self.ORIGIN})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control-")]

    def test_lets_the_pages_of_an_origin_in_and_no_others(self, fake_pipeline: Pipeline, tmp_path: Path) -> None:
        flags = ("--cors-origin", self.ORIGIN, "--api-key", "k")
        with frontend_beside(fake_pipeline, tmp_path, *flags) as beside:
            allowed = self.preflight(beside.url, self.ORIGIN)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == self.ORIGIN
            assert "authorization" in allowed.headers["access-control-allow-headers"]
            refused = self.preflight(beside.url, "https://evil.example")
            assert "access-control-allow-origin" not in refused.headers
            # A page must be able to read an error, too.
            for headers, status in ((bearer("k"), 200), ({}, 401)):
                answer = httpx.post(beside.url + CHAT_PATH, json=CHAT, headers=headers | {"origin": self.ORIGIN})
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == self.ORIGIN
                assert answer.headers["access-control-expose-headers"] == "x-request-id"


@pytest.fixture
def slow(fake_pipeline: Pipeline) -> Iterator[Process]:
    """The only engine: one with 20 tokens a second, in the place of the fast one."""
    fast = fake_pipeline.processes[0]
    slow = fake_pipeline.fake_engine("--token-interval-ms", "50")
    fake_pipeline.wait_ready(engines=2)
    fast.terminate()
    try:
        yield slow
    finally:
        fast.start()
        fake_pipeline.wait_ready(engines=2)
        slow.terminate()
        fake_pipeline.processes.remove(slow)


class TestLimits:
    def test_above_the_concurrency_limit_it_is_a_429_and_those_inside_finish(
        self, fake_pipeline: Pipeline, slow: Process, tmp_path: Path
    ) -> None:
        body = CHAT | {"max_tokens": 60}
        with (
            frontend_beside(fake_pipeline, tmp_path, "--max-concurrency", "2") as beside,
            httpx.Client(base_url=beside.url, timeout=60) as client,
            ThreadPoolExecutor(2) as threads,
        ):
            whole = threads.submit(client.post, CHAT_PATH, json=body)
            stream = threads.submit(ask_stream, client, body)
            wait_until(lambda: "running 2" in slow.log, 20, "both to be in work")
            answer = client.post(CHAT_PATH, json=CHAT)
            error = error_of(answer, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
            for path in ("/health", "/ready", "/v1/models"):
                assert client.get(path).status_code == 200
            assert whole.result().json()["usage"]["completion_tokens"] == 60
            assert stream.result().finish_reasons == {0: "length"}
            assert client.post(CHAT_PATH, json=CHAT).status_code == 200

    @pytest.mark.usefixtures("slow")
    def test_past_the_deadline_it_is_a_504_or_an_error_event(self, fake_pipeline: Pipeline, tmp_path: Path) -> None:
        body = CHAT | {"max_tokens": 100}
        with frontend_beside(fake_pipeline, tmp_path, "--request-timeout", "1") as beside:
            started = time.monotonic()
            answer = httpx.post(beside.url + CHAT_PATH, json=body, timeout=30)
            assert error_of(answer, 504)["code"] == "deadline_exceeded"
            assert 0.9 < time.monotonic() - started < 5
            stream = read_stream(httpx.post(beside.url + CHAT_PATH, json=body | {"stream": True}, timeout=30).content)
            assert stream.error is not None
            assert stream.error["code"] == "deadline_exceeded"
            assert 0 < len(stream.deltas[0]) < 100
            assert httpx.post(beside.url + CHAT_PATH, json=CHAT).status_code == 200

    @pytest.mark.parametrize("is_stream", [False, True])
    def test_a_processor_that_hangs_does_not_outlast_the_deadline(
        self, fake_pipeline: Pipeline, tmp_path: Path, is_stream: bool
    ) -> None:
        processor = fake_pipeline.processes[1]
        with frontend_beside(fake_pipeline, tmp_path, "--request-timeout", "1") as beside:
            assert httpx.post(beside.url + CHAT_PATH, json=CHAT).status_code == 200
            processor.running.send_signal(signal.SIGSTOP)
            try:
                started = time.monotonic()
                answer = httpx.post(beside.url + CHAT_PATH, json=CHAT | {"stream": is_stream}, timeout=30)
                assert time.monotonic() - started < 5
            finally:
                processor.running.send_signal(signal.SIGCONT)
        error_of(answer, 504)

    def test_a_large_body_is_a_413_however_it_comes(self, fake_pipeline: Pipeline, tmp_path: Path) -> None:
        body = json.dumps(CHAT | {"user": "x" * 2000}).encode()
        headers = {"content-type": "application/json"}
        with (
            frontend_beside(fake_pipeline, tmp_path, "--max-body-bytes", "1000") as beside,
            httpx.Client(base_url=beside.url) as client,
        ):
            for content in (body, (body[at : at + 100] for at in range(0, len(body), 100))):
                assert "1000" in error_of(client.post(CHAT_PATH, content=content, headers=headers), 413)["message"]
                assert client.post(CHAT_PATH, json=CHAT).status_code == 200

    def test_a_body_that_does_not_arrive_is_a_408(self, fake_pipeline: Pipeline, tmp_path: Path) -> None:
        with (
            frontend_beside(fake_pipeline, tmp_path, "--body-timeout", "1") as beside,
            socket.create_connection(("127.0.0.1", beside.http_port), timeout=20) as client,
        ):
            client.sendall(CHAT_HEAD + b'content-length: 100\r\n\r\n{"model": ')
            answer = ""
            while "}}" not in answer:
                answer += client.recv(10_000).decode()
        assert answer.startswith("HTTP/1.1 408 ")
        assert '"code":"request_timeout"' in answer
        assert "x-request-id: " in answer


class TestRequestIds:
    @pytest.mark.parametrize("request_id", ["a", "req-1.2:3/4+5=6@7_8", "x" * 128])
    def test_a_sane_one_comes_back_and_is_in_the_logs_of_all_three(
        self, fake_pipeline: Pipeline, request_id: str
    ) -> None:
        request_id = f"{request_id[:120]}-{time.time_ns() % 10**6}"
        headers = {"x-request-id": request_id}
        for body in (CHAT, CHAT | {"stream": True}):
            answer = httpx.post(fake_pipeline.url + CHAT_PATH, json=body, headers=headers)
            assert answer.headers["x-request-id"] == request_id
        for process in fake_pipeline.processes[:3]:
            wait_until(lambda log=process: f"request {request_id}: " in log.log, 10, f"the id in {process.name}'s log")

    @pytest.mark.parametrize("request_id", ["", "x" * 129, "two words", "semi;colon", "quote\"'", "\xe9t\xe9", "a,b"])
    def test_an_insane_one_is_replaced(self, fake_pipeline: Pipeline, request_id: str) -> None:
        headers = {"x-request-id": request_id.encode("latin-1")}
        given = httpx.get(f"{fake_pipeline.url}/v1/models", headers=headers).headers["x-request-id"]
        assert given.startswith("req-")
        assert len(given) == len("req-") + 32

    def test_errors_have_one_too(self, fake_pipeline: Pipeline) -> None:
        headers = {"x-request-id": "mine"}
        answers = [
            httpx.post(fake_pipeline.url + CHAT_PATH, json={}, headers=headers),
            httpx.post(fake_pipeline.url + CHAT_PATH, content=b"x", headers=headers),
            httpx.get(fake_pipeline.url + CHAT_PATH, headers=headers),
            httpx.get(f"{fake_pipeline.url}/nothing", headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [400, 415, 405, 404]
        assert {answer.headers["x-request-id"] for answer in answers} == {"mine"}


class BrokenClient:
    async def instance_ids(self) -> list[int]:
        raise RuntimeError("an internal secret")


@pytest.mark.anyio
async def test_a_bug_is_a_500_that_tells_nothing_but_its_id(caplog: pytest.LogCaptureFixture) -> None:
    broken: Any = BrokenClient()
    pipeline = HttpPipeline(ModelDirectory(broken), broken, broken)
    args = FrontendArgs(cors_origins=("https://example.com",))
    app = create_app(broken, pipeline, args, Metrics("frontend"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        with caplog.at_level(logging.INFO):
            answer = await client.get("/v1/models", headers={"x-request-id": "mine", "origin": "https://example.com"})
    assert error_of(answer, 500)["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["access-control-allow-origin"] == "https://example.com"
    assert "an internal secret" in caplog.text
    assert "request mine: GET /v1/models 500" in caplog.text


class TestModels:
    def test_the_list_and_each_of_its_models(self, fake_client: httpx.Client) -> None:
        models = fake_client.get("/v1/models").json()
        assert models["object"] == "list"
        (model,) = models["data"]
        assert model == {
            "id": MODEL, "object": "model", "created": model["created"], "owned_by": "dynamo", "root": MODEL,
            "max_model_len": 8192,
        }  # fmt: skip
        assert abs(model["created"] - time.time()) < 3600
        for path in (MODEL, MODEL.replace("/", "%2F")):
            assert fake_client.get(f"/v1/models/{path}").json() == model

    @pytest.mark.parametrize("name", ["gpt-4", "models", "a/b/c", "%00", "%C3%A9", "..%2F..", MODEL + "/"])
    def test_an_unknown_one_is_a_404(self, fake_client: httpx.Client, name: str) -> None:
        error = error_of(fake_client.get(f"/v1/models/{name}"), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")

    def test_the_length_is_what_every_engine_takes(self, fake_pipeline: Pipeline, fake_client: httpx.Client) -> None:
        def max_model_len() -> int:
            length: int = fake_client.get(f"/v1/models/{MODEL}").json()["max_model_len"]
            return length

        engine = fake_pipeline.fake_engine("--context-length", "2048")
        wait_until(lambda: max_model_len() == 2048, 30, "the smaller engine to count")
        engine.terminate()
        fake_pipeline.processes.remove(engine)
        wait_until(lambda: max_model_len() == 8192, 30, "the smaller engine to be gone")

    def test_each_served_name_can_be_asked_for(self, fake_pipeline: Pipeline) -> None:
        names = ["smol", "org/smol:latest", "名前"]
        processor = fake_pipeline.processor("--served-model-name", *names)
        try:
            fake_pipeline.wait_ready(processors=2)
            with httpx.Client(base_url=fake_pipeline.url, timeout=60) as client:
                listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
                assert listed == sorted([MODEL, *names])
                for name in [MODEL, *names] * 2:  # each goes to the processor that serves it
                    assert client.get(f"/v1/models/{name}").json()["id"] == name
                    answer = client.post(CHAT_PATH, json=CHAT | {"model": name})
                    assert answer.json()["model"] == name
        finally:
            processor.terminate()
            fake_pipeline.processes.remove(processor)
        assert error_of(httpx.post(fake_pipeline.url + CHAT_PATH, json=CHAT | {"model": "smol"}), 404)


GET_PATHS = ("/health", "/ready", "/v1/models", f"/v1/models/{MODEL}")


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_is_get_without_a_body(fake_client: httpx.Client, path: str) -> None:
    head, get = fake_client.head(path), fake_client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize("path", [*GET_PATHS, CHAT_PATH])
@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_are_told_which_ones_there_are(fake_client: httpx.Client, path: str, method: str) -> None:
    answer = fake_client.request(method, path)
    error_of(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == ({"POST"} if path == CHAT_PATH else {"GET", "HEAD"})


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v1/chat/completions//", "//v1/models", "/V1/models", "/v1/completions"]
)
def test_there_is_nothing_beside_the_routes(fake_client: httpx.Client, path: str) -> None:
    error_of(fake_client.get(path), 404)


def test_a_slash_at_the_end_changes_nothing(keyed: Pipeline) -> None:
    assert httpx.post(f"{keyed.url}{CHAT_PATH}/", json=CHAT, headers=bearer(KEYS[0])).status_code == 200
    error_of(httpx.post(f"{keyed.url}{CHAT_PATH}/", json=CHAT), 401)
    error_of(httpx.get(f"{keyed.url}{CHAT_PATH}/", headers=bearer(KEYS[0])), 405)


@pytest.mark.parametrize("port", ["70000", "-1", "http", ""])
def test_a_port_that_is_none_is_a_usage_error(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_frontend_args([f"--port={port}"])
    assert ended.value.code == 2
    assert "argument --port: must be a port" in capsys.readouterr().err


def test_a_client_that_goes_away_is_no_error_in_the_log(fake_pipeline: Pipeline, tmp_path: Path) -> None:
    with frontend_beside(fake_pipeline, tmp_path) as beside:
        for is_stream in (False, True):
            with open_request(beside, max_tokens=8000, stream=is_stream) as client:
                if is_stream:
                    assert client.recv(1)
        wait_until(lambda: beside.logs().count(f"POST {CHAT_PATH}") == 2, 20, "the log lines of both")
        assert "Traceback" not in beside.logs()


def test_no_log_tells_what_was_said(fake_pipeline: Pipeline, tmp_path: Path) -> None:
    secret = "xyzzy-plugh"
    with (
        frontend_beside(fake_pipeline, tmp_path) as beside,
        httpx.Client(base_url=beside.url, timeout=60) as client,
    ):
        said = CHAT | {"messages": [{"role": "user", "content": secret}], "user": secret, "stop": secret}
        statuses = [
            client.post(CHAT_PATH, json=body).status_code
            for body in (
                said,
                said | {"stream": True},
                said | {"temperature": secret},
                said | {"messages": [{"role": secret, "content": secret}]},
                said | {secret: secret},
                said | {"messages": [{"role": "user", "content": f"{secret} " * 9000}]},
                said | {"max_tokens": 9000},
            )
        ]
        statuses.append(client.post(CHAT_PATH, content=b'{"' + secret.encode()).status_code)
        assert statuses == [200, 200, 400, 400, 400, 400, 400, 415]
        logs = [process.log for process in (*fake_pipeline.processes, *beside.processes)]
    assert not any(secret in log for log in logs)


@pytest.mark.process
@pytest.mark.parametrize("breaks", ["\n", "\r", "\x1b[2K\x85\u2028"])
def test_nothing_that_a_client_sends_begins_a_line_of_a_log(fake_pipeline: Pipeline, breaks: str) -> None:
    forged = f"{breaks}2026-01-01T00:00:00Z INFO forged"
    httpx.get(f"{fake_pipeline.url}/{quote('x' + forged)}")
    body = CHAT | {"model": f"m{forged}"}
    assert httpx.post(fake_pipeline.url + CHAT_PATH, json=body).status_code == 404
    frontend = fake_pipeline.processes[-1]
    wait_until(lambda: "forged" in frontend.log and f"{CHAT_PATH} 404" in frontend.log, 10, "the lines of both")
    for process in fake_pipeline.processes:
        assert not [line for line in process.log.splitlines() if line.startswith("2026-01-01")]
        assert "\x1b[2K" not in process.log_path.read_text()


def test_a_traceback_begins_no_line_that_looks_like_a_record() -> None:
    try:
        raise ValueError("bad\n2026-01-01T00:00:00Z INFO forged")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", None, sys.exc_info())
    assert all(line.startswith("    ") for line in OneLineFormatter().format(record).split("\n")[1:])
