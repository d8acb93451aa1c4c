"""docs/chapter-1: the chapter taken literally works, and breaks as its page says, by the commands of the page."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest

from bench.__main__ import CPU_ENGINE_ARGS
from tests.pages import CHAPTER_1 as PAGE
from tests.pages import Launch, assert_shows, block, blocks, masked
from tests.processes import MODEL, SHORT_LEASE, Process, wait_until

CURL = "curl -s http://localhost:8080/v1/chat/completions"

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def chapter(make_chapter_1: Launch) -> Launch:
    return make_chapter_1


def test_it_starts_and_answers(chapter: Launch) -> None:
    shown = block(PAGE, "make chapter-1").output
    assert shown is not None
    assert_shows(shown, chapter.output.read_text(), is_sampled=True)


def test_one_token_is_none(chapter: Launch) -> None:
    asking = block(PAGE, CURL)
    assert asking.output is not None
    assert masked(chapter.other_terminal(asking.command)).strip() == masked(asking.output).strip()


def test_an_emoji_is_cut_in_two(chapter: Launch) -> None:
    """Each of its tokens leads by more than CPUs and batches differ (2.4 at least, in logarithms of probability)."""
    asking = block(PAGE, CURL, nth=1)
    assert chapter.other_terminal(asking.command) == asking.output


def test_a_mistake_is_a_500(chapter: Launch) -> None:
    asking = block(PAGE, "curl -s -w")
    assert chapter.other_terminal(asking.command) == asking.output


def test_an_engine_goes_on_for_a_client_that_has_left(chapter: Launch) -> None:
    leaving = block(PAGE, "curl -s -m 1")
    asking, _, looking = leaving.command.partition("sleep 15\n")
    assert chapter.other_terminal(asking) == "gone\n"
    num_before = len(chapter.other_terminal(looking.replace("-n 2", "-n +1")).splitlines())

    def batches_since() -> list[str]:
        return chapter.other_terminal(looking.replace("-n 2", f"-n +{num_before + 1}")).splitlines()

    wait_until(lambda: len(batches_since()) >= 2, 60, "two batches for nobody")
    shown = re.sub(r"\d+$", "N", leaving.output or "", flags=re.MULTILINE).splitlines()
    assert shown == ["gone", *(re.sub(r"\d+$", "N", line) for line in batches_since()[:2])]


def test_an_engine_that_dies_midway_costs_the_answer(chapter: Launch) -> None:
    asking = block(PAGE, "(sleep 2; kill -9 $(cat .data/run/engine.pid)) &")
    assert chapter.other_terminal(asking.command) == asking.output
    chapter.wait_for("supervisor: engine died (terminated by SIGKILL)", 30)
    assert "engine: started" in chapter.other_terminal(block(PAGE, "make restart-engine").command)


@pytest.fixture(scope="module")
def engine_step_1(chapter: Launch) -> Iterator[Process]:
    """The solution of step 1, on an engine without a model, which is back sooner. The real one waits meanwhile."""
    script = ["docs/chapter-1/engine_step_1.py", "--model-path", MODEL, *CPU_ENGINE_ARGS]
    command = [sys.executable, "-m", "bench.fake_sglang", *script]
    servers = {
        "NATS_SERVER": f"nats://127.0.0.1:{chapter.environ['NATS_PORT']}",
        "ETCD_ENDPOINTS": f"http://127.0.0.1:{chapter.environ['ETCD_PORT']}",
    }
    plain = {"DYN_REQUEST_PLANE": "nats", "DYN_TCP_RESPONSE_STREAM_HOST": "lo"} | SHORT_LEASE
    engine = Process("engine", command, chapter.folder / "engine_step_1.log", servers | plain)
    loading = int((chapter.folder / "run" / "engine.pid").read_text())
    os.kill(loading, signal.SIGSTOP)
    engine.start()
    try:
        yield engine
    finally:
        os.kill(loading, signal.SIGCONT)
        engine.stop()


def is_answered(chapter: Launch, engine: Process) -> bool:
    """With one token, where one is asked for."""
    assert engine.is_alive, engine.log
    answer = chapter.other_terminal(f"{block(PAGE, CURL).command} || true")  # the frontend may be starting
    return answer.startswith("{") and json.loads(answer)["usage"]["completion_tokens"] == 1


def test_the_solution_of_step_1_counts_the_last_token(chapter: Launch, engine_step_1: Process) -> None:
    wait_until(lambda: is_answered(chapter, engine_step_1), 120, "an answer of one token")


def test_workers_end_and_the_frontend_is_lost_when_etcd_hangs(chapter: Launch, engine_step_1: Process) -> None:
    hanging = block(PAGE, "kill -STOP $(cat .data/run/etcd.pid)")
    chapter.other_terminal(hanging.command.replace("sleep 15", "sleep 5"))
    said = [each.text for each in blocks(PAGE) if each.text.startswith("supervisor: processor stopped")]
    chapter.wait_for(said[0].splitlines()[0], 30)
    assert engine_step_1.running.wait(240) == 0
    engine_step_1.start()
    wait_until(lambda: "processor/process" in chapter.other_terminal("etcdctl get --prefix v1/instances"), 60, "both")
    assert chapter.other_terminal(block(PAGE, CURL).command) == "Internal Server Error"
    restarting = block(PAGE, "make restart-frontend")
    assert "frontend: started" in chapter.other_terminal(restarting.command)
    wait_until(lambda: is_answered(chapter, engine_step_1), 60, "an answer")
