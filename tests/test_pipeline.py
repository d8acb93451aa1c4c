"""The chapter's pipeline with nothing replaced: real NATS, etcd, scripts, SGLang and model."""

import json
import re
import time

import httpx
import pytest

from tests.processes import Pipeline

pytestmark = pytest.mark.pipeline

QUESTION = [{"role": "user", "content": "Name the capital of France."}]


def ask(client: httpx.Client, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 25, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_the_model_answers_a_question(client: httpx.Client, embedded_model: str) -> None:
    answer = ask(client, embedded_model).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["object"] == "chat.completion"
    assert answer["model"] == embedded_model
    assert abs(answer["created"] - time.time()) < 60
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    # "<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n" with the template's system message in front.
    assert usage["prompt_tokens"] == 36
    # "The capital of France is Paris." and the end-of-sequence token, which SGLang counts.
    assert usage["completion_tokens"] == 8


def test_one_token_is_delivered_when_one_is_asked_for(client: httpx.Client, embedded_model: str) -> None:
    answer = ask(client, embedded_model, max_tokens=1).json()
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "The", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"]["completion_tokens"] == 1


def test_every_answer_has_an_id_of_its_own(client: httpx.Client, embedded_model: str) -> None:
    ids = {ask(client, embedded_model, max_tokens=1).json()["id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch(r"chatcmpl-[0-9a-f]{32}", id) for id in ids)


def test_etcd_shows_the_two_services_of_the_chapter(pipeline: Pipeline) -> None:
    lines = pipeline.infra.etcdctl("get", "--prefix", "v1/instances").splitlines()
    entries = dict(zip(lines[::2], map(json.loads, lines[1::2]), strict=True))
    assert {re.sub(r"/[0-9a-f]+$", "", key) for key in entries} == {
        "v1/instances/inference/engine/generate",
        "v1/instances/inference/processor/process",
    }
    for key, entry in entries.items():
        _, _, namespace, component, endpoint, lease = key.split("/")
        assert (entry["namespace"], entry["component"], entry["endpoint"]) == (namespace, component, endpoint)
        assert entry["transport"] == {"nats_tcp": f"{namespace}_{component}.{endpoint}-{lease}"}
        assert entry["instance_id"] == int(lease, 16)


def test_sigterm_takes_the_key_out_of_etcd_and_ends_with_0(
    pipeline: Pipeline, client: httpx.Client, embedded_model: str
) -> None:
    processor = pipeline.processes[1]
    num_keys = len(pipeline.infra.instance_keys())
    assert processor.terminate() == 0
    assert len(pipeline.infra.instance_keys()) == num_keys - 1
    processor.start()
    pipeline.wait_ready()
    assert ask(client, embedded_model, max_tokens=1).status_code == 200
