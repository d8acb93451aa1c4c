"""An engine that has left etcd: is it finishing its work, or will it never say anything again?"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.load import chat, streamed_text
from tests.processes import SHORT_LEASE, Pipeline, Process, new_pipeline, wait_until

pytestmark = [pytest.mark.process, pytest.mark.timed]

ENGINE_WAIT_S = 2
SILENT_S = 8  # longer than one without a lease may be


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    with new_pipeline(tmp_path_factory.mktemp("silent"), env=SHORT_LEASE) as pipeline:
        pipeline.frontend()
        pipeline.processor("--engine-wait", str(ENGINE_WAIT_S))
        yield pipeline


@pytest.fixture
def scripts(shared: Pipeline) -> Iterator[Pipeline]:
    """Two engines that say nothing of a whole answer until it is there."""
    for _ in range(2):
        shared.fake_engine("--token-interval-ms", "50", "--whole")
    shared.wait_ready(engines=2)
    yield shared
    shared.stop_all_but(2)
    wait_until(lambda: not shared.infra.instance_keys("engine/generate"), 30, "the end of all engines")


def busy_and_idle(pipeline: Pipeline) -> list[Process]:
    """Both engines, the one first that has more to do."""
    engines = pipeline.processes[2:]
    wait_until(lambda: sum("running" in engine.log.splitlines()[-1] for engine in engines) >= 1, 20, "requests")
    return sorted(engines, key=lambda engine: engine.log.count(": running"), reverse=True)


def test_an_engine_that_drains_is_left_to_finish_a_silent_answer(scripts: Pipeline) -> None:
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(chat, scripts, max_tokens=int(SILENT_S / 0.05))
        draining, other = busy_and_idle(scripts)
        assert draining.terminate() == 0
        assert answer.result(30).status_code == 200
    assert "request req-" not in other.log


def test_the_calls_of_an_engine_that_hangs_go_on_elsewhere(scripts: Pipeline) -> None:
    """Its kernel still answers for it, so only its lease in etcd, and then its silence, tell."""
    fields = {"max_tokens": 60}
    expected = chat(scripts, **fields).json()["choices"][0]["message"]["content"]
    has_begun = threading.Event()
    with ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(streamed_text, scripts, has_begun, 60, **fields) for _ in range(2)]
        wholes = [threads.submit(chat, scripts, **fields) for _ in range(2)]
        assert has_begun.wait(20)
        hanging = scripts.processes[2]
        wait_until(lambda: "running 2" in hanging.log, 20, "two requests")
        os.killpg(hanging.pid, signal.SIGSTOP)
        started = time.monotonic()
        try:
            given_up_s = wait_until(lambda: "its lease has ended" in scripts.processes[1].log, 20, "the calls' end")
            assert [stream.result(90) for stream in streams] == [expected] * 2
            assert [whole.result(90).json()["choices"][0]["message"]["content"] for whole in wholes] == [expected] * 2
            took_s = time.monotonic() - started
        finally:
            os.killpg(hanging.pid, signal.SIGCONT)
    print(f"given up {given_up_s:.1f} s after it hung, all complete after {took_s:.1f} s")


def test_an_answer_that_took_longer_than_one_waits_for_an_engine_still_goes_on_elsewhere(scripts: Pipeline) -> None:
    """Whole answers say nothing until their end: all that while they were being made, and nobody was waited for."""
    engines = scripts.processes[2:]
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(chat, scripts, max_tokens=80) for _ in range(4)]
        wait_until(lambda: all("running 2" in engine.log for engine in engines), 20, "two requests on each")
        time.sleep(ENGINE_WAIT_S + 1)  # an answer takes four
        engines[0].kill()
        assert [answer.result(60).status_code for answer in answers] == [200] * 4
