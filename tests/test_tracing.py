"""One request through three processes: the same trace in their JSON lines, and in the spans that they export."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import DYNAMO, Pipeline, Process, new_pipeline, wait_until
from tests.raw_http import CHAT

pytestmark = pytest.mark.process

CHAT_PATH = "/v1/chat/completions"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
JSONL = {"DYN_LOGGING_JSONL": "1"}


@contextmanager
def started(folder: Path, env: Mapping[str, str]) -> Iterator[Pipeline]:
    """The three scripts, without SGLang."""
    with new_pipeline(folder, env={**JSONL, **env}) as pipeline:
        pipeline.script("tests/engine_without_sglang.py")
        pipeline.processor("--engine-wait", "1")
        pipeline.frontend()
        pipeline.wait_ready()
        yield pipeline


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    with started(tmp_path_factory.mktemp("tracing"), {}) as pipeline:
        yield pipeline


def ask(pipeline: Pipeline, request_id: str, traceparent: str | None = TRACEPARENT, **fields: object) -> httpx.Response:
    headers = {"x-request-id": request_id} | ({"traceparent": traceparent} if traceparent else {})
    return httpx.post(pipeline.url + CHAT_PATH, json=CHAT | fields, headers=headers, timeout=60)


def json_lines(process: Process) -> list[dict[str, Any]]:
    lines = process.log.splitlines()
    if lines and lines[0].startswith("Warning: OTEL_EXPORT_ENABLED detected."):  # Dynamo's, before it logs
        del lines[0]
    return [json.loads(line) for line in lines]


def lines_of(pipeline: Pipeline, request_id: str) -> dict[str, dict[str, Any]]:
    """Each component's line about a request, when all three have written theirs."""

    def found() -> list[dict[str, Any]]:
        lines = [line for process in pipeline.processes for line in json_lines(process)]
        return [line for line in lines if line.get("request_id") == request_id]

    wait_until(lambda: len(found()) >= 3, 10, f"three lines about {request_id}")
    assert len(found()) == 3, "one line a process"
    return {line["target"]: line for line in found()}


def test_each_process_says_in_json_what_it_did(scripts: Pipeline) -> None:
    usage = ask(scripts, "json-1", max_tokens=5, stream=False).json()["usage"]
    lines = lines_of(scripts, "json-1")
    assert set(lines) == {"frontend", "processor", "engine"}
    for line in lines.values():
        assert line["level"] == "INFO"
        assert line["message"].startswith("request json-1: ")
        assert (line["outcome"], line["prompt_tokens"], line["completion_tokens"]) == ("ok", usage["prompt_tokens"], 5)
        assert 0 < line["duration_s"] < 60
        assert "time_to_first_token_s" not in line
    assert lines["frontend"]["model"] == lines["processor"]["model"] == CHAT["model"]
    assert lines["engine"]["finish_reason"] == "length"


def test_the_time_to_the_first_token_is_that_of_a_stream(scripts: Pipeline) -> None:
    ask(scripts, "json-2", max_tokens=20, stream=True)
    for line in lines_of(scripts, "json-2").values():
        assert 0 < line["time_to_first_token_s"] < line["duration_s"]
        assert f"first token after {line['time_to_first_token_s'] * 1000:.0f} ms" in line["message"]


@pytest.mark.parametrize("traceparent", [TRACEPARENT, f"00-{TRACE_ID}-{SPAN_ID}-00", f"01-{TRACE_ID}-{SPAN_ID}-01-x"])
def test_the_clients_trace_is_in_the_lines_of_all_three(scripts: Pipeline, traceparent: str) -> None:
    request_id = f"trace-{time.monotonic_ns()}"
    assert ask(scripts, request_id, traceparent).status_code == 200
    assert {line["trace_id"] for line in lines_of(scripts, request_id).values()} == {TRACE_ID}


@pytest.mark.parametrize(
    "traceparent",
    [None, "", "nonsense", f"00-{'0' * 32}-{SPAN_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01", f"ff-{TRACE_ID}-{SPAN_ID}-01",
     f"00-{TRACE_ID.upper()}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}"],
)  # fmt: skip
def test_without_a_sane_one_a_trace_begins(scripts: Pipeline, traceparent: str | None) -> None:
    request_id = f"trace-{time.monotonic_ns()}"
    assert ask(scripts, request_id, traceparent).status_code == 200
    (trace_id,) = {line["trace_id"] for line in lines_of(scripts, request_id).values()}
    assert len(trace_id) == 32
    assert trace_id != TRACE_ID
    assert int(trace_id, 16)


