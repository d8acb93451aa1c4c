"""The live page's routes, and a request's path as data; tests/test_live_page_browser.py looks at the page itself."""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadUpstream
from common.observability.request_records import SHOW_PATH_HEADER
from common.page.live_page import PAGE, cache_figures, page_headers
from common.wire import (
    NUM_LOWEST_HASHES,
    CacheDescription,
    EngineChunk,
    Envelope,
    ProcessorChunk,
    to_wire,
)
from tests.contexts import request_context
from tests.frontends import frontend_beside
from tests.processes import MODEL, Pipeline, new_pipeline
from tests.streams import ask_stream

CHAT_PATH = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
SHOW = {SHOW_PATH_HEADER: "1"}
NAMES = st.sampled_from(["path", "first_us", "last_us", "calls", "instance", "called_us", "is_broken", "stage"])
NEARLY_STAGES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("ff"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner),
)


class TestThePage:
    html = PAGE.read_text()

    def test_it_has_nothing_that_its_policy_would_stop(self) -> None:
        assert not re.search(r"""\s(on\w+|style)=["']""", self.html)
        assert re.findall(r"<(script|style)\b(.*?)>", self.html) == [("style", ""), ("script", "")]

    def test_it_names_no_other_host(self) -> None:
        assert set(re.findall(r"https?://[^\"' ]+", self.html)) == {"http://www.w3.org/2000/svg"}  # a name, no address

    def test_it_never_makes_html_of_a_text(self) -> None:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", self.html)

    def test_its_policy_allows_nothing_but_its_own_script_and_style(self) -> None:
        policy = dict(part.split(" ", 1) for part in page_headers(self.html)["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        for directive in ("script-src", "style-src"):
            assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[directive])
        changed = page_headers(self.html.replace("look();", "look( );"))
        assert changed["content-security-policy"] != page_headers(self.html)["content-security-policy"]


class TestCaches:
    def test_what_is_cached_elsewhere_too_counts_as_shared(self) -> None:
        figures = cache_figures({1: cache(range(8)), 2: cache(range(6, 10)), 3: cache(range(0))})
        assert {id: each.num_shared_tokens for id, each in figures.items()} == {1: 32, 2: 32, 3: 0}
        assert (figures[2].num_tokens, figures[2].max_num_tokens) == (64, 160_000)

    @pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
    def test_of_large_caches_samples_are_compared(self, part: float) -> None:
        numbers = random.Random(1)
        first = [numbers.getrandbits(64) for _ in range(10_000)]
        second = [each if numbers.random() < part else numbers.getrandbits(64) for each in first[:5000]]
        figures = cache_figures({1: cache(first), 2: cache(second)})
        assert figures[1].num_shared_tokens / 160_000 == pytest.approx(part / 2, abs=0.1)
        assert figures[2].num_shared_tokens / 80_000 == pytest.approx(part, abs=0.1)


def cache(block_hashes: Sequence[int]) -> CacheDescription:
    return CacheDescription(16 * len(block_hashes), 160_000, sorted(block_hashes)[:NUM_LOWEST_HASHES])


class TestAPath:
    def test_nobody_who_does_not_ask_gets_one(self) -> None:
        assert Envelope.taken_from({"token_ids": [1]}) == Envelope()
        assert Envelope.taken_from({"show_path": False}) == Envelope()
        chunk = EngineChunk(finish_reason="stop")
        request_context("engine").record.answers(chunk)
        assert to_wire(chunk) == {"finish_reason": "stop"}

    def test_it_comes_with_the_dicts_that_end_a_stream_only(self) -> None:
        request = {"token_ids": [1], "show_path": True}
        assert Envelope.taken_from(request).show_path
        assert request == {"token_ids": [1]}
        record = request_context("engine", show_path=True).record
        first, last = EngineChunk(token_ids=[1]), EngineChunk(finish_reason="stop")
        for chunk in (first, last):
            record.answers(chunk)
        assert to_wire(first) == {"token_ids": [1]}
        assert to_wire(last)["path"].keys() == {"first_us", "last_us"}

    def test_it_tells_who_was_called_and_who_broke(self) -> None:
        record = request_context("processor", show_path=True).record
        record.calling(2**63).broke()
        last = EngineChunk.read({"finish_reason": "stop", "path": {"first_us": 1, "last_us": 2}})
        record.calling(255).received(last)
        assert record.path is not None
        first, second = to_wire(record.path.trace)["calls"]
        assert (first["instance"], first["is_broken"]) == ("8000000000000000", True)
        assert (second["instance"], second["stage"]) == ("ff", {"first_us": 1, "last_us": 2})
        assert 0 <= first["called_us"] <= first["last_us"] <= second["called_us"] <= second["first_us"]

    @pytest.mark.parametrize(
        "stage",
        [
            "quick",
            {"first_us": -1},
            {"last_us": 1.5},
            {"first_us": float("nan")},
            {"calls": [{}]},
            {"calls": [{"instance": "<img>", "called_us": 1}]},
            {"calls": [{"instance": "ff", "called_us": 1, "stage": {"last_us": "late"}}]},
            {"calls": [{"instance": "ff", "called_us": 1}] * 2000},
        ],
    )
    def test_what_a_worker_tells_is_checked(self, stage: Any) -> None:
        with pytest.raises(BadUpstream):
            EngineChunk.read({"finish_reason": "stop", "path": stage})

    @given(NEARLY_STAGES)
    def test_nothing_but_our_errors_escapes(self, data: Any) -> None:
        with suppress(BadUpstream):
            ProcessorChunk.read({"path": data})


def duration_us(call: dict[str, Any]) -> int:
    return int(call["last_us"] - call["called_us"])


def assert_is_the_way(path: dict[str, Any], pipeline: Pipeline, pid: int) -> None:
    """Two hops, to instances that etcd knows, and no worker has worked longer than its caller has waited."""
    assert path["pid"] == pid
    [to_processor] = path["calls"]
    [to_engine] = to_processor["stage"]["calls"]
    for call, endpoint in ((to_processor, "processor/process"), (to_engine, "engine/generate")):
        assert any(key.endswith(call["instance"]) for key in pipeline.infra.instance_keys(endpoint))
        assert call["stage"]["first_us"] <= call["first_us"] - call["called_us"]
        assert call["stage"]["last_us"] <= duration_us(call)
    assert duration_us(to_engine) <= to_processor["stage"]["last_us"] <= path["last_us"]


@pytest.mark.process
class TestRoutes:
    def test_the_page_is_served(self, fake_client: httpx.Client) -> None:
        page = fake_client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert page.text == PAGE.read_text()
        head = fake_client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(page.content))
        assert fake_client.post("/").status_code == 405

    def test_the_pipeline_is_who_is_in_etcd(self, fake_pipeline: Pipeline, fake_client: httpx.Client) -> None:
        told = fake_client.get("/pipeline").json()
        assert told["frontend"] == {"pid": fake_pipeline.processes[-1].pid}
        assert [processor["models"] for processor in told["processors"]] == [[MODEL]]
        for kind, endpoint in (("processors", "processor/process"), ("engines", "engine/generate")):
            [key], [instance] = fake_pipeline.infra.instance_keys(endpoint), told[kind]
            assert re.split("[:/]", key)[-1] == instance["instance"]
        assert fake_client.head("/pipeline").status_code == 200

    def test_looking_at_it_does_not_fill_the_log(self, fake_pipeline: Pipeline, fake_client: httpx.Client) -> None:
        fake_client.get("/pipeline")
        fake_client.get("/v1/models")
        assert "GET /v1/models 200" in fake_pipeline.processes[-1].log
        assert "GET /pipeline" not in fake_pipeline.processes[-1].log

    def test_the_key_protects_the_pipeline_and_not_the_page(self, fake_pipeline: Pipeline, tmp_path: Path) -> None:
        with frontend_beside(fake_pipeline, tmp_path, "--api-key", "secret") as keyed:
            assert httpx.get(f"{keyed.url}/").status_code == 200
            assert httpx.get(f"{keyed.url}/pipeline").status_code == 401
            answer = httpx.get(f"{keyed.url}/pipeline", headers={"authorization": "Bearer secret"})
            assert len(answer.json()["engines"]) == 1

    def test_without_the_page_there_is_nothing_of_it(self, fake_pipeline: Pipeline, tmp_path: Path) -> None:
        with frontend_beside(fake_pipeline, tmp_path, "--no-page") as plain:
            for path in ("/", "/pipeline"):
                answer = httpx.get(plain.url + path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            assert "path" not in httpx.post(plain.url + CHAT_PATH, json=CHAT, headers=SHOW).json()


@pytest.mark.process
class TestAPathOnTheWay:
    def test_a_whole_answer_tells_it(self, fake_pipeline: Pipeline, fake_client: httpx.Client) -> None:
        answer = fake_client.post(CHAT_PATH, json=CHAT, headers=SHOW).json()
        assert_is_the_way(answer["path"], fake_pipeline, fake_pipeline.processes[-1].pid)

    @pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}], ids=["alone", "with usage"])
    def test_a_stream_tells_it_in_its_last_chunk(
        self, fake_pipeline: Pipeline, fake_client: httpx.Client, options: dict[str, Any]
    ) -> None:
        events = ask_stream(fake_client, {**CHAT, **options}, **SHOW).events
        assert events[-1]["choices"] == []
        assert ("usage" in events[-1]) == bool(options)
        assert not any("path" in event for event in events[:-1])
        assert_is_the_way(events[-1]["path"], fake_pipeline, fake_pipeline.processes[-1].pid)

    def test_it_has_a_call_for_each_choice(self, fake_client: httpx.Client) -> None:
        path = fake_client.post(CHAT_PATH, json={**CHAT, "n": 3}, headers=SHOW).json()["path"]
        assert len(path["calls"][0]["stage"]["calls"]) == 3

    def test_nobody_else_gets_it(self, fake_client: httpx.Client) -> None:
        for headers in ({}, {SHOW_PATH_HEADER: "0"}, {SHOW_PATH_HEADER: "true"}):
            assert "path" not in fake_client.post(CHAT_PATH, json=CHAT, headers=headers).json()
            assert not any("path" in event for event in ask_stream(fake_client, CHAT, **headers).events)

    def test_a_body_cannot_ask_for_it(self, fake_client: httpx.Client) -> None:
        answer = fake_client.post(CHAT_PATH, json={**CHAT, "show_path": True})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "show_path")


@pytest.fixture(scope="module")
def plain_workers(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """Workers that know no more than the chapter does."""
    with new_pipeline(tmp_path_factory.mktemp("plain")) as pipeline:
        pipeline.frontend()
        yield pipeline


@pytest.mark.process
def test_workers_that_know_nothing_of_it_answer_all_the_same(plain_workers: Pipeline) -> None:
    pipeline = plain_workers
    engine, processor = pipeline.fake_engine("--plain"), pipeline.processor()
    pipeline.wait_ready()
    [to_processor] = httpx.post(pipeline.url + CHAT_PATH, json=CHAT, headers=SHOW, timeout=30).json()["path"]["calls"]
    [to_engine] = to_processor["stage"]["calls"]
    assert "stage" not in to_engine
    assert 0 < duration_us(to_engine) <= duration_us(to_processor)
    processor.terminate()
    pipeline.script("tests/fake_processor.py")
    pipeline.wait_ready()
    answer = httpx.post(pipeline.url + CHAT_PATH, json=CHAT, headers=SHOW, timeout=30).json()
    assert answer["choices"][0]["message"]["content"] == "Hello from afar."
    assert "stage" not in answer["path"]["calls"][0]
    assert engine.is_alive
