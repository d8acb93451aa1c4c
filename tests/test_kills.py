"""Each process killed or stopped, alone or one of two, in the middle of requests: the rows of docs/faults.md."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from itertools import chain
from pathlib import Path

import httpx
import psutil
import pytest

from tests.frontends import frontend_beside
from tests.load import Asked, Load, ask, chat
from tests.processes import SHORT_LEASE, Pipeline, Process, new_pipeline, running, wait_until
from tests.raw_http import open_request

pytestmark = [pytest.mark.process, pytest.mark.timed]

HASTY_S = 3
WAIT_S = 30  # the processor's patience for an engine; one of made-up tokens is up in two or three; machines are busy
FIRST_TOKEN_S = 1.0
NUM_TOKENS = 60
PACE = ("--first-token-ms", str(int(FIRST_TOKEN_S * 1000)), "--token-interval-ms", "25")
UNDISTURBED_S = FIRST_TOKEN_S + NUM_TOKENS * 0.025
STARTED_S = 60  # a processor is up in six seconds

both_moments = pytest.mark.parametrize("is_midway", [False, True], ids=["before the first token", "midway"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """A frontend and a processor for all tests of this module; some of them start one or the other anew."""
    with new_pipeline(tmp_path_factory.mktemp("kills")) as pipeline:
        pipeline.frontend("--processor-wait", str(STARTED_S))
        pipeline.processor("--engine-wait", str(WAIT_S))
        yield pipeline


@pytest.fixture
def scripts(shared: Pipeline) -> Iterator[Pipeline]:
    """The frontend and the processor; what the test starts beside them ends with it."""
    processor = shared.processes[1]
    pid, keys = processor.pid, shared.infra.instance_keys("processor/process")
    yield shared
    shared.stop_all_but(2)
    for process in shared.processes:
        assert process.is_alive
    of_killed_ones = [] if processor.pid == pid else keys
    for key in [*of_killed_ones, *shared.infra.instance_keys("engine/generate")]:
        shared.infra.etcdctl("del", key)  # its lease would end in 10 s
    wait_until(lambda: len(shared.infra.instance_keys("processor/process")) == 1, 30, "the end of other processors")


@pytest.fixture
def two_of_port(shared: Pipeline, tmp_path: Path) -> Iterator[Pipeline]:
    """Two frontends on one port of their own, before the same processor."""
    frontends = Pipeline(shared.infra, tmp_path)
    with running(frontends):
        both = [frontends.frontend("--share-port") for _ in range(2)]
        wait_until(lambda: all(listens(each, frontends.http_port) for each in both), STARTED_S, "both frontends")
        yield frontends


def listens(process: Process, port: int) -> bool:
    connections = psutil.Process(process.pid).net_connections("tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


class Asking:
    """Whole answers and streams, as many of each as there are workers to take them in turn: each worker has one of
    both. All have begun; `engines` say in their logs when they work on one.
    """

    def __init__(self, pipeline: Pipeline, engines: Sequence[Process], *, of_each: int = 1, **fields: object) -> None:
        self.pipeline, self._engines, self._fields = pipeline, engines, fields
        self._threads = ThreadPoolExecutor(2 * of_each)
        self._has_text = [threading.Event() for _ in range(of_each)]
        self._wholes = [self._threads.submit(self._ask, None) for _ in range(of_each)]
        self._wait_for_running(of_each)
        self._streams = [self._threads.submit(self._ask, event) for event in self._has_text]
        self._wait_for_running(2 * of_each)
        self._begun = time.monotonic()

    def _ask(self, has_text: threading.Event | None) -> Asked:
        with httpx.Client(base_url=self.pipeline.url, timeout=60) as client:
            fields = {"max_tokens": NUM_TOKENS, "stream": has_text is not None, **self._fields}
            return ask(client, fields, has_text)

    def _wait_for_running(self, number: int) -> None:
        def num_running() -> int:
            lines = [re.findall(r": running (\d+)", engine.log) for engine in self._engines]
            return sum(int(counts[-1]) for counts in lines if counts)

        wait_until(lambda: num_running() == number, 20, f"the engines to work on {number} requests")

    def wait_until_midway(self) -> None:
        assert all(event.wait(20) for event in self._has_text)
        time.sleep(max(0.0, self._begun + FIRST_TOKEN_S + 0.5 - time.monotonic()))

    @property
    def has_text(self) -> bool:
        return any(event.is_set() for event in self._has_text)

    def results(self) -> tuple[list[Asked], list[Asked]]:
        """Of the whole answers, and of the streams."""
        return [answer.result(60) for answer in self._wholes], [answer.result(60) for answer in self._streams]


def in_the_middle_of_requests(asking: Asking, do: Callable[[], object], *, is_midway: bool) -> list[list[Asked]]:
    """What came of the whole answers and of the streams during which `do` was called."""
    if is_midway:
        asking.wait_until_midway()
    assert asking.has_text == is_midway
    do()
    done = time.monotonic()
    results = list(asking.results())
    for asked in chain.from_iterable(results):
        print(f"{asked.outcome} after {asked.took_s:.1f} s ({asked.ended - done:.1f} s after the fault)")
    return results


def expected(pipeline: Pipeline) -> str:
    """The text of every answer of NUM_TOKENS, after a short one, with which the processor has met its engines."""
    assert chat(pipeline, max_tokens=1).status_code == 200
    return _text_of_made_up_tokens(pipeline)


@cache
def _text_of_made_up_tokens(pipeline: Pipeline) -> str:
    text = chat(pipeline, max_tokens=NUM_TOKENS).json()["choices"][0]["message"]["content"]
    assert len(text) > NUM_TOKENS
    return str(text)


def wait_for_log(process: Process, words: str = "serving inference/") -> None:
    wait_until(lambda: words in process.log, STARTED_S, f"{words!r} in the log of {process.name}")


def serves_within(pipeline: Pipeline, limit_s: float) -> None:
    """A new client's request is answered, within that many seconds from now."""
    started = time.monotonic()
    outcomes = []
    with httpx.Client(base_url=pipeline.url, timeout=limit_s) as client:
        while (asked := ask(client, {"max_tokens": 3})).outcome != "200":
            outcomes.append(asked.outcome)
            assert time.monotonic() - started < limit_s, outcomes
            time.sleep(0.05)
    print(f"serves again after {time.monotonic() - started:.1f} s")


