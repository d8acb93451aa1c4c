"""What clients see while parts of the pipeline die: the real servers and scripts, on engines of made-up tokens."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import httpx
import pytest

from tests.load import CHAT, Load, chat, streamed_text
from tests.processes import DYNAMO, SHORT_LEASE, Infra, Pipeline, Process, accepts, new_pipeline, running, wait_until
from tests.raw_http import open_request

pytestmark = [pytest.mark.process, pytest.mark.timed]


NATS_TIMEOUT_S = 10  # Dynamo's own
HASTY_S = 4
NUM_LEFT = 40


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """One frontend and one processor that see all faults of this module."""
    with new_pipeline(tmp_path_factory.mktemp("faults")) as pipeline:
        pipeline.frontend()
        pipeline.processor()
        yield pipeline


@pytest.fixture(scope="module")
def hasty_survivors(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The same, with little patience for each other, and with leases that etcd ends after two seconds."""
    with new_pipeline(tmp_path_factory.mktemp("hasty"), env=SHORT_LEASE) as pipeline:
        pipeline.frontend("--processor-wait", str(HASTY_S))
        pipeline.processor("--engine-wait", str(HASTY_S))
        yield pipeline


def surviving(pipeline: Pipeline) -> Iterator[Pipeline]:
    """Frontend and processor, still the same processes; engines are the test's to start, and leave with it."""
    pids = [process.pid for process in pipeline.processes]
    try:
        yield pipeline
        assert [process.pid for process in pipeline.processes[:2]] == pids
        assert all(process.is_alive for process in pipeline.processes[:2])
    finally:
        pipeline.stop_all_but(2)
        for key in pipeline.infra.instance_keys("engine/generate"):
            pipeline.infra.etcdctl("del", key)  # of a killed one; its lease would end in 10 s


@pytest.fixture
def scripts(survivors: Pipeline) -> Iterator[Pipeline]:
    yield from surviving(survivors)


@pytest.fixture
def hasty(hasty_survivors: Pipeline) -> Iterator[Pipeline]:
    yield from surviving(hasty_survivors)


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


def test_a_stopped_process_never_crashes_on_its_way_out(own_infra: Infra, tmp_path: Path) -> None:
    """Many at once: the runtime's threads crashed one in thirty while the interpreter was torn down."""
    engines_only = Pipeline(own_infra, tmp_path / "scripts")
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
        wait_until(lambda: "stopping" in other.log, 20, "the drain")
        assert other.is_alive
        other.running.terminate()
        assert other.running.wait(20) == 1


def test_an_abandoned_request_stops_at_the_engine_within_a_second(scripts: Pipeline) -> None:
    engine = scripts.fake_engine("--token-interval-ms", "20")
    scripts.wait_ready()
    for stream in (False, True):
        num_stopped = engine.log.count("stopped True")
        abandon(scripts, max_tokens=2000, stream=stream)
        wait_until(lambda before=num_stopped: engine.log.count("stopped True") > before, 1.5, "the engine to stop")  # type: ignore[misc]


def test_requests_that_are_left_at_once_stop_at_the_engine_too(scripts: Pipeline) -> None:
    """Their clients go while the streams of both hops open; an engine that is silent has no dict to notice it by."""
    engine = scripts.fake_engine("--first-token-ms", "60000")
    scripts.wait_ready()
    number = 0
    while number < NUM_LEFT or engine.log.count(": running ") < NUM_LEFT:  # they get as far as the machine is fast
        with ExitStack() as clients:
            for _ in range(8):
                clients.enter_context(open_request(scripts))
            time.sleep(number / NUM_LEFT * 0.03)
        number += 1
    wait_until(
        lambda: engine.log.count(": running ") == 2 * engine.log.count(", stopped True"), 20, "the engine to stop all"
    )


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


def outcomes_of_an_outage(scripts: Pipeline, server: str, outage_s: float, *, patience_s: float = 30) -> set[str]:
    """How requests end before, while and after a server is away.

    patience_s: the scripts' for each other. Where a processor had just taken a request, its own call to NATS runs out
    of time before that begins.
    """
    if "etcd" in server and DYNAMO.startswith("0.5."):
        pytest.skip("this Dynamo cannot connect anew: tests/test_dynamo_releases.py")
    scripts.fake_engine()
    scripts.wait_ready()
    pids = [process.pid for process in scripts.processes]
    infra = scripts.infra
    down = infra.nats if server == "nats" else infra.etcd
    with Load(scripts, num_clients=2) as wholes, Load(scripts, num_clients=2, stream=True) as streams:
        down.kill()
        gone = time.monotonic()
        if "empty" in server:
            infra.forget()
            down = infra.etcd
        time.sleep(outage_s)  # the outage itself
        down.start()
        back = time.monotonic()
        for load in (wholes, streams):
            load.wait_for(5, 15)
        for load in (wholes, streams):
            load.wait_for(20)
    asked = wholes.asked + streams.asked
    assert max(each.took_s for each in asked if each.started > gone) < patience_s + 15
    assert max(each.took_s for each in asked) < NATS_TIMEOUT_S + patience_s + 15
    assert [process.pid for process in scripts.processes] == pids
    assert all(process.is_alive for process in scripts.processes)
    normal_s = max(load.disturbed_s(back) for load in (wholes, streams))
    outcomes = wholes.outcomes + streams.outcomes
    print(f"{server} away for {outage_s} s: {outcomes}, normal {normal_s:.1f} s after its return")
    assert normal_s < 15
    return set(outcomes)


