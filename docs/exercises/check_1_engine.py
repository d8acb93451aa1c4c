"""Exercise 1: backwards_engine.py, an engine of the reader's own."""

import pytest

from tests.call_endpoint import call_endpoint
from tests.processes import ROOT, Pipeline, Process, wait_until


@pytest.fixture(scope="module")
def engine(no_engine: Pipeline) -> Process:
    assert (ROOT / "backwards_engine.py").exists(), "there is no backwards_engine.py beside engine.py yet"
    engine = no_engine.script("backwards_engine.py")
    wait_until(lambda: not engine.is_alive or "engine/generate" in str(no_engine.infra.instance_keys()), 30, "its key")
    assert engine.is_alive, f"it ended:\n{engine.log[-2000:]}"
    return engine


def ask(pipeline: Pipeline, token_ids: list[int], max_tokens: int) -> list[dict[str, object]]:
    request = {"token_ids": token_ids, "sampling_options": {}, "stop_conditions": {"max_tokens": max_tokens}}
    return call_endpoint(pipeline, "engine", "generate", [request])[0]


@pytest.mark.parametrize(
    ("max_tokens", "token_ids", "finish_reason"),
    [(10, [4, 3, 2, 1], "stop"), (2, [4, 3], "length"), (1, [4], "length")],
)
def test_it_answers_with_the_prompt_backwards(
    engine: Process, no_engine: Pipeline, max_tokens: int, token_ids: list[int], finish_reason: str
) -> None:
    chunks = ask(no_engine, [1, 2, 3, 4], max_tokens)
    assert [each for chunk in chunks for each in chunk.get("token_ids", [])] == token_ids  # type: ignore[attr-defined]
    assert chunks[-1].get("finish_reason") == finish_reason
    assert not [chunk for chunk in chunks[:-1] if "finish_reason" in chunk], "only the last dict has a finish_reason"


def test_it_says_what_it_is(engine: Process, no_engine: Pipeline) -> None:
    ((description,),) = call_endpoint(no_engine, "engine", "generate", [{"describe": True}])
    assert {"model", "context_length", "vocab_size"} <= set(description), f"asked what it is, it said {description}"
    assert "Traceback" not in engine.log, "its terminal shows an error"
