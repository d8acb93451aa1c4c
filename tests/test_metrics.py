"""What the three real scripts count, as a scraper reads it: engine.py's own handler, without SGLang under it."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import (
    DYNAMO,
    ROOT,
    SHORT_LEASE,
    Pipeline,
    Process,
    free_port,
    new_pipeline,
    wait_until,
)
from tests.raw_http import CHAT
from tests.streams import ask_stream

pytestmark = [
    pytest.mark.process,
    pytest.mark.timed,
    pytest.mark.skipif(DYNAMO.startswith("0."), reason="shows only its own metrics: docs/observability.md"),
]

PREFIX = "dynamo_chat_"
CHAT_PATH = "/v1/chat/completions"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scraped:
    """The text that one process shows."""

    def __init__(self, url: str) -> None:
        answer = httpx.get(f"{url}/metrics", timeout=10)
        assert answer.status_code == 200
        self.text = answer.text
        self.samples: Samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    def sum(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        wanted = labels.items()
        return sum(
            value for (found, given), value in self.samples.items() if found == PREFIX + name and wanted <= set(given)
        )


class Scripts:
    """A pipeline whose processes show their metrics."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.urls: dict[str, str] = {"frontend": self.pipeline.url}

    def own_port(self, component: str) -> Mapping[str, str]:
        port = free_port()
        self.urls[component] = f"http://127.0.0.1:{port}"
        return {"DYN_SYSTEM_PORT": str(port)}

    def scrape(self) -> dict[str, Scraped]:
        return {component: Scraped(url) for component, url in self.urls.items()}


class Growth:
    """What a process has counted since this was made."""

    def __init__(self, scripts: Scripts, component: str) -> None:
        self.url, self.component = scripts.urls[component], component
        self.before = Scraped(self.url)

    def __call__(self, name: str, **labels: str) -> float:
        labels["component"] = self.component
        return Scraped(self.url).sum(name, **labels) - self.before.sum(name, **labels)

    def outcomes(self) -> dict[str, float]:
        """How many requests ended how, without those that none did."""
        outcomes = {
            dict(labels)["outcome"] for name, labels in Scraped(self.url).samples if name == f"{PREFIX}requests_total"
        }
        return {outcome: grown for outcome in outcomes if (grown := self("requests_total", outcome=outcome))}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Scripts]:
    with new_pipeline(tmp_path_factory.mktemp("metrics")) as pipeline:
        scripts = Scripts(pipeline)
        pipeline.script("tests/engine_without_sglang.py", env=scripts.own_port("engine"))
        pipeline.processor(env=scripts.own_port("processor"))
        pipeline.frontend("--max-concurrency", "3", "--api-key", "key")
        pipeline.wait_ready()
        yield scripts


@pytest.fixture
def client(scripts: Scripts) -> Iterator[httpx.Client]:
    headers = {"authorization": "Bearer key"}
    with httpx.Client(base_url=scripts.pipeline.url, timeout=60, headers=headers) as client:
        yield client


@pytest.fixture
def grown(scripts: Scripts) -> dict[str, Growth]:
    """What each process counts during a test."""
    return {component: Growth(scripts, component) for component in scripts.urls}


def test_the_table_names_what_the_processes_show(scripts: Scripts) -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    rows = re.findall(rf"^\| `({PREFIX}\w+)` \| (\w+) \| ([\w, ]+) \|", page, re.MULTILINE)
    for component, scraped in scripts.scrape().items():
        told = {(name, kind) for name, kind, shown_by in rows if component in shown_by or shown_by == "all"}
        assert set(re.findall(rf"^# TYPE ({PREFIX}\w+) (\w+)", scraped.text, re.MULTILINE)) == told


def test_a_whole_answer_is_counted_by_all_three(client: httpx.Client, grown: dict[str, Growth]) -> None:
    usage = client.post(CHAT_PATH, json=CHAT | {"max_tokens": 5}).json()["usage"]
    assert usage["completion_tokens"] == 5
    for component, grew in grown.items():
        assert grew.outcomes() == {"ok": 1}
        assert grew("prompt_tokens_total") == usage["prompt_tokens"]
        assert grew("completion_tokens_total") == 5
        assert grew("request_duration_seconds_count") == 1
        assert grew("time_to_first_token_seconds_count") == 0, "nobody saw a first token"
        if component != "engine":
            assert grew("retries_total") == grew("migrations_total") == 0


