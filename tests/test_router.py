"""The router beside the three others: real processes, and fake engines that have caches and tell of them."""

import asyncio
import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx
import pytest

from common.routing.ask_router import ASKING_TIMEOUT_S
from launch.questions import show_choices_of_the_router, show_turns_of_engines
from launch.settings import Settings
from tests.processes import MODEL, SHORT_LEASE, Pipeline, Process, free_port, new_pipeline, wait_until

pytestmark = [pytest.mark.process, pytest.mark.timed]

NUM_ENGINES = 4
_numbers = itertools.count()  # no prompt twice


class Routed:
    """A frontend, a processor, a router and engines with caches."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.metrics_port = free_port()
        self.engines = [self.engine() for _ in range(NUM_ENGINES)]
        self.router = self.start_router()
        self.processor = pipeline.processor()
        pipeline.frontend()
        pipeline.wait_ready(engines=NUM_ENGINES)
        self.wait_until_routed()

    def engine(self) -> Process:
        args = ("--kv-events", "--first-token-ms", "200", "--token-interval-ms", "20")
        return self.pipeline.fake_engine(*args, env=SHORT_LEASE)

    def replace_killed_engine(self) -> None:
        """Until the killed one is forgotten too: while it is still listed, nothing tells whose turn is next."""
        engine = self.engine()
        self.engines.append(engine)
        wait_until(lambda: "serving inference/engine" in engine.log, 30, "the new engine")
        ready_url = f"{self.pipeline.url}/ready"
        wait_until(lambda: httpx.get(ready_url).json()["engines"] == NUM_ENGINES, 30, "the killed one to be forgotten")

    def start_router(self) -> Process:
        return self.pipeline.router(env={"DYN_SYSTEM_PORT": str(self.metrics_port)})

    def wait_until_routed(self) -> float:
        """Until the router has been asked once more."""
        before = self.num_decisions()

        def is_asked() -> bool:
            asyncio.run(self.ask_all(["Hello"]))
            return self.num_decisions() > before

        return wait_until(is_asked, 10, "a question for the router")

    def metric(self, name: str) -> dict[str, float]:
        """By its labels.

        Raises:
            HTTPError: the router is away.
        """
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=2).text
        pattern = rf"^dynamo_chat_{name}{{(.*)}} (\S+)$"
        return {labels: float(value) for labels, value in re.findall(pattern, text, re.MULTILINE)}

    def num_decisions(self) -> float:
        """0 while the router is away."""
        with contextlib.suppress(httpx.HTTPError):
            return sum(self.metric("routing_decisions_total").values())
        return 0

    def num_booked(self) -> float:
        (num_booked,) = self.metric("requests_in_flight").values()
        return num_booked

    def num_chosen(self) -> dict[str, float]:
        """By worker, so far."""
        return {
            re.findall('worker="(.*)"', labels)[0]: value
            for labels, value in self.metric("routing_decisions_total").items()
        }

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(base_url=self.pipeline.url, timeout=60, limits=limits) as client:
            yield client

    async def ask_all(self, prompts: list[str], max_tokens: int = 1) -> None:
        """All at once.

        Raises:
            HTTPStatusError: one failed.
        """
        async with self.client() as client:
            for answer in await asyncio.gather(*(post(client, prompt, max_tokens) for prompt in prompts)):
                answer.raise_for_status()

    def shares(self, prompts: list[str], max_tokens: int = 1) -> list[int]:
        """How many of the prompts, asked all at once, each engine got."""
        before = [engine.log.count("cached") for engine in self.engines]
        asyncio.run(self.ask_all(prompts, max_tokens))
        return [engine.log.count("cached") - num for engine, num in zip(self.engines, before, strict=True)]


async def post(client: httpx.AsyncClient, prompt: str, max_tokens: int, **options: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, **options}
    return await client.post("/v1/chat/completions", json=body)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Routed]:
    with new_pipeline(tmp_path_factory.mktemp("routed")) as pipeline:
        yield Routed(pipeline)


def prompts(num: int, name: str) -> list[str]:
    """Different ones from their beginning on, of a few hundred tokens."""
    return [f"{at} {name} tell me about " + f"thing {at} " * 60 for at in range(num)]


def test_a_cold_burst_reaches_four_idle_engines_evenly(routed: Routed) -> None:
    shares = routed.shares(prompts(256, "cold"))
    assert all(0.20 * 256 <= num <= 0.30 * 256 for num in shares), shares


def test_prompts_go_back_to_where_they_are_cached(routed: Routed) -> None:
    asked = prompts(16, "again")
    asyncio.run(routed.ask_all(asked))
    before = sum(len(re.findall(r"cached (?!0 |16 )\d+", engine.log)) for engine in routed.engines)
    asyncio.run(routed.ask_all(asked))
    after = sum(len(re.findall(r"cached (?!0 |16 )\d+", engine.log)) for engine in routed.engines)
    assert after - before >= 15  # one may find that too much waits where it is cached


def test_one_hot_prefix_spreads_over_all_engines(routed: Routed) -> None:
    prefix = "hot " + "one thing after another " * 100
    shares = routed.shares([f"{prefix} {at}" for at in range(160)], max_tokens=100)
    assert max(shares) <= 1.5 * sum(shares) / len(shares), shares


async def ask_until_booked(
    routed: Routed, client: httpx.AsyncClient, num: int, max_tokens: int, **options: Any
) -> list[asyncio.Task[httpx.Response]]:
    """So many at once, all of them seen to be booked: those that a busy router leaves to others do not count."""
    for _ in range(5):
        asking = [asyncio.create_task(post(client, "Hello", max_tokens, **options)) for _ in range(num)]
        with contextlib.suppress(TimeoutError):
            await asyncio.to_thread(wait_until, lambda: routed.num_booked() == num, 3, "bookings")
            return asking
        for task in asking:
            task.cancel()
        await asyncio.to_thread(wait_until, lambda: routed.num_booked() == 0, 10, "no bookings")
    raise TimeoutError(f"{num} requests were never booked at once")


async def booked_answer(routed: Routed, max_tokens: int, **options: Any) -> dict[str, Any]:
    """What comes of a request that was seen to be booked."""
    async with routed.client() as client:
        (asking,) = await ask_until_booked(routed, client, 1, max_tokens, **options)
        choice: dict[str, Any] = (await asking).raise_for_status().json()["choices"][0]
        return choice


class TestABookingEnds:
    """For each way in which an attempt can."""

    def test_when_it_is_answered(self, routed: Routed) -> None:
        assert asyncio.run(booked_answer(routed, 40))["finish_reason"] == "length"
        wait_until(lambda: routed.num_booked() == 0, 10, "no bookings")
        assert " ERROR " not in routed.router.log

    def test_when_the_client_goes_away(self, routed: Routed) -> None:
        async def leave() -> None:
            async with routed.client() as client:
                (asking,) = await ask_until_booked(routed, client, 1, 1000)
                asking.cancel()

        asyncio.run(leave())
        wait_until(lambda: routed.num_booked() == 0, 10, "no bookings")

    def test_when_a_stop_string_is_found(self, routed: Routed) -> None:
        async def ask() -> None:
            said = (await booked_answer(routed, 40))["message"]["content"]
            assert (await booked_answer(routed, 1000, stop=[said]))["finish_reason"] == "stop"

        asyncio.run(ask())
        wait_until(lambda: routed.num_booked() == 0, 10, "no bookings")

    def test_when_the_processor_is_killed(self, routed: Routed) -> None:
        async def kill() -> None:
            async with routed.client() as client:
                asking = await ask_until_booked(routed, client, 8, 1000)
                routed.processor.kill()
                await asyncio.to_thread(wait_until, lambda: routed.num_booked() == 0, 10, "no bookings")
                for task in asking:
                    task.cancel()

        asyncio.run(kill())
        routed.processor = routed.pipeline.processor()
        routed.wait_until_routed()

    def test_when_the_engine_is_killed(self, routed: Routed) -> None:
        async def kill() -> None:
            async with routed.client() as client:
                asking = await ask_until_booked(routed, client, 8, 100)
                routed.engines.pop().kill()
                assert [(await each).status_code for each in asking] == [200] * 8

        asyncio.run(kill())
        wait_until(lambda: routed.num_booked() == 0, 10, "no bookings")
        routed.replace_killed_engine()


@dataclass(frozen=True)
class Answered:
    waited_s: float
    status: int


async def under_load(routed: Routed, duration_s: float, *, num_clients: int = 16) -> list[Answered]:
    """What comes of what clients ask, one question after the other."""
    ends_at = time.monotonic() + duration_s
    answers: list[Answered] = []

    async def ask(client: httpx.AsyncClient) -> None:
        while (asked_at := time.monotonic()) < ends_at:
            answer = await post(client, f"{next(_numbers)} Hello " * 10, 1)
            answers.append(Answered(time.monotonic() - asked_at, answer.status_code))

    async with routed.client() as client:
        await asyncio.gather(*(ask(client) for _ in range(num_clients)))
    return answers


def all_are_answered(answers: list[Answered], num_at_least: int) -> bool:
    return len(answers) > num_at_least and {each.status for each in answers} == {200}


def test_make_run_shows_a_conversation_without_and_with_a_router(
    routed: Routed, capsys: pytest.CaptureFixture[str]
) -> None:
    routed.router.kill()
    environ = {"HTTP_PORT": str(routed.pipeline.http_port), "MODEL": MODEL, "ENGINES": str(NUM_ENGINES)}
    settings = Settings.from_environ(environ)
    show_turns_of_engines(settings)
    routed.router = routed.start_router()
    routed.wait_until_routed()
    show_choices_of_the_router(settings)
    shown = capsys.readouterr().out
    assert re.search(r"^run: engines take turns +(\d+\.\d\d *){3}", shown, re.MULTILINE)
    by_turns, routed_ones = [int(num) for num in re.findall(r"(\d+) of \d+ tokens cached$", shown, re.MULTILINE)]
    assert routed_ones > by_turns + 1000
    assert re.search(r"^run: a router chooses +(\d+\.\d\d *){3}", shown, re.MULTILINE)


def test_a_router_that_is_killed_every_three_seconds_costs_no_request(routed: Routed) -> None:
    async def harm() -> list[Answered]:
        load = asyncio.create_task(under_load(routed, 9.5))
        for _ in range(3):
            await asyncio.sleep(2)
            routed.router.kill()
            await asyncio.sleep(1)
            routed.router = routed.start_router()
        return await load

    assert all_are_answered(asyncio.run(harm()), 40)
    wait_until(lambda: "serving inference/router" in routed.router.log, 30, "the router to be back")
    assert routed.wait_until_routed() < 3  # 0.5 s of rest, and a request; more on a busy machine


def test_a_router_that_hangs_costs_no_request(routed: Routed) -> None:
    async def harm() -> tuple[list[Answered], list[Answered]]:
        before = await under_load(routed, 1)
        load = asyncio.create_task(under_load(routed, 2))
        await asyncio.sleep(0.1)
        os.kill(routed.router.pid, signal.SIGSTOP)
        return before, await load

    try:
        before, after = asyncio.run(harm())
    finally:
        os.kill(routed.router.pid, signal.SIGCONT)
    assert all_are_answered(before + after, 20)
    usual_s, hanging_s = (median(each.waited_s for each in answers) for answers in (before, after))
    assert hanging_s < usual_s + 2 * ASKING_TIMEOUT_S
    assert max(each.waited_s for each in after) < max(each.waited_s for each in before) + 5
    assert routed.wait_until_routed() < 3
    wait_until(lambda: routed.num_booked() == 0, 10, "no bookings of those that waited in vain")


def test_an_engine_that_was_killed_is_not_chosen_again(routed: Routed) -> None:
    others = set(routed.pipeline.infra.instance_keys("engine/generate"))
    engine = routed.engine()
    wait_until(lambda: set(routed.pipeline.infra.instance_keys("engine/generate")) > others, 20, "one more engine")
    (key,) = set(routed.pipeline.infra.instance_keys("engine/generate")) - others
    worker_id = key.rsplit("/", 1)[1]

    async def harm() -> float:
        load = asyncio.create_task(under_load(routed, 6))
        await asyncio.to_thread(wait_until, lambda: routed.num_chosen().get(worker_id, 0) > 5, 5, "its turn")
        engine.kill()
        await asyncio.sleep(1)
        num_chosen = routed.num_chosen()[worker_id]
        assert all_are_answered(await load, 40)
        return num_chosen

    num_after_a_second = asyncio.run(harm())
    assert routed.num_chosen()[worker_id] == num_after_a_second
