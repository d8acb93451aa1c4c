"""What docs/dynamo-releases.md says of Dynamo's releases, asked of the one that is installed."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.load import chat
from tests.processes import DYNAMO, ROOT, Pipeline, wait_until

pytestmark = [pytest.mark.process, pytest.mark.timed]


IS_0_5, IS_1 = DYNAMO.startswith("0.5."), DYNAMO.startswith("1.")


def ask(question: str, **variables: str) -> tuple[dict[str, Any], str]:
    """Dynamo's answer, and what it logged."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ask_dynamo", question],
        cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer, done.stderr + done.stdout


def test_the_words_of_the_chapter() -> None:
    assert ask("vocabulary")[0] == {
        "dynamo_worker(static=False)": not IS_1,
        "namespace()": not IS_1,
        "endpoint()": IS_1,
    }


def test_serving_and_what_it_writes() -> None:
    announcing = {"without create_service()": "Service not found", "create_service() writes": ""}
    assert ask("registration")[0] == ({} if IS_1 else announcing) | {
        "key": ("" if IS_0_5 else "v1/") + "instances/inference/engine/generate" + (":" if IS_0_5 else "/"),
        "transport": ["tcp" if IS_1 else "nats_tcp"],
    }


def test_the_log_variable_of_dynamo_itself() -> None:
    assert " DEBUG " not in ask("registration", DYN_LOG_LEVEL="debug", DYN_SDK_DISABLE_ANSI_LOGGING="1")[1]
    assert " DEBUG " in ask("registration", DYN_LOG="debug", DYN_SDK_DISABLE_ANSI_LOGGING="1")[1]


def test_an_empty_etcd_ends_a_runtime() -> None:
    assert ask("etcd_away")[0] == {
        "ends at once": IS_0_5,
        "another runtime": "Worker already initialized" if IS_0_5 else "opens",
        "CAN_REOPEN": not IS_0_5,
    }


def test_failed_and_stopped_calls() -> None:
    assert ask("calls")[0] == {
        "a stop of an open stream arrives": True,
        "raise": ["raised"],
        "raise another": ["raised"],
        "what cannot be sent": [] if IS_0_5 else ["raised"],
        "nobody": ["unanswered"],
        "too large": ["too large"] if IS_1 else ["too large", "unanswered"],
        "too large is known at once": IS_1,
    }


def test_a_stream_whose_worker_is_killed_is_broken_and_not_unanswered() -> None:
    assert ask("killed")[0] == {"midway": ["is_broken"], "afterwards": ["is_unanswered"]}


def test_a_reader_that_stands_still_holds_up_no_other_stream() -> None:
    """A stream pauses for 0.04 to 0.06 s on an idle machine, and a busy one makes longer pauses of its own."""

    def are_held_up() -> bool:
        found = ask("stalled")[0]
        print(found)
        assert found["num_items"] > 100
        return bool(found["stalled_s"] > 0.2 + 2 * found["usual_s"])

    assert not all(are_held_up() for _ in range(3))


def test_an_endpoint_is_opened_at_once_while_streams_are_read() -> None:
    assert ask("opened")[0]["longest_s"] < 1


def test_a_stopped_engine_finishes_its_answer_and_gets_no_new_request(own_scripts: Pipeline) -> None:
    engines = [own_scripts.fake_engine("--token-interval-ms", "50") for _ in range(2)]
    own_scripts.wait_ready(engines=2)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(chat, own_scripts, max_tokens=100)
        wait_until(lambda: any("running 1" in each.log for each in engines), 20, "a request in work")
        engine = next(each for each in engines if "running 1" in each.log)
        engine.running.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in engine.log, 20, "the stop")
        time.sleep(1)  # the answer takes five
        num_registered = sum("engine" in key for key in own_scripts.infra.instance_keys())
        assert engine.is_alive
        assert chat(own_scripts, max_tokens=1).status_code == 200
        assert not answer.done()
        assert engine.log.count("running 1") == 1
        assert answer.result().json()["usage"]["completion_tokens"] == 100
    assert num_registered == 1 + IS_0_5
    assert engine.running.wait(20) == 0
    assert sum("engine" in key for key in own_scripts.infra.instance_keys()) == 1


def test_an_engine_that_missed_a_request_is_asked_again(own_scripts: Pipeline) -> None:
    """0.5 would never again call an instance that once was not there, though it is back."""
    engine = own_scripts.fake_engine()
    own_scripts.wait_ready()
    assert chat(own_scripts).status_code == 200
    engine.running.send_signal(signal.SIGSTOP)
    try:
        own_scripts.infra.nats.kill()
        own_scripts.infra.nats.start()
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(chat, own_scripts)
            wait_until(lambda: "failed: " in own_scripts.processes[1].log, 20, "a call that nobody takes")
            engine.running.send_signal(signal.SIGCONT)
            assert answer.result().status_code == 200
    finally:
        engine.running.send_signal(signal.SIGCONT)


@pytest.mark.skipif(not IS_0_5, reason="tests/test_faults.py: other releases live through an outage")
def test_the_loss_of_etcd_ends_each_script_with_one_line(own_scripts: Pipeline) -> None:
    own_scripts.fake_engine()
    own_scripts.wait_ready()
    own_scripts.infra.etcd.kill()
    own_scripts.infra.etcd.start()
    for process in own_scripts.processes:
        assert process.running.wait(20) == 1
        assert process.log.splitlines()[-1].startswith("error: ")
        assert "start it again" in process.log.splitlines()[-1]
        process.start()
    own_scripts.wait_ready()
    assert chat(own_scripts).status_code == 200