def test_a_stream_tells_when_its_tokens_came(client: httpx.Client, grown: dict[str, Growth]) -> None:
    ask_stream(client, CHAT | {"max_tokens": 11})
    for component, grew in grown.items():
        assert grew.outcomes() == {"ok": 1}
        assert grew("time_to_first_token_seconds_count") == 1
        assert 0 < grew("time_to_first_token_seconds_sum") < 5
        name = "time_per_output_token_seconds" if component == "frontend" else "inter_token_latency_seconds"
        num_seen = 1 if component == "frontend" else 10  # a chunk a token, and one was the first
        assert grew(f"{name}_count") == num_seen
        assert 0.005 < grew(f"{name}_sum") / num_seen < 0.5, "the engine takes 10 ms for a token"
    assert grown["engine"]("queue_time_seconds_count") == 1
    assert grown["engine"]("queue_time_seconds_sum") == pytest.approx(0.25)


def test_each_choice_has_times_of_its_own(client: httpx.Client, grown: dict[str, Growth]) -> None:
    ask_stream(client, CHAT | {"max_tokens": 11, "n": 3})
    assert grown["engine"].outcomes() == {"ok": 3}
    for component in ("processor", "engine"):
        assert grown[component]("inter_token_latency_seconds_count") == 30
    assert grown["processor"]("time_to_first_token_seconds_count") == 1
    for component in ("processor", "frontend"):
        assert grown[component].outcomes() == {"ok": 1}
        assert grown[component]("completion_tokens_total") == 33
    assert 0.005 < grown["frontend"]("time_per_output_token_seconds_sum") < 0.5