def assert_broken_off(asked: Asked, text: str, outcome: str) -> None:
    """It had begun rightly."""
    assert asked.outcome == f"in the stream: {outcome}"
    assert asked.text
    assert text.startswith(asked.text)


# An engine


@both_moments
def test_one_of_two_engines_killed_costs_a_request_only_time(scripts: Pipeline, is_midway: bool) -> None:
    engines = [scripts.fake_engine(*PACE) for _ in range(2)]
    scripts.wait_ready(engines=2)
    text = expected(scripts)
    asking = Asking(scripts, engines, of_each=2)
    for asked in chain(*in_the_middle_of_requests(asking, engines[0].kill, is_midway=is_midway)):
        assert (asked.outcome, asked.text) == ("200", text)
        assert asked.took_s < 2 * UNDISTURBED_S + 2


def test_answers_with_a_grammar_go_on_elsewhere_too(scripts: Pipeline) -> None:
    """That the other engine's grammar goes on as well is for test_json_answers."""
    engines = [scripts.fake_engine(*PACE, "--can-constrain") for _ in range(2)]
    scripts.wait_ready(engines=2)
    text = expected(scripts)
    asking = Asking(scripts, engines, of_each=2, response_format={"type": "json_object"})
    for asked in chain(*in_the_middle_of_requests(asking, engines[0].kill, is_midway=True)):
        assert (asked.outcome, asked.text) == ("200", text)


@both_moments
def test_the_only_engine_killed_and_started_again_costs_a_request_only_time(scripts: Pipeline, is_midway: bool) -> None:
    engine = scripts.fake_engine(*PACE)
    scripts.wait_ready()
    text = expected(scripts)

    def restart() -> None:
        engine.kill()
        engine.start()

    for asked in chain(*in_the_middle_of_requests(Asking(scripts, [engine]), restart, is_midway=is_midway)):
        assert (asked.outcome, asked.text) == ("200", text)
        assert asked.took_s < UNDISTURBED_S + WAIT_S + 1


def test_the_only_engine_killed_for_good_is_a_503_when_patience_ends(scripts: Pipeline) -> None:
    engine = scripts.fake_engine(*PACE)
    wait_for_log(scripts.processor("--served-model-name", "hasty", "--engine-wait", str(HASTY_S)))
    scripts.wait_ready(processors=2)
    text = expected(scripts)
    asking = Asking(scripts, [engine], model="hasty")
    (whole,), (stream,) = in_the_middle_of_requests(asking, engine.kill, is_midway=True)
    assert whole.outcome == "503 unavailable"
    assert_broken_off(stream, text, "unavailable")
    assert all(HASTY_S - 1 < asked.took_s < UNDISTURBED_S + HASTY_S + 1 for asked in (whole, stream))
    engine.start()
    serves_within(scripts, STARTED_S)


