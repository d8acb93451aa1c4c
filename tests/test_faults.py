"""What clients see while parts of the pipeline die: the real servers and scripts, on engines of made-up tokens."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.load import CHAT, Load, ask, chat
from tests.processes import DYNAMO, Infra, Pipeline, Process, accepts, running, wait_until
from tests.raw_http import open_request

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """One frontend and one processor that see all faults of this module."""
    folder = tmp_path_factory.mktemp("faults")
    infra = Infra(folder / "infra")
    with running(infra.start()):
        pipeline = Pipeline(infra, folder / "scripts")
        with running(pipeline):
            pipeline.frontend()
            pipeline.processor()
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


def streamed_text(
    pipeline: Pipeline, on_first: threading.Event | None = None, timeout_s: float = 60, **fields: object
) -> str:
    """The joined deltas; the stream must end as it should."""
    with httpx.Client(base_url=pipeline.url, timeout=timeout_s) as client:
        asked = ask(client, {"stream": True} | fields, on_first)
    assert asked.outcome == "200"
    return asked.text


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
    with Load(scripts, num_clients=2) as load, Load(scripts, num_clients=2, stream=True) as streams:
        down.kill()
        gone = time.monotonic()
        if "empty" in server:
            infra.forget()
            down = infra.etcd
        time.sleep(outage_s)  # the outage itself
        down.start()
        back = time.monotonic()
        for some in (load, streams):
            some.wait_for(5, 15)
        for some in (load, streams):
            some.wait_for(20)
    outcomes = load.outcomes + streams.outcomes
    assert set(outcomes) <= {"200", "503 unavailable"}
    assert max(asked.took_s for asked in load.asked + streams.asked if asked.started > gone) < 45
    # What a processor had taken just before: its own call runs out of time first (10 s), then 30 s of patience begin.
    assert max(load.slowest_s, streams.slowest_s) < 55
    assert [process.pid for process in scripts.processes] == pids
    assert all(process.is_alive for process in scripts.processes)
    normal_s = max(some.disturbed_s(back) for some in (load, streams))
    print(
        f"{server} away for {outage_s} s: {load.outcomes + streams.outcomes}, normal {normal_s:.1f} s after its return"
    )
    assert normal_s < 15


@pytest.mark.skipif(DYNAMO.startswith("0.5."), reason="this Dynamo cannot connect anew: tests/test_dynamo_releases.py")
@pytest.mark.parametrize("server", ["etcd", "nats"])
def test_a_stream_in_work_outlives_an_outage(own_scripts: Pipeline, server: str) -> None:
    """NATS carries no answers, and etcd only says who is there, even if the outage is longer than a lease (10 s)."""
    scripts = own_scripts
    scripts.fake_engine("--token-interval-ms", "50")
    scripts.wait_ready()
    has_begun = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        text = thread.submit(streamed_text, scripts, has_begun, max_tokens=400)
        assert has_begun.wait(20)
        down = getattr(scripts.infra, server)
        down.kill()
        time.sleep(13)  # the outage itself
        down.start()
        assert not text.done()
        streamed = text.result(60)
    wait_until(lambda: chat(scripts).status_code == 200, 60, "a new request")
    assert chat(scripts, max_tokens=400).json()["choices"][0]["message"]["content"] == streamed


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
