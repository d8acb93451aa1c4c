"""More of each is started, and nothing else: engines and processors share the requests, frontends take ports."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.frontends import frontend_beside
from tests.load import chat, streamed_text
from tests.processes import Pipeline, Process, new_pipeline, wait_until

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """One frontend, two processors, two engines."""
    with new_pipeline(tmp_path_factory.mktemp("scaling")) as pipeline:
        pipeline.frontend()
        for _ in range(2):
            pipeline.processor()
            pipeline.fake_engine("--token-interval-ms", "2")
        pipeline.wait_ready(processors=2, engines=2)
        yield pipeline


def num_answered(processes: list[Process]) -> list[int]:
    """Requests that each of them has finished, by its log."""
    return [process.log.count("prompt tokens") + process.log.count("stopped False") for process in processes]


def shares(processes: list[Process], pipeline: Pipeline, num_requests: int) -> list[int]:
    """How many of so many requests, eight at a time, half of them streamed, each process got."""
    before = num_answered(processes)
    with ThreadPoolExecutor(8) as threads:
        wholes = [threads.submit(chat, pipeline) for _ in range(num_requests // 2)]
        streams = [threads.submit(streamed_text, pipeline, None, 60) for _ in range(num_requests // 2)]
        assert {whole.result(60).status_code for whole in wholes} == {200}
        assert all(stream.result(60) for stream in streams)
    wait_until(lambda: sum(num_answered(processes)) - sum(before) == num_requests, 10, "all to be logged")
    return [after - earlier for after, earlier in zip(num_answered(processes), before, strict=True)]


def is_even(shares: list[int]) -> bool:
    return max(shares) - min(shares) <= 2


def processes_of(pipeline: Pipeline, name: str) -> list[Process]:
    return [process for process in pipeline.processes if process.name.endswith(name)]


def test_two_engines_and_two_processors_share_the_requests_evenly(scripts: Pipeline) -> None:
    """Each processor takes the engines in turn, on its own: it may begin with the same one as the other."""
    by_processor = shares(processes_of(scripts, "processor.py"), scripts, 80)
    by_engine = shares(processes_of(scripts, "fake_engine.py"), scripts, 80)
    print(f"{by_processor} by processor, {by_engine} by engine")
    assert is_even(by_processor)
    assert is_even(by_engine)


def test_a_third_processor_gets_its_share_as_soon_as_it_is_there(scripts: Pipeline) -> None:
    third = scripts.processor()
    scripts.wait_ready(processors=3, engines=2)
    wait_until(lambda: chat(scripts).status_code == 200 and num_answered([third]) != [0], 20, "its first request")
    assert is_even(shares(processes_of(scripts, "processor.py"), scripts, 60))
    assert third.terminate() == 0
    scripts.processes.remove(third)


def test_a_second_frontend_on_another_port_finds_the_same_processors(scripts: Pipeline, tmp_path: Path) -> None:
    with frontend_beside(scripts, tmp_path) as beside:
        assert beside.url != scripts.url
        ready = httpx.get(f"{beside.url}/ready").json()
        assert (ready["processors"], ready["engines"]) == (2, 2)
        assert is_even(shares(processes_of(scripts, "processor.py"), beside, 40))
        assert chat(scripts).status_code == 200