# A processor


@both_moments
def test_one_of_two_processors_killed(scripts: Pipeline, is_midway: bool) -> None:
    """What is lost in it begins anew, unless the client has seen text of it."""
    engine = scripts.fake_engine(*PACE)
    second = scripts.processor(env=SHORT_LEASE)
    wait_for_log(second)
    scripts.wait_ready(processors=2)
    text = expected(scripts)
    asking = Asking(scripts, [engine], of_each=2)
    wholes, streams = in_the_middle_of_requests(asking, second.kill, is_midway=is_midway)
    for asked in [*wholes, *streams]:
        assert asked.took_s < 2 * UNDISTURBED_S + 2
    if is_midway:
        (broken,) = (asked for asked in streams if asked.outcome != "200")
        assert_broken_off(broken, text, "bad_upstream")
        streams.remove(broken)
    for asked in [*wholes, *streams]:
        assert (asked.outcome, asked.text) == ("200", text)
    wait_until(lambda: engine.log.count("stopped True") == 2, 20, "the engine to stop what nobody reads any more")


@both_moments
def test_the_only_processor_killed_and_started_again(scripts: Pipeline, is_midway: bool) -> None:
    processor = scripts.processes[1]
    engine = scripts.fake_engine(*PACE)
    scripts.wait_ready()
    text = expected(scripts)

    def restart() -> None:
        processor.kill()
        processor.start()

    (whole,), (stream,) = in_the_middle_of_requests(Asking(scripts, [engine]), restart, is_midway=is_midway)
    if is_midway:
        assert_broken_off(stream, text, "bad_upstream")
    for asked in [whole] if is_midway else [whole, stream]:
        assert (asked.outcome, asked.text) == ("200", text)
        assert asked.took_s < UNDISTURBED_S + STARTED_S


def test_the_only_processor_killed_for_good_is_a_503_when_patience_ends(scripts: Pipeline, tmp_path: Path) -> None:
    engine = scripts.fake_engine(*PACE)
    processor = scripts.processes[1]
    with frontend_beside(scripts, tmp_path, "--processor-wait", "4") as impatient:
        for (asked,) in in_the_middle_of_requests(Asking(impatient, [engine]), processor.kill, is_midway=False):
            assert asked.outcome == "503 unavailable"
            assert 3 < asked.took_s < UNDISTURBED_S + 4 + 1
        refused = chat(impatient)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        processor.start()
        serves_within(impatient, STARTED_S)


# A frontend


def test_the_only_frontend_killed_breaks_its_connections_and_stops_their_work(scripts: Pipeline) -> None:
    engine = scripts.fake_engine(*PACE)
    scripts.wait_ready()
    frontend = scripts.processes[0]
    asking = Asking(scripts, [engine])
    asking.wait_until_midway()
    frontend.kill()
    killed = time.monotonic()
    frontend.start()
    wait_until(lambda: engine.log.count("stopped True") == 2, 20, "the engine to stop what nobody reads any more")
    for (asked,) in asking.results():
        assert asked.outcome in ("RemoteProtocolError", "ReadError")
        assert asked.ended - killed < 1
    serves_within(scripts, STARTED_S)


def test_one_of_two_frontends_killed_breaks_only_its_own_connections(scripts: Pipeline, two_of_port: Pipeline) -> None:
    scripts.fake_engine("--token-interval-ms", "5")
    two_of_port.wait_ready()
    with Load(two_of_port, num_clients=8) as load:
        two_of_port.processes[1].kill()
        killed = time.monotonic()
        load.wait_for(100)
    print(f"normal {load.disturbed_s(killed):.1f} s after the kill")
    assert load.outcomes.total() - load.outcomes["200"] <= 8  # one for each client that was connected to it
    assert set(load.outcomes) <= {"200", "RemoteProtocolError", "ReadError", "WriteError", "ConnectError"}
    assert load.disturbed_s(killed) < 2


# SIGTERM under load


