"""What the chapter shows and teaches, on the release it was written for and on ours: the same three scripts."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.processes import DYNAMO, MODEL, ROOT, Infra, Pipeline, new_pipeline, running, wait_until

SERVICES = [("engine", "generate"), ("processor", "process")]
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}

# The chapter's lines, in the order in which a reader meets them. "..." stands for the rest of a line.
LINES = {
    "frontend.py": [
        "response_stream = await self.processor_client.generate(...",
        "async for chunk in response_stream:",
        "data = chunk.data()",
        "@dynamo_worker(static=False)",
        "async def worker(runtime: DistributedRuntime, ...",
        '...runtime.namespace("inference")',
        '...component("processor").endpoint("process").client()',
        "configure_dynamo_logging()",
    ],
    "processor.py": [
        "async def process(...",
        "yield ...",
        "response_stream = await self.engine_client.generate(...",
        "async for chunk in response_stream:",
        "data = chunk.data()",
        "@dynamo_worker(static=False)",
        "async def worker(runtime: DistributedRuntime, ...",
        '...runtime.namespace("inference").component("engine").endpoint("generate").client()',
        'component = runtime.namespace("inference").component("processor")',
        "await component.create_service()",
        'await component.endpoint("process").serve_endpoint(...',
        "configure_dynamo_logging()",
    ],
    "engine.py": [
        "async def generate(self, request...",
        "num_output_tokens_so_far = 0",
        "yield ...",
        "@dynamo_worker(static=False)",
        "async def worker(runtime: DistributedRuntime, ...",
        'component = runtime.namespace("inference").component("engine")',
        "await component.create_service()",
        'await component.endpoint("generate").serve_endpoint(...',
        "configure_dynamo_logging()",
    ],
}


def is_like(line: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("..."))), line) is not None


@pytest.mark.parametrize("script", LINES)
def test_a_reader_finds_the_lines_of_the_chapter_in_order(script: str) -> None:
    lines = iter((ROOT / script).read_text().splitlines())
    for pattern in LINES[script]:
        assert any(is_like(line.strip(), pattern) for line in lines), pattern


def test_the_frontend_serves_nothing() -> None:
    source = (ROOT / "frontend.py").read_text()
    assert "create_service" not in source
    assert "serve_endpoint" not in source


@pytest.mark.parametrize("script", LINES)
def test_a_script_knows_nothing_of_releases(script: str) -> None:
    source = (ROOT / script).read_text()
    assert not re.search(r"version|hasattr|from dynamo|import dynamo", source)


@pytest.fixture(scope="module")
def chapter(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The three scripts; of the engine, all but the lines that call SGLang."""
    with new_pipeline(tmp_path_factory.mktemp("chapter")) as pipeline:
        pipeline.script("tests/engine_without_sglang.py")
        pipeline.processor()
        pipeline.frontend()
        pipeline.wait_ready()
        yield pipeline


def entry_of_the_chapter(component: str, endpoint: str, lease: str) -> str:
    return (
        f"instances/inference/{component}/{endpoint}:{lease}\n"
        "{\n"
        f'  "component": "{component}",\n'
        f'  "endpoint": "{endpoint}",\n'
        '  "namespace": "inference",\n'
        f'  "instance_id": {int(lease, 16)},\n'
        '  "transport": {\n'
        f'    "nats_tcp": "inference_{component}.{endpoint}-{lease}"\n'
        "  }\n"
        "}\n"
    )


@pytest.mark.process
@pytest.mark.skipif(not DYNAMO.startswith("0.5."), reason="other releases write these entries otherwise")
def test_etcd_prints_the_two_entries_of_the_chapter(chapter: Pipeline) -> None:
    printed = chapter.infra.etcdctl("get", "--prefix", "instances")
    leases = re.findall(r"^instances/\S+:([0-9a-f]+)$", printed, re.MULTILINE)
    assert printed == "".join(
        entry_of_the_chapter(*service, lease) for service, lease in zip(SERVICES, leases, strict=True)
    )