def test_a_refused_request_is_counted_by_its_code(client: httpx.Client, grown: dict[str, Growth]) -> None:
    assert client.post(CHAT_PATH, json={}).status_code == 400
    assert client.post(CHAT_PATH, json=CHAT | {"model": "nope"}).status_code == 404
    assert client.post(CHAT_PATH, content=b"x").status_code == 415
    assert client.post(CHAT_PATH, json=CHAT, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert client.post(CHAT_PATH, json=CHAT | {"logit_bias": {"99999": 1}}).status_code == 400  # the processor's word
    assert client.get(CHAT_PATH).status_code == 405
    assert client.get("/v1/models").status_code == 200
    assert grown["frontend"].outcomes() == {
        "invalid_request_error": 2, "model_not_found": 1, "unsupported_media_type": 1, "invalid_api_key": 1,
    }  # fmt: skip
    assert grown["processor"].outcomes() == {"invalid_request_error": 1}
    assert grown["engine"].outcomes() == {}


def test_who_is_in_work_and_who_gave_up(scripts: Scripts, client: httpx.Client, grown: dict[str, Growth]) -> None:
    body = CHAT | {"stream": True, "max_tokens": 3000}
    with ExitStack() as streams:
        lines = [streams.enter_context(client.stream("POST", CHAT_PATH, json=body)).iter_lines() for _ in range(3)]
        assert all(next(answer).startswith("data: ") for answer in lines)
        assert client.post(CHAT_PATH, json=CHAT).status_code == 429
        assert {c: s.sum("requests_in_flight", component=c) for c, s in scripts.scrape().items()} == dict.fromkeys(
            scripts.urls, 3
        )
    for component, grew in grown.items():
        wait_until(lambda grew=grew: grew.outcomes().get("cancelled") == 3, 10, f"{component} to count them")
        assert Scraped(grew.url).sum("requests_in_flight", component=component) == 0
    assert grown["frontend"].outcomes() == {"cancelled": 3, "overloaded": 1}
    assert 0 < grown["engine"]("completion_tokens_total") < 3000


def test_metrics_need_no_key_and_leave_no_line(scripts: Scripts) -> None:
    frontend = next(process for process in scripts.pipeline.processes if process.name == "frontend.py")
    answer = httpx.get(f"{scripts.pipeline.url}/metrics", headers={"x-request-id": "scraper"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert httpx.head(f"{scripts.pipeline.url}/metrics", headers={"x-request-id": "scraper"}).status_code == 200
    assert "scraper" not in frontend.log


def test_a_workers_port_is_on_loopback_and_has_dynamos_metrics_too(scripts: Scripts) -> None:
    for component in ("processor", "engine"):
        port = int(scripts.urls[component].rpartition(":")[2])
        listening = [each.laddr for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
        assert Scraped(scripts.urls[component]).text.count("# TYPE dynamo_component_requests_total counter") == 1


@pytest.fixture(scope="module")
def without_engine(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Scripts]:
    with new_pipeline(tmp_path_factory.mktemp("faulty")) as pipeline:
        scripts = Scripts(pipeline)
        pipeline.processor("--engine-wait", "1", env={**scripts.own_port("processor"), **SHORT_LEASE})
        pipeline.frontend()
        yield scripts


@pytest.fixture
def faulty(without_engine: Scripts) -> Iterator[Scripts]:
    """A pipeline without an engine, to be harmed: engines are the test's to start, and leave with it."""
    yield without_engine
    without_engine.pipeline.stop_all_but(2)
    for key in without_engine.pipeline.infra.instance_keys("engine/generate"):
        without_engine.pipeline.infra.etcdctl("del", key)  # of a killed one; its lease would end in 10 s


def test_answers_that_changed_the_engine_are_counted(faulty: Scripts) -> None:
    engines = [faulty.pipeline.fake_engine("--token-interval-ms", "20") for _ in range(2)]
    faulty.pipeline.wait_ready(engines=2)
    assert Scraped(faulty.urls["processor"]).sum("instances", endpoint="inference/engine/generate") == 2
    processor, frontend = Growth(faulty, "processor"), Growth(faulty, "frontend")
    with httpx.stream(
        "POST", faulty.pipeline.url + CHAT_PATH, json=CHAT | {"stream": True, "max_tokens": 100}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        wait_until(lambda: any("running 1" in engine.log for engine in engines), 10, "who answers")
        serving = next(engine for engine in engines if "running 1" in engine.log)
        serving.kill()
        assert "data: [DONE]" in list(lines)
    assert processor("migrations_total", endpoint="inference/engine/generate") == 1
    time.sleep(3.5)  # etcd still lists the dead engine, and the processor tries it again
    for _ in range(2):
        assert httpx.post(faulty.pipeline.url + CHAT_PATH, json=CHAT).status_code == 200
    assert processor("retries_total", endpoint="inference/engine/generate") == 1
    assert processor.outcomes() == frontend.outcomes() == {"ok": 3}
    assert frontend("migrations_total") == frontend("retries_total") == 0


def test_no_engine_is_an_outcome(faulty: Scripts) -> None:
    engine: Process = faulty.pipeline.fake_engine()
    faulty.pipeline.wait_ready()
    grown = [Growth(faulty, component) for component in ("processor", "frontend")]
    engine.terminate()
    assert httpx.post(faulty.pipeline.url + CHAT_PATH, json=CHAT, timeout=30).status_code == 503
    assert [grew.outcomes() for grew in grown] == [{"unavailable": 1}] * 2
    assert Scraped(faulty.urls["processor"]).sum("instances", endpoint="inference/engine/generate") == 0
    assert Scraped(faulty.urls["frontend"]).sum("instances", endpoint="inference/processor/process") == 1


def test_a_new_connection_to_etcd_keeps_what_was_counted(faulty: Scripts) -> None:
    infra = faulty.pipeline.infra
    wait_until(lambda: len(infra.instance_keys("processor/process")) == 1, 60, "the processor")
    processor = Growth(faulty, "processor")
    assert httpx.post(faulty.pipeline.url + CHAT_PATH, json=CHAT, timeout=30).status_code == 503
    infra.etcd.kill()
    wait_until(lambda: "etcd has forgotten" in faulty.pipeline.logs(), 40, "the lease to end")
    infra.forget()
    infra.etcd.start()
    wait_until(lambda: len(infra.instance_keys("processor/process")) == 1, 40, "it to be back")
    assert processor.outcomes() == {"unavailable": 1}
