"""What clients see while parts of the pipeline die: the real servers and scripts, on engines of made-up tokens."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.processes import DYNAMO, MODEL, Infra, Pipeline, Process, running, wait_until
from tests.raw_http import open_request

pytestmark = pytest.mark.process

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}


def frontend_and_processor(infra: Infra, folder: Path) -> Pipeline:
    pipeline = Pipeline(infra, folder)
    pipeline.frontend()
    pipeline.processor()
    return pipeline


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """One frontend and one processor that see all faults of this module."""
    folder = tmp_path_factory.mktemp("faults")
    infra = Infra(folder / "infra")
    with running(infra.start()):
        pipeline = frontend_and_processor(infra, folder / "scripts")
        with running(pipeline):
            yield pipeline


@pytest.fixture
def scripts(survivors: Pipeline) -> Iterator[Pipeline]:
    """The survivors, still the same processes; engines are the test's to start, and leave with it."""
    pids = [process.pid for process in survivors.processes]
    try:
        yield survivors
        assert [process.pid for process in survivors.processes[:2]] == pids
        assert all(process.is_alive for process in survivors.processes[:2])
    finally:
        survivors.stop_all_but(2)
        for key in survivors.infra.instance_keys("engine/generate"):
            survivors.infra.etcdctl("del", key)  # of a killed one; its lease would end in 10 s


@pytest.fixture
def own_scripts(own_infra: Infra, tmp_path: Path, embedded_model: str) -> Iterator[Pipeline]:
    """A frontend and a processor that the test stops."""
    pipeline = frontend_and_processor(own_infra, tmp_path / "scripts")
    with running(pipeline):
        yield pipeline


def chat(pipeline: Pipeline, timeout_s: float = 60, **fields: object) -> httpx.Response:
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT | fields, timeout=timeout_s)


def streamed_text(
    pipeline: Pipeline, on_first: threading.Event | None = None, timeout_s: float = 5, **fields: object
) -> str:
    """The joined deltas; the stream must end as it should."""
    text, last = "", ""
    url, body = f"{pipeline.url}/v1/chat/completions", CHAT | {"stream": True} | fields
    with httpx.stream("POST", url, json=body, timeout=timeout_s) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line:
                continue
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                event = json.loads(last)
                assert "error" not in event, event
                text += event["choices"][0]["delta"].get("content", "")
                if on_first and text:
                    on_first.set()
    assert last == "[DONE]"
    return text


class Load:
    """Clients that ask again and again while something is done to the pipeline; counts what they got."""

    def __init__(self, pipeline: Pipeline, *, num_clients: int = 4, **fields: object) -> None:
        self.pipeline, self.fields = pipeline, fields
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._end = threading.Event()
        self._threads = ThreadPoolExecutor(num_clients)
        self._clients = [self._threads.submit(self._ask_on_and_on) for _ in range(num_clients)]

    def _ask_on_and_on(self) -> None:
        with httpx.Client(base_url=self.pipeline.url, timeout=60) as client:
            while not self._end.is_set():
                started = time.monotonic()
                try:
                    answer = client.post("/v1/chat/completions", json=CHAT | self.fields)
                    outcome = str(answer.status_code)
                    if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] != CHAT["max_tokens"]:
                        outcome = "short answer"
                except httpx.HTTPError as error:
                    outcome = type(error).__name__
                self.outcomes[outcome] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    def wait_for(self, num_answers: int) -> None:
        target = self.outcomes["200"] + num_answers
        wait_until(lambda: self.outcomes["200"] >= target, 60, f"{num_answers} more answers; had {self.outcomes}")

    def __enter__(self) -> "Load":
        self.wait_for(8)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._threads.shutdown()
        for client in self._clients:
            client.result()
        print(f"{dict(self.outcomes)}, longest wait {self.slowest_s:.1f} s")


def two_engines(pipeline: Pipeline, *args: str) -> tuple[Process, Process]:
    engines = pipeline.fake_engine(*args), pipeline.fake_engine(*args)
    pipeline.wait_ready(engines=2)
    return engines


def test_no_request_fails_when_one_of_two_engines_is_killed(scripts: Pipeline) -> None:
    first, _ = two_engines(scripts, "--token-interval-ms", "2")
    with Load(scripts) as load:
        first.kill()
        load.wait_for(60)
    assert set(load.outcomes) == {"200"}
    assert load.slowest_s < 5


def test_a_stream_goes_on_where_it_was_when_its_engine_is_killed(scripts: Pipeline) -> None:
    engines = two_engines(scripts, "--token-interval-ms", "30")
    expected = chat(scripts, max_tokens=100).json()["choices"][0]["message"]["content"]
    has_begun = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        text = thread.submit(streamed_text, scripts, has_begun, max_tokens=100)
        assert has_begun.wait(20)
        busy = next(engine for engine in engines if "running 1" in engine.log.splitlines()[-1])
        busy.kill()
        assert text.result(60) == expected


def test_a_restart_of_the_only_engine_is_a_pause_and_not_an_error(scripts: Pipeline) -> None:
    engine = scripts.fake_engine("--token-interval-ms", "2")
    scripts.wait_ready()
    with Load(scripts) as load:
        engine.kill()
        engine.start()
        load.wait_for(30)
    assert set(load.outcomes) == {"200"}


def test_no_request_fails_when_one_of_two_processors_is_killed(scripts: Pipeline) -> None:
    scripts.fake_engine("--token-interval-ms", "2")
    second = scripts.processor()
    wait_until(lambda: "serving inference/processor/process" in second.log, 60, "the second processor")
    scripts.wait_ready(processors=2)
    with Load(scripts) as load:
        second.kill()
        load.wait_for(60)
    assert set(load.outcomes) == {"200"}


