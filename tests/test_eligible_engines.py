"""A processor calls the engines that its token ids were made for, within the context that they have."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.processes import MODEL, Pipeline, Process, new_pipeline, wait_until

pytestmark = pytest.mark.process

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}
OTHER = ("--tokenizer-sha256", "0" * 64)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    with new_pipeline(tmp_path_factory.mktemp("fit")) as pipeline:
        pipeline.frontend()
        pipeline.processor("--engine-wait", "1")
        yield pipeline


@pytest.fixture
def scripts(impatient: Pipeline) -> Iterator[Pipeline]:
    """A frontend and a processor that waits a second for an engine; engines are the test's to start."""
    try:
        yield impatient
    finally:
        impatient.stop_all_but(2)
        for key in impatient.infra.instance_keys("engine/generate"):
            impatient.infra.etcdctl("del", key)  # of a killed one; its lease would end in 10 s


def chat(pipeline: Pipeline, **fields: object) -> httpx.Response:
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT | fields, timeout=60)


def num_requests(engine: Process) -> int:
    return engine.log.count("stopped")


def start(pipeline: Pipeline, *args: str, engines: int = 1) -> Process:
    engine = pipeline.fake_engine(*args)
    pipeline.wait_ready(engines=engines)
    return engine


@pytest.mark.parametrize("misfit", [OTHER, ("--vocab-size", "151936")], ids=["hash", "vocabulary"])
def test_an_engine_with_another_tokenizer_is_left_out(scripts: Pipeline, misfit: tuple[str, str]) -> None:
    processor = scripts.processes[1]
    num_lines = processor.log.count("gets no requests")
    other, fitting = scripts.fake_engine(*misfit), scripts.fake_engine()
    scripts.wait_ready(engines=2)
    assert [chat(scripts).status_code for _ in range(10)] == [200] * 10
    assert num_requests(other) == 0
    assert num_requests(fitting) == 10
    lines = [line for line in processor.log.splitlines() if "gets no requests" in line][num_lines:]
    assert len(lines) == 1
    assert "it runs fake" in lines[0]
    assert f"the tokenizer of {MODEL}" in lines[0]
    assert "--model" in lines[0]


def test_with_no_fitting_engine_the_answer_says_so_and_the_next_one_that_fits_is_used(scripts: Pipeline) -> None:
    start(scripts, *OTHER)
    refused = chat(scripts)
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == (
        f"No instance of inference/engine/generate is available. Those that run have another tokenizer than {MODEL}, "
        "or have not said which."
    )
    start(scripts, engines=2)
    assert [chat(scripts).status_code for _ in range(4)] == [200] * 4


def test_an_engine_that_fits_and_died_is_missed_as_such(scripts: Pipeline) -> None:
    engine = start(scripts)
    assert chat(scripts).status_code == 200
    engine.kill()
    refused = chat(scripts)
    assert refused.status_code == 503
    assert refused.json()["error"]["message"].endswith(" is available. Is it running?")


def test_an_engine_that_knows_only_the_chapter_is_taken_as_it_is(scripts: Pipeline) -> None:
    start(scripts, "--plain", *OTHER)
    assert chat(scripts).status_code == 200


def test_the_smallest_context_of_the_engines_is_the_limit(scripts: Pipeline) -> None:
    start(scripts)
    assert chat(scripts, max_tokens=200).status_code == 200
    small = start(scripts, "--context-length", "100", engines=2)
    wait_until(lambda: chat(scripts, max_tokens=200).status_code == 400, 20, "the smaller engine to count")
    error = chat(scripts, max_tokens=200).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 100 tokens" in error["message"]
    error = chat(scripts, messages=[{"role": "user", "content": "word " * 200}]).json()["error"]
    assert error["code"] == "context_length_exceeded"
    unlimited = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    answer = httpx.post(f"{scripts.url}/v1/chat/completions", json=unlimited, timeout=60)
    assert answer.json()["usage"]["total_tokens"] == 100
    assert small.terminate() == 0
    wait_until(lambda: chat(scripts, max_tokens=200).status_code == 200, 15, "the smaller engine to be forgotten")


def test_the_context_of_an_engine_that_does_not_fit_does_not_count(scripts: Pipeline) -> None:
    scripts.fake_engine("--context-length", "100", *OTHER)
    start(scripts, engines=2)
    assert [chat(scripts, max_tokens=200).status_code for _ in range(4)] == [200] * 4


def test_requests_with_a_grammar_go_to_the_engines_that_have_grammars(scripts: Pipeline) -> None:
    """One that knows only the chapter has none."""
    start(scripts)
    plain = start(scripts, "--plain", engines=2)
    refused = chat(scripts, response_format={"type": "json_object"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format"
    assert refused.json()["error"]["message"].endswith("no engine of this model has grammars.")
    able = start(scripts, "--can-constrain", engines=3)
    assert [chat(scripts, response_format={"type": "json_object"}).status_code for _ in range(6)] == [200] * 6
    assert num_requests(able) == 6
    assert [chat(scripts).status_code for _ in range(6)] == [200] * 6
    assert num_requests(plain) > 0


def test_the_real_engine_script_describes_the_model_it_was_given(scripts: Pipeline, tmp_path: Path) -> None:
    """engine.py with SGLang's own arguments, and with tokens made up in SGLang's place."""
    scripts.script(
        "-m", "bench.fake_sglang", "engine.py", "--model-path", MODEL, "--context-length", "1024", "--device", "cpu"
    )
    scripts.wait_ready()
    assert chat(scripts).status_code == 200
    error = chat(scripts, max_tokens=2000).json()["error"]
    assert "maximum context length is 1024 tokens" in error["message"]
    assert f"runs {MODEL}, 1024 tokens of context" in scripts.processes[1].log