def test_every_line_is_json_from_start_to_stop(tmp_path: Path, embedded_model: str) -> None:
    """With answers, refusals, an abandoned stream, and what uvicorn has to say."""
    with started(tmp_path, {"DYN_LOG": "debug"}) as pipeline:
        assert ask(pipeline, "a").status_code == 200
        assert ask(pipeline, "b", model="nope").status_code == 404
        assert ask(pipeline, "c", logit_bias={"1": 0.5}, max_tokens=10**9).status_code == 400
        with httpx.stream("POST", pipeline.url + CHAT_PATH, json=CHAT | {"stream": True, "max_tokens": 2000}) as stream:
            next(stream.iter_raw())
        with httpx.Client() as client:
            assert client.request("BREW", f"{pipeline.url}/coffee").status_code == 400
        engine, processor, frontend = pipeline.processes
        wait_until(lambda: '"outcome":"cancelled"' in engine.log, 10, "the stream to be abandoned")
        assert [process.terminate() for process in (frontend, processor, engine)] == [0, 0, 0]
        for process in pipeline.processes:
            lines = json_lines(process)
            assert len(lines) > 5
            assert all({"time", "level", "target", "message"} <= line.keys() for line in lines)
        assert "Started server process" in frontend.log
        assert "request b: POST /v1/chat/completions 404, model_not_found" in frontend.log


def test_a_traceback_is_one_line(tmp_path: Path) -> None:
    code = (
        "import logging, warnings\n"
        "from common.dynamo.runtime import configure_dynamo_logging\nconfigure_dynamo_logging()\n"
        "log = logging.getLogger('x')\nwarnings.warn('dear reader')\nlog.debug('unheard')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('two\\nlines')\n"
    )
    log = tmp_path / "log"
    script = Process("bug", [sys.executable, "-c", code], log, {**JSONL, "DYN_LOG": "warn"})
    assert script.start().running.wait(30) == 0
    warning, error = json_lines(script)[-2:]
    assert "dear reader" in warning["message"]
    assert (error["level"], error["message"], error["target"]) == ("ERROR", "two\nlines", "x")
    assert "ZeroDivisionError" in error["exception"]
    assert "unheard" not in script.log


@pytest.fixture(scope="module")
def collector() -> Iterator[Any]:
    from tests.otlp_collector import collecting

    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Any, embedded_model: str) -> Iterator[Pipeline]:
    """The three scripts, whose spans go to the collector."""
    env = {
        "OTEL_EXPORT_ENABLED": "1",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with started(tmp_path_factory.mktemp("traced"), env) as pipeline:
        yield pipeline


@pytest.mark.skipif(DYNAMO.startswith("0."), reason="the environment of that release has no exporter")
class TestExport:
    def test_three_spans_in_a_row_below_the_clients(self, traced: Pipeline, collector: Any) -> None:
        from tests.otlp_collector import attributes

        assert ask(traced, "span-1", max_tokens=5).status_code == 200
        wait_until(lambda: len(collector.of_trace(TRACE_ID)) == 3, 20, "three spans of the client's trace")
        spans = dict(collector.of_trace(TRACE_ID))
        parent = SPAN_ID
        for component in ("frontend", "processor", "engine"):
            span = spans[f"chat-{component}"]
            assert span.name == component
            assert span.parent_span_id.hex() == parent
            parent = span.span_id.hex()
            told = attributes(span)
            assert (told["chat.request_id"], told["chat.outcome"], told["chat.completion_tokens"]) == (
                "span-1",
                "ok",
                5,
            )
            assert span.start_time_unix_nano < span.end_time_unix_nano
        assert {line["trace_id"] for line in lines_of(traced, "span-1").values()} == {TRACE_ID}

    def test_dynamos_own_spans_are_one_trace_over_both_hops(self, traced: Pipeline, collector: Any) -> None:
        assert ask(traced, "span-2", max_tokens=5).status_code == 200

        def answers_by_trace() -> list[int]:
            traces = [span.trace_id for service, span in collector.spans if span.name == "handle_payload"]
            return [traces.count(trace) for trace in traces]

        wait_until(lambda: 2 in answers_by_trace(), 20, "the answers of a processor and of an engine in one trace")

    def test_a_failed_request_is_a_failed_span(self, traced: Pipeline, collector: Any) -> None:
        assert ask(traced, "span-3", f"00-{'1' * 32}-{SPAN_ID}-01", model="nope").status_code == 404
        wait_until(lambda: len(collector.of_trace("1" * 32)) == 1, 20, "its span")
        ((_, span),) = collector.of_trace("1" * 32)
        assert (span.status.code, span.status.message) == (2, "model_not_found")

    def test_an_unsampled_trace_is_not_exported(self, traced: Pipeline, collector: Any) -> None:
        assert ask(traced, "span-4", f"00-{'2' * 32}-{SPAN_ID}-00").status_code == 200
        assert ask(traced, "span-5", f"00-{'3' * 32}-{SPAN_ID}-01").status_code == 200
        wait_until(lambda: len(collector.of_trace("3" * 32)) == 3, 20, "the spans of the later one")
        assert collector.of_trace("2" * 32) == []
        assert {line["trace_id"] for line in lines_of(traced, "span-4").values()} == {"2" * 32}

    def test_a_collector_that_is_gone_costs_no_answer_and_holds_up_no_stop(
        self, tmp_path: Path, embedded_model: str
    ) -> None:
        env = {"OTEL_EXPORT_ENABLED": "1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"}
        with started(tmp_path, env) as pipeline:
            assert ask(pipeline, "span-6").status_code == 200
            asked_at = time.monotonic()
            assert [process.terminate() for process in reversed(pipeline.processes)] == [0, 0, 0]
            assert time.monotonic() - asked_at < 3 * 8, "each is through in two seconds, on a machine that is not busy"