def test_a_graceful_stop_fails_no_request_when_there_is_another_one(scripts: Pipeline) -> None:
    engine, _ = two_engines(scripts, "--token-interval-ms", "5")
    processor = scripts.processor()
    wait_until(lambda: "serving inference/processor/process" in processor.log, 60, "the second processor")
    scripts.wait_ready(processors=2, engines=2)
    with Load(scripts) as load:
        assert engine.terminate() == 0
        load.wait_for(30)
        assert processor.terminate() == 0
        load.wait_for(30)
    assert set(load.outcomes) == {"200"}
    assert load.slowest_s < 5


def test_a_graceful_stop_of_the_whole_pipeline_finishes_what_is_in_work(own_scripts: Pipeline) -> None:
    scripts = own_scripts
    engine = scripts.fake_engine("--token-interval-ms", "50")
    scripts.wait_ready()
    frontend, processor = scripts.processes[:2]
    has_begun = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        text = thread.submit(streamed_text, scripts, has_begun, max_tokens=60)
        assert has_begun.wait(20)
        codes = list(ThreadPoolExecutor(3).map(Process.terminate, (engine, processor, frontend)))
        assert len(text.result(60)) > 60
    assert codes == [0, 0, 0]
    assert scripts.infra.instance_keys() == []


def test_a_stopped_process_never_crashes_on_its_way_out(infra: Infra, tmp_path: Path) -> None:
    """Many at once: the runtime's threads crashed one in thirty while the interpreter was torn down."""
    engines_only = Pipeline(infra, tmp_path)
    try:
        engines = [engines_only.fake_engine() for _ in range(12)]
        for engine in engines:
            wait_until(lambda engine=engine: "serving inference/engine/generate" in engine.log, 60, "an engine")  # type: ignore[misc]
        with ThreadPoolExecutor(len(engines)) as threads:
            assert list(threads.map(Process.terminate, engines)) == [0] * len(engines)
    finally:
        engines_only.stop()


def test_a_drain_has_a_deadline_and_a_second_signal_ends_at_once(scripts: Pipeline) -> None:
    engine = scripts.script(
        "tests/fake_engine.py", "--token-ids", "1000", "--token-interval-ms", "1000",
        env={"DYN_CHAT_DRAIN_TIMEOUT_S": "2"},
    )  # fmt: skip
    other = scripts.fake_engine("--token-interval-ms", "1000")
    scripts.wait_ready(engines=2)
    with ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(open_request(scripts, max_tokens=1000))
        wait_until(lambda: all("running 1" in fake.log for fake in (engine, other)), 20, "requests on both engines")
        started = time.monotonic()
        engine.terminate(timeout_s=20)
        assert time.monotonic() - started < 15
        other.running.terminate()
        wait_until(lambda: "stopping" in other.log, 5, "the drain")
        assert other.is_alive
        other.running.terminate()
        assert other.running.wait(5) == 1


def test_an_abandoned_request_stops_at_the_engine_within_a_second(scripts: Pipeline) -> None:
    engine = scripts.fake_engine("--token-interval-ms", "20")
    scripts.wait_ready()
    for stream in (False, True):
        num_stopped = engine.log.count("stopped True")
        abandon(scripts, max_tokens=2000, stream=stream)
        wait_until(lambda before=num_stopped: engine.log.count("stopped True") > before, 1.5, "the engine to stop")  # type: ignore[misc]


def abandon(pipeline: Pipeline, **fields: object) -> None:
    """Go away after a second without an answer, or after some events."""
    with (
        suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{pipeline.url}/v1/chat/completions", timeout=1, json=CHAT | fields) as response,
    ):
        for number, _ in enumerate(response.iter_lines()):
            if number > 5:
                return


def test_a_stop_string_stops_the_engine(scripts: Pipeline) -> None:
    engine = scripts.fake_engine("--token-interval-ms", "20")
    scripts.wait_ready()
    text = chat(scripts, max_tokens=8).json()["choices"][0]["message"]["content"]
    answer = chat(scripts, max_tokens=2000, stop=text[-5:]).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == text[: text.index(text[-5:])]
    assert answer["usage"]["completion_tokens"] <= 8
    wait_until(lambda: "stopped True" in engine.log, 1.5, "the engine to stop")


@pytest.mark.parametrize("outage_s", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("server", ["etcd", "etcd with an empty store", "nats"])
def test_the_pipeline_lives_through_an_outage(scripts: Pipeline, server: str, outage_s: int) -> None:
    if "etcd" in server and DYNAMO.startswith("0.5."):
        pytest.skip("this Dynamo cannot connect anew: tests/test_dynamo_releases.py")
    scripts.fake_engine()
    scripts.wait_ready()
    pids = [process.pid for process in scripts.processes]
    infra = scripts.infra
    down = infra.nats if server == "nats" else infra.etcd
    with Load(scripts, num_clients=2) as load:
        down.kill()
        if "empty" in server:
            infra.forget()
            down = infra.etcd
        time.sleep(outage_s)  # the outage itself
        before = Counter(load.outcomes)
        down.start()
        recovered_s = wait_until(lambda: load.outcomes["200"] > before["200"] + 5, 15, f"recovery: {load.outcomes}")
        load.wait_for(20)
    assert set(load.outcomes) <= {"200", "503"}
    assert load.slowest_s < 45
    assert [process.pid for process in scripts.processes] == pids
    assert all(process.is_alive for process in scripts.processes)
    print(f"{server} away for {outage_s} s: {dict(load.outcomes)}, back after {recovered_s:.1f} s")
