"""What OpenAI's own clients, for Python and for Node, make of our answers and errors. The engine is a fake."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.frontends import frontend_beside
from tests.processes import MODEL, ROOT, Pipeline
from tests.programs import ARE_REQUIRED

pytestmark = pytest.mark.process

ASKED: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}
NPM_PACKAGE = "openai@7.57.0"


def client_of(pipeline: Pipeline, api_key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{pipeline.url}/v1", api_key=api_key, max_retries=0, timeout=30)


@pytest.fixture
def client(fake_pipeline: Pipeline) -> Iterator[OpenAI]:
    with client_of(fake_pipeline) as client:
        yield client


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "expected", "param", "code"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature", None),
        ({"n": 100}, openai.BadRequestError, "n", None),
        ({"response_format": {"type": "json"}}, openai.BadRequestError, "response_format", None),
        ({"max_tokens": 9000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
    ],
)
def test_a_wrong_request_is_the_right_error_class(
    client: OpenAI,
    fields: dict[str, Any],
    expected: type[openai.APIStatusError],
    param: str,
    code: str | None,
    is_stream: bool,
) -> None:
    with pytest.raises(expected) as caught:
        client.chat.completions.create(**(ASKED | fields), stream=is_stream)
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert error.request_id is not None


def test_a_large_body_cannot_heal_and_is_not_retried(fake_pipeline: Pipeline) -> None:
    with client_of(fake_pipeline).with_options(max_retries=2) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**(ASKED | {"user": "x" * 1_000_000}))
    assert caught.value.status_code == 413
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_wrong_key_is_an_authentication_error(fake_pipeline: Pipeline, tmp_path: Path) -> None:
    with frontend_beside(fake_pipeline, tmp_path, "--api-key", "right") as keyed:
        with client_of(keyed, "right") as client:
            assert client.chat.completions.create(**ASKED).choices
        with client_of(keyed, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(**ASKED)
        assert caught.value.code == "invalid_api_key"


def test_overload_is_a_rate_limit_error_that_heals(fake_pipeline: Pipeline, tmp_path: Path) -> None:
    with (
        frontend_beside(fake_pipeline, tmp_path, "--max-concurrency", "1") as beside,
        client_of(beside) as client,
        client.chat.completions.create(**(ASKED | {"max_tokens": 8000}), stream=True) as stream,
    ):
        next(stream)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**ASKED)
        stream.close()
        assert client.with_options(max_retries=5).chat.completions.create(**ASKED).choices


def test_an_error_in_a_stream_is_raised_by_the_client(fake_pipeline: Pipeline, tmp_path: Path) -> None:
    with (
        frontend_beside(fake_pipeline, tmp_path, "--request-timeout", "0.3") as beside,
        client_of(beside) as client,
        pytest.raises(openai.APIError, match="longer than") as caught,
    ):
        for _ in client.chat.completions.create(**(ASKED | {"max_tokens": 8000, "n": 16}), stream=True):
            pass
    assert caught.value.code == "deadline_exceeded"


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `openai` npm package."""
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), NPM_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    if done.returncode:
        (pytest.fail if ARE_REQUIRED else pytest.skip)(f"npm cannot install {NPM_PACKAGE}: {done.stderr[-300:]}")
    shutil.copy(ROOT / "tests" / "openai_client.mjs", folder)
    return folder


@pytest.mark.needs("node", "npm")
def test_the_client_for_node(fake_pipeline: Pipeline, node_folder: Path) -> None:
    command = ["node", "openai_client.mjs", f"{fake_pipeline.url}/v1", MODEL]
    done = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    content = said["whole"]["choices"][0]["message"]["content"]
    assert content
    assert "".join(said["deltas"]) == said["helped"] == content
    assert said["usage"] == said["whole"]["usage"]
    assert said["usage"]["completion_tokens"] == 12
    assert said["error"]["name"] == "BadRequestError"
    assert (said["error"]["status"], said["error"]["param"]) == (400, "temperature")
    assert said["error"]["id"].startswith("req-")
    assert said["models"] == [MODEL]