each_server = pytest.mark.parametrize("server", ["etcd", "etcd with an empty store", "nats"])


@each_server
def test_a_short_outage_fails_no_request(scripts: Pipeline, server: str) -> None:
    assert outcomes_of_an_outage(scripts, server, 3) == {"200"}


@each_server
def test_the_pipeline_lives_through_an_outage_longer_than_lease_and_patience(hasty: Pipeline, server: str) -> None:
    """What NATS' client had already taken when NATS went is answered once it is back: that may be all requests."""
    outcomes = outcomes_of_an_outage(hasty, server, HASTY_S + 3, patience_s=HASTY_S)
    assert outcomes - {"503 unavailable"} == {"200"}


@pytest.mark.long
@each_server
def test_the_pipeline_lives_through_a_minutes_outage(scripts: Pipeline, server: str) -> None:
    assert outcomes_of_an_outage(scripts, server, 60) == {"200", "503 unavailable"}


@pytest.mark.skipif(DYNAMO.startswith("0.5."), reason="this Dynamo cannot connect anew: tests/test_dynamo_releases.py")
@pytest.mark.parametrize("server", ["etcd", "nats"])
def test_a_stream_in_work_outlives_an_outage(hasty: Pipeline, server: str) -> None:
    """NATS carries no answers, and etcd only says who is there, even if the outage is longer than a lease."""
    hasty.fake_engine("--token-interval-ms", "30")
    hasty.wait_ready()
    has_begun = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        text = thread.submit(streamed_text, hasty, has_begun, max_tokens=160)
        assert has_begun.wait(20)
        down = getattr(hasty.infra, server)
        down.kill()
        time.sleep(3.5)  # the outage itself
        down.start()
        assert not text.done()
        streamed = text.result(60)
    wait_until(lambda: chat(hasty).status_code == 200, 60, "a new request")
    assert text_of_160_tokens(hasty) == streamed


@cache
def text_of_160_tokens(pipeline: Pipeline) -> str:
    return str(chat(pipeline, max_tokens=160).json()["choices"][0]["message"]["content"])


@pytest.mark.skipif(DYNAMO.startswith("0.5."), reason="this Dynamo cannot connect anew: tests/test_dynamo_releases.py")
def test_a_worker_that_starts_as_etcd_goes_away_registers_when_it_is_back(own_infra: Infra, tmp_path: Path) -> None:
    with running(pipeline := Pipeline(own_infra, tmp_path / "scripts")):
        worker = pipeline.script("tests/late_registration.py")
        wait_until(lambda: "connected" in worker.log, 30, "the worker")
        own_infra.etcd.kill()
        wait_until(lambda: "could not register" in worker.log, 30, "a registration that fails")
        own_infra.etcd.start()
        wait_until(lambda: accepts(own_infra.etcd_port), 10, "etcd")
        took_s = wait_until(lambda: bool(own_infra.instance_keys("engine/generate")), 15, "its key in etcd")
        assert worker.is_alive
    print(f"registered {took_s:.1f} s after etcd's return")


@pytest.mark.skipif(DYNAMO.startswith("0.5."), reason="this Dynamo connects once, so it says it the first time")
def test_a_worker_that_etcd_lets_in_but_not_write_ends_with_one_line(own_infra: Infra, tmp_path: Path) -> None:
    for words in (
        "user add root:secret", "user grant-role root root", "role add reader", "user add worker:secret",
        "role grant-permission --prefix=true reader read v1/", "user grant-role worker reader", "auth enable",
    ):  # fmt: skip
        own_infra.etcdctl(*words.split())
    env = {"ETCD_AUTH_USERNAME": "worker", "ETCD_AUTH_PASSWORD": "secret"}
    with running(pipeline := Pipeline(own_infra, tmp_path / "scripts", env=env)):
        worker = pipeline.fake_engine()
        assert worker.running.wait(30) == 1
        assert worker.log.splitlines()[-1].startswith("error: cannot register inference/engine/generate in etcd")