def restart_under_load(pipeline: Pipeline, process: Process) -> list[Load]:
    """SIGTERM, the end with 0, and a new start, while clients ask for whole answers and for streams."""
    with Load(pipeline, max_tokens=40) as wholes, Load(pipeline, max_tokens=40, stream=True) as streams:
        asked = time.monotonic()
        assert process.terminate() == 0
        print(f"ended {time.monotonic() - asked:.1f} s after SIGTERM")
        process.start()
        for load in (wholes, streams):
            load.wait_for(40)
    for load in (wholes, streams):
        print(f"normal {load.disturbed_s(asked):.1f} s after SIGTERM")
        assert load.disturbed_s(asked) < STARTED_S
    return [wholes, streams]


@pytest.mark.parametrize("which", ["engine", "processor"])
def test_sigterm_of_the_only_one_under_load_fails_no_request(scripts: Pipeline, which: str) -> None:
    engine = scripts.fake_engine("--token-interval-ms", "5")
    scripts.wait_ready()
    for load in restart_under_load(scripts, engine if which == "engine" else scripts.processes[1]):
        assert set(load.outcomes) == {"200"}


@pytest.mark.parametrize("which", ["engine", "processor"])
def test_sigterm_of_one_of_two_under_load_is_not_noticed(scripts: Pipeline, which: str) -> None:
    engine = scripts.fake_engine("--token-interval-ms", "5")
    second = scripts.fake_engine("--token-interval-ms", "5") if which == "engine" else scripts.processor()
    for process in (engine, second):
        wait_for_log(process)
    scripts.wait_ready()
    with Load(scripts, max_tokens=40) as wholes, Load(scripts, max_tokens=40, stream=True) as streams:
        asked = time.monotonic()
        assert second.terminate() == 0
        for load in (wholes, streams):
            load.wait_for(60)
    for load in (wholes, streams):
        print(f"normal {load.disturbed_s(asked):.1f} s after SIGTERM")
        assert set(load.outcomes) == {"200"}
        assert load.slowest_s < 3


def test_sigterm_of_the_only_frontend_finishes_what_is_in_work(scripts: Pipeline) -> None:
    frontend = scripts.processes[0]
    engine = scripts.fake_engine(*PACE)
    scripts.wait_ready()
    text = expected(scripts)
    try:
        asking = Asking(scripts, [engine])
        for (asked,) in in_the_middle_of_requests(asking, frontend.running.terminate, is_midway=True):
            assert (asked.outcome, asked.text) == ("200", text)
        assert frontend.running.wait(20) == 0
    finally:
        frontend.start()
    scripts.wait_ready()


def test_sigterm_of_the_only_frontend_under_load_refuses_connections_until_it_is_back(scripts: Pipeline) -> None:
    scripts.fake_engine("--token-interval-ms", "5")
    scripts.wait_ready()
    for load in restart_under_load(scripts, scripts.processes[0]):
        # No answer is broken off: at most a connection that was just being closed as the next request came.
        assert set(load.outcomes) <= {"200", "ConnectError", "RemoteProtocolError", "ReadError"}
        assert load.outcomes.total() - load.outcomes["200"] - load.outcomes["ConnectError"] <= 4
        assert not [asked for asked in load.asked if asked.text and asked.outcome != "200"]


def test_sigterm_of_one_of_two_frontends_under_load(scripts: Pipeline, two_of_port: Pipeline) -> None:
    """Clients keep their connections; one that is just being closed may get a request that nobody reads."""
    scripts.fake_engine("--token-interval-ms", "5")
    two_of_port.wait_ready()
    with (
        Load(two_of_port, num_clients=4) as wholes,
        Load(two_of_port, num_clients=4, stream=True) as streams,
    ):
        asked = time.monotonic()
        assert two_of_port.processes[1].terminate() == 0
        for load in (wholes, streams):
            load.wait_for(50)
    for load in (wholes, streams):
        print(f"normal {load.disturbed_s(asked):.1f} s after SIGTERM")
        assert set(load.outcomes) <= {"200", "ConnectError", "RemoteProtocolError", "ReadError"}
        assert load.outcomes.total() - load.outcomes["200"] <= 2
        assert not [asked for asked in load.asked if asked.text and asked.outcome != "200"]
        assert load.slowest_s < 3


# Everything


def test_all_three_killed_at_once_and_started_again_serve_again(scripts: Pipeline) -> None:
    scripts.fake_engine("--token-interval-ms", "5")
    scripts.wait_ready()
    with ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(open_request(scripts, max_tokens=2000))
        for process in scripts.processes:
            process.kill()
        for process in scripts.processes:
            process.start()
        serves_within(scripts, STARTED_S)