@pytest.mark.process
@pytest.mark.skipif(DYNAMO.startswith("0.5."), reason="this release writes the entries of the chapter")
def test_etcd_prints_the_same_two_services_on_one_line_each(chapter: Pipeline) -> None:
    assert chapter.infra.etcdctl("get", "--prefix", "instances") == ""
    lines = chapter.infra.etcdctl("get", "--prefix", "v1/instances").splitlines()
    for (component, endpoint), key, text in zip(SERVICES, lines[::2], lines[1::2], strict=True):
        lease = key.rpartition("/")[2]
        assert key == f"v1/instances/inference/{component}/{endpoint}/{lease}"
        assert (
            json.loads(text).items()
            >= {
                "type": "Endpoint",
                "component": component,
                "endpoint": endpoint,
                "namespace": "inference",
                "instance_id": int(lease, 16),
                "transport": {"nats_tcp": f"inference_{component}.{endpoint}-{lease}"},
            }.items()
        )


def ask(pipeline: Pipeline, **fields: object) -> dict[str, Any]:
    answer = httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


@pytest.mark.process
def test_each_new_token_arrives_once(chapter: Pipeline, tokenizer: Tokenizer) -> None:
    answer = ask(chapter, max_tokens=5)
    expected = tokenizer.decode([1000, 1001, 1002, 1003, 1004])
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


@pytest.mark.process
def test_dynamo_logs_nothing_of_its_own_about_a_request(chapter: Pipeline) -> None:
    num_before = [len(process.log) for process in chapter.processes]
    ask(chapter)
    frontend = chapter.processes[2]
    wait_until(lambda: "POST" in frontend.log[num_before[2] :], 5, "the frontend's own line")
    logged = "".join(process.log[num:] for process, num in zip(chapter.processes, num_before, strict=True))
    assert [line for line in logged.splitlines() if "dynamo_runtime" in line or "request_span" in line] == []


@pytest.mark.process
def test_a_client_that_leaves_stops_the_engine(chapter: Pipeline) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{chapter.url}/v1/chat/completions", json=CHAT | {"max_tokens": 3000}, timeout=1)
    wait_until(lambda: "of 3000" in chapter.processes[0].log, 2, "the engine to stop")
    assert "ended after 3000" not in chapter.processes[0].log


@pytest.mark.process
@pytest.mark.parametrize("number", [0, 1, 2], ids=["engine", "processor", "frontend"])
def test_each_component_can_be_killed_and_restarted_alone(chapter: Pipeline, number: int) -> None:
    others = {process.pid for process in chapter.processes if process is not chapter.processes[number]}
    chapter.processes[number].kill()
    chapter.processes[number].start()
    chapter.wait_ready()
    assert ask(chapter)["usage"]["completion_tokens"] == 5
    assert others <= {process.pid for process in chapter.processes}
    assert all(process.is_alive for process in chapter.processes)


@pytest.mark.process
def test_the_log_variable_that_the_chapter_names_works(own_infra: Infra, tmp_path: Path) -> None:
    pipeline = Pipeline(own_infra, tmp_path / "scripts")
    with running(pipeline):
        at_debug = pipeline.script("tests/fake_engine.py", env={"DYN_LOG": "", "DYN_LOG_LEVEL": "debug"})
        as_usual = pipeline.script("tests/fake_engine.py", env={"DYN_LOG": ""})
        wait_until(lambda: all("serving inference/engine" in engine.log for engine in pipeline.processes), 30, "both")
        assert " DEBUG dynamo_runtime" in at_debug.log
        assert " DEBUG " not in as_usual.log


@pytest.mark.process
def test_a_router_works_or_says_which_release_it_needs() -> None:
    done = subprocess.run([sys.executable, "router.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if DYNAMO.startswith("0."):
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("router.py and --kv-events need ai-dynamo-runtime 1.0 or later")
    else:
        assert (done.returncode, done.stderr) == (0, "")
