"""README, CONTRIBUTING and docs/: their commands run and print what the pages show; what they name exists."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.__main__ import parse_args
from common.wire import EngineChunk, EngineRequest, ProcessorChunk
from tests.call_endpoint import call_endpoint
from tests.pages import (
    COMMANDS,
    PAGES,
    README,
    Launch,
    assert_shows,
    block,
    blocks,
    in_environment,
    masked,
    section,
    sh,
)
from tests.processes import MODEL, ROOT, SHORT_LEASE, Infra, Pipeline, Process, free_port, wait_until

DOCS = ROOT / "docs"
EXPERIMENTS, TROUBLESHOOTING, PERFORMANCE = (
    DOCS / "experiments.md",
    DOCS / "troubleshooting.md",
    DOCS / "performance.md",
)
CHAPTERS = sorted(DOCS.glob("chapter-*/README.md"))
OPENAI_API, OBSERVABILITY = DOCS / "openai-api.md", DOCS / "observability.md"

# Commands that no test runs as they are written, each with the reason.
NOT_RUN = {
    "make run ROUTER=1": "two real engines: tests/test_router.py has the conversation with fake ones",
    "python engine.py --model-path models/SmolLM2-135M-Instruct --kv-events": "test_router.py: with fake engines",
    "make run ENGINES=2": "two real engines: tests/test_launch.py builds their commands",
    "DYN_SYSTEM_PORT=9102 python router.py": "tests/test_routing.py puts the policy into a router",
    "curl -s 127.0.0.1:9102": "tests/test_router.py reads this metric",
    "make infra": "endless: tests/test_launch.py runs the module behind it; the scripts' lines are compared with ours",
    "MODEL=Qwen": "needs the hub, and a GPU to be of use: tests/test_launch.py passes MODEL on",
    "source .venv/bin/activate": "the tests' own environment",
    "sed -i": "applied to a copy of the file",
    "python echo_engine.py": "run from a temporary folder",
    "etcdctl watch": "endless: run beside the kill",
    "make bench": "minutes of load each: their arguments are parsed, and tests/test_bench.py runs one",
}


def entries_of(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logprobs of all tokens of all choices."""
    return [entry for choice in choices for entry in choice["logprobs"]["content"]]


class TestPages:
    def test_every_command_is_run_by_a_test_or_listed_with_a_reason(self) -> None:
        tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
        starts = set(re.findall(r'\bblock\(\w+, "([^"]+)"', tests)) | set(NOT_RUN)
        commands = {b.command for page in PAGES for b in blocks(page) if b.language in COMMANDS}
        commands -= {b.command for b in blocks(DOCS / "clients.md")}  # test_clients.py runs all of them
        unknown = {command for command in commands if not command.startswith(tuple(starts))}
        assert not unknown
        stale = {start for start in starts if not any(command.startswith(start) for command in commands)}
        assert not stale

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_links_lead_somewhere(self, page: Path) -> None:
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
        broken = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
        assert not broken

    def test_the_readme_leads_to_every_page(self) -> None:
        found, unread = {README}, [README]
        while unread:
            page = unread.pop()
            linked = {(page.parent / link).resolve() for link in re.findall(r"\]\(([\w./-]+\.md)", page.read_text())}
            unread += linked - found
            found |= linked
        assert set(PAGES) <= found

    def test_the_readme_is_a_page_and_the_way_to_this_code_a_short_one(self) -> None:
        def num_lines(*paths: Path) -> int:
            return sum(len(path.read_text().splitlines()) for path in paths)

        assert num_lines(README) <= 200
        scripts = [ROOT / f"{name}.py" for name in ("frontend", "processor", "engine")]
        assert num_lines(README, *scripts, *(DOCS / "chapter-1").glob("*.*")) < 1400

    def test_the_picture_shows_figures_of_the_table(self) -> None:
        picture, table = (DOCS / "performance.svg").read_text(), section(PERFORMANCE, "What you get")
        widths = [int(width) for width in re.findall(r'x="180" y="\d+" width="(\d+)"', picture)]
        figures = re.findall(r">([\d,]+)</text>", picture)
        assert widths == [int(figure.replace(",", "")) // 100 for figure in figures]
        assert len(figures) == 18
        assert all(figure in table for figure in figures)

    def test_the_bench_takes_the_arguments_of_the_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = [
            shlex.split(line, comments=True) for line in block(PERFORMANCE, "make bench", "bash").text.splitlines()
        ]
        commands = [words for words in lines if words[:3] == ["python", "-m", "bench"]]
        assert len(commands) == 6
        for command in commands:
            monkeypatch.setattr("sys.argv", command[2:])
            parse_args()

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_make_targets_exist(self, page: Path) -> None:
        makefile = (ROOT / "Makefile").read_text()
        targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
        code = re.findall(r"`([^`\n]+)`", page.read_text()) + [b.command for b in blocks(page) if b.language == "sh"]
        named = {target for text in code for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", text)}
        components = {f"restart-{name}" for name in ("nats", "etcd", "engine", "processor", "frontend")}
        exercises = {f"check-exercise-{path.name.split('_')[1]}" for path in ROOT.glob("docs/exercises/check_*.py")}
        assert named <= targets | components | exercises

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_files_exist(self, page: Path) -> None:
        named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|yaml|txt))`", page.read_text())) - {
            "echo_engine.py", "backwards_engine.py",  # the reader's to write
        }  # fmt: skip
        assert not [name for name in named if not (ROOT / name).exists()]

    @pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.parent.name)
    def test_excerpts_are_what_the_files_say(self, page: Path) -> None:
        excerpts = [b.text.splitlines() for b in blocks(page) if b.language == "diff"]
        assert excerpts
        for old, new, *lines in excerpts:
            assert len(lines) < 60
            for files, sign in ((old.removeprefix("--- "), "-"), (new.removeprefix("+++ "), "+")):
                code = "".join((ROOT / file).read_text() for file in files.split(", "))
                assert not [line for line in lines if line.startswith(sign) and f"{line[1:]}\n" not in code]

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_tests_exist(self, page: Path) -> None:
        sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert not {name for name in named if f"def {name}(" not in sources}

    def test_a_requests_life_names_functions_that_exist(self) -> None:
        rows = re.findall(
            r"^\| (\d) \|.*\| `([^`]+)` \| `([^`]+)` \|$", section(README, "A request's life"), re.MULTILINE
        )
        assert [int(step) for step, _, _ in rows] == list(range(1, 9))
        for _, file, function in rows:
            assert function in functions(ROOT / file), f"{file} has no {function}"

    def test_pre_commit_does_what_make_check_does(self) -> None:
        config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
        hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
        recipe = (ROOT / "Makefile").read_text().split("\ncheck:", 1)[1].split("\n\n", 1)[0]
        assert hooks == [
            line.strip("\t@").replace("$(VENV_PYTHON)", ".venv/bin/python") for line in recipe.splitlines()[1:]
        ]


def functions(file: Path) -> set[str]:
    """`function` and `Class.method`, all that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, kinds)}
        elif isinstance(node, kinds):
            found.add(node.name)
    return found


def wire_examples() -> list[dict[str, Any]]:
    """Frontend to processor, processor to engine, engine to processor, processor to frontend, an error."""
    return [
        json.loads(text) for text in re.findall(r"^\{.+\}$", section(README, "What crosses the wire"), re.MULTILINE)
    ]


def test_the_wire_examples_are_what_wire_py_reads() -> None:
    _, engine_request, engine_chunk, processor_chunk, error = wire_examples()
    EngineRequest.read(engine_request)
    EngineChunk.read(engine_chunk)
    ProcessorChunk.read(processor_chunk)
    with pytest.raises(Exception, match=re.escape(error["error"]["message"])):
        EngineChunk.read(error)


# An engine that writes down what it is asked, and answers with one dict.
SPY = """
import json, sys
import uvloop
from common.dynamo.runtime import dynamo_worker

async def generate(request, context):
    print("asked", json.dumps(request), flush=True)
    yield json.loads(sys.argv[1])

@dynamo_worker(static=False)
async def worker(runtime):
    await runtime.namespace("inference").component("engine").endpoint("generate").serve_endpoint(generate)

uvloop.run(worker())
"""


def ask(pipeline: Pipeline, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], **fields}
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=body, timeout=300)


class Bench:
    """A pipeline to be harmed, and NATS with its monitoring port. Engines are the test's to start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.monitoring = f"127.0.0.1:{free_port()}"
        self.infra = Infra(folder / "infra", nats_args=["-m", self.monitoring.split(":")[1]])
        self.pipeline = Pipeline(self.infra, folder / "scripts", env=SHORT_LEASE)
        self.infra.start()
        self.processor = self.pipeline.processor()
        self.frontend = self.pipeline.frontend()

    def serve(self, code: str, *args: str) -> Process:
        """Run an engine's code, alone: without one that a failed test has left."""
        for left in [each for each in self.pipeline.processes if each not in (self.processor, self.frontend)]:
            self.retire(left)
        file = self.folder / "echo_engine.py"
        file.write_text(code)
        engine = self.pipeline.script(str(file), *args)
        self.pipeline.wait_ready()
        return engine

    def retire(self, engine: Process) -> None:
        engine.terminate()
        self.pipeline.processes.remove(engine)

    def stop(self) -> None:
        self.pipeline.stop()
        self.infra.stop()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("docs"))
    try:
        yield bench
    finally:
        bench.stop()


def num_watches(infra: Infra) -> int:
    """Those that etcd has. One says nothing when it begins."""
    text = httpx.get(f"http://127.0.0.1:{infra.etcd_port}/metrics").text
    return int(text.split("\netcd_debugging_mvcc_watcher_total ")[1].splitlines()[0])


@pytest.mark.process
class TestWithoutTheModel:
    def test_the_wire_examples_are_what_the_processor_sends(self, bench: Bench) -> None:
        chat, engine_request, engine_chunk, processor_chunk, error = wire_examples()
        spy = bench.serve(SPY, json.dumps(engine_chunk))
        assert call_endpoint(bench.pipeline, "processor", "process", [chat, chat | {"model": "nope"}]) == [
            [processor_chunk],
            [error],
        ]
        asked = [json.loads(line.removeprefix("asked ")) for line in spy.log.splitlines() if line.startswith("asked ")]
        assert [request for request in asked if "describe" not in request] == [engine_request]
        bench.retire(spy)

    def test_an_engine_of_your_own_answers_with_the_prompt(self, bench: Bench) -> None:
        code = block(EXPERIMENTS, "import uvloop", "python").text
        assert len([line for line in code.splitlines() if line]) <= 14
        for check in (["check"], ["format", "--check"]):
            command = [sys.executable, "-m", "ruff", *check, "--stdin-filename", "echo_engine.py", "-"]
            subprocess.run(command, input=code + "\n", text=True, cwd=ROOT, check=True, capture_output=True)
        engine = bench.serve(code)
        asking = block(EXPERIMENTS, "curl -s http://localhost:8080/v1/chat/completions", nth=1)
        assert asking.output is not None
        assert sh(asking.command, bench.pipeline).strip() == asking.output.strip()
        assert block(EXPERIMENTS, "python echo_engine.py").output in engine.log
        bench.retire(engine)

    def test_etcd_forgets_who_is_killed_and_learns_who_comes(self, bench: Bench, tmp_path: Path) -> None:
        shown = block(EXPERIMENTS, "kill -9 $(cat .data/run/processor.pid)").output
        assert shown is not None
        watched = tmp_path / "watched"
        command = ["bash", "-c", f"exec {block(EXPERIMENTS, 'etcdctl watch').command}"]
        wait_until(lambda: len(bench.infra.instance_keys()) == 1, 30, "the processor alone")
        before = num_watches(bench.infra)
        with watched.open("w") as file:
            watch = subprocess.Popen(command, stdout=file, env={**os.environ, **in_environment(bench.infra)})
        try:
            wait_until(lambda: num_watches(bench.infra) > before, 30, "etcd to know of the watch")
            bench.processor.kill()
            bench.processor.start()
            wait_until(lambda: {"PUT", "DELETE"} <= set(watched.read_text().splitlines()), 30, "both events")
        finally:
            watch.terminate()
            watch.wait()
        assert sorted(filter(None, masked(watched.read_text()).splitlines())) == sorted(masked(shown).splitlines())

    def test_a_graceful_stop_takes_the_key_away_first(self, bench: Bench) -> None:
        wait_until(lambda: len(bench.infra.instance_keys()) == 1, 30, "the processor alone")
        assert bench.processor.terminate() == 0
        assert bench.infra.instance_keys() == []
        bench.processor.start()

    def test_nats_names_the_subjects_that_etcd_names(self, bench: Bench) -> None:
        engine = bench.pipeline.fake_engine()
        bench.pipeline.wait_ready()
        looking = block(EXPERIMENTS, "curl -s '127.0.0.1:8222/subsz")
        assert looking.output is not None
        subjects = sh(looking.command, bench.pipeline, MONITORING=bench.monitoring)
        assert masked(subjects) == masked(looking.output)
        in_etcd = sh(block(EXPERIMENTS, "etcdctl get --prefix v1/instances").command, bench.pipeline)
        assert all(f'"nats_tcp":{subject}' in in_etcd for subject in subjects.split())
        bench.retire(engine)

    def test_a_long_answer_is_not_on_nats(self, bench: Bench) -> None:
        def num_messages() -> int:
            text = sh(
                block(EXPERIMENTS, "curl -s 127.0.0.1:8222/varz").command, bench.pipeline, MONITORING=bench.monitoring
            )
            return sum(map(int, re.findall(r"\d+", text)))

        engine = bench.pipeline.fake_engine("--token-interval-ms", "2")  # faster ones may come several at once
        bench.pipeline.wait_ready()
        before = num_messages()
        answer = ask(bench.pipeline, MODEL, max_tokens=500, stream=True)
        assert answer.text.count("data: ") > 100
        assert num_messages() - before < 50
        bench.retire(engine)

    def test_a_processor_opens_a_port_for_its_metrics(self, bench: Bench) -> None:
        starting = block(OBSERVABILITY, "DYN_SYSTEM_PORT=9101 python processor.py").command.split()
        reading = block(OBSERVABILITY, "curl -s http://127.0.0.1:9101/metrics").command
        port = str(free_port())
        measured = bench.pipeline.script(*starting[2:], env={"DYN_SYSTEM_PORT": port})
        wait_until(lambda: len(bench.infra.instance_keys("processor")) == 2, 60, "the processor")
        assert "dynamo_chat_requests_total" in sh(reading.replace("9101", port), bench.pipeline)
        bench.retire(measured)

    def test_without_an_engine_the_answer_is_the_503_of_the_page(self, bench: Bench) -> None:
        shown = re.findall(r'^\{"error":.*No instance.*\}$', TROUBLESHOOTING.read_text(), re.MULTILINE)
        impatient = bench.pipeline.script(
            "processor.py", "--model", MODEL, "--served-model-name", "m", "--engine-wait", "0.2"
        )
        models = f"{bench.pipeline.url}/v1/models"
        wait_until(lambda: '"id":"m"' in httpx.get(models).text, 60, "the impatient processor")
        answer = ask(bench.pipeline, "m")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert [answer.text] == shown
        bench.retire(impatient)


@pytest.mark.pipeline
class TestWithTheModel:
    def test_the_three_commands_are_what_the_tests_start(self, pipeline: Pipeline) -> None:
        terminals = block(README, "make infra").command
        commands = {process.name: process.command for process in pipeline.processes}
        for script in ("engine.py", "processor.py", "frontend.py"):
            is_frontend = script == "frontend.py"
            address = ["--host", pipeline.address, "--port", str(pipeline.http_port)] if is_frontend else []
            (typed,) = (line for line in terminals.splitlines() if line.startswith(f"python {script}"))
            assert [*typed.split()[1:], *address] == list(commands[script][1:])

    def test_curl_gets_the_answer_of_the_page(self, pipeline: Pipeline) -> None:
        asking = block(README, "curl -X POST")
        assert asking.output is not None
        assert masked(sh(asking.command, pipeline)).strip() == masked(asking.output).strip()

    def test_etcd_says_what_the_page_says(self, pipeline: Pipeline) -> None:
        looking = block(EXPERIMENTS, "etcdctl get --prefix v1/instances")
        assert looking.output is not None
        assert masked(sh(looking.command, pipeline)).strip() == masked(looking.output).strip()

    def test_openais_client_streams(self, pipeline: Pipeline) -> None:
        program = block(OPENAI_API, "from openai import OpenAI", "python")
        assert program.output is not None
        assert sh(f"python -c '{program.text}'", pipeline) == program.output

    def test_the_engine_sends_the_wire_examples_tokens_and_no_rounding_changes_them(self, pipeline: Pipeline) -> None:
        """It is the answer that several tests expect: each token leads by more than CPUs and batches differ."""
        _, engine_request, engine_chunk, _, _ = wire_examples()
        with_logprobs = engine_request | {"output_options": {"stream": False, "logprobs": 2}}
        (plain,), (chunk,) = call_endpoint(pipeline, "engine", "generate", [engine_request, with_logprobs])
        assert plain | {"cached_tokens": engine_chunk["cached_tokens"]} == engine_chunk
        assert chunk["token_ids"] == engine_chunk["token_ids"]
        leads = [best[1] - second[1] for best, second in chunk["top_logprobs"]]
        assert min(leads) > 0.5, leads

    def test_a_changed_default_needs_a_restart_of_the_processor_alone(self, pipeline: Pipeline, tmp_path: Path) -> None:
        edit, _, _ = block(EXPERIMENTS, "sed -i").command.partition("\n")
        changed = tmp_path / "processor.py"
        changed.write_text((ROOT / "processor.py").read_text())
        subprocess.run(["bash", "-c", edit], cwd=tmp_path, check=True)
        assert changed.read_text().count('["temperature"] = 0.0') == 1
        asking = block(EXPERIMENTS, "curl -s http://localhost:8080/v1/chat/completions").command
        asking = asking.replace('"n": 3', '"n": 3, "logprobs": true, "top_logprobs": 1')
        frontend, processor, engine = pipeline.processes[:3]
        pids = frontend.pid, engine.pid
        assert processor.terminate() == 0
        other = pipeline.script(str(changed), "--model", MODEL)
        try:
            pipeline.wait_ready()
            choices = json.loads(sh(asking, pipeline))["choices"]
            assert len(choices) == 3
            # All the same, as far as rounding allows, which is not the same for each place in a batch.
            assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries_of(choices))
        finally:
            other.terminate()
            pipeline.processes.remove(other)
            processor.start()
            pipeline.wait_ready()
        assert (frontend.pid, engine.pid) == pids
        choices = json.loads(sh(asking, pipeline))["choices"]
        assert len({choice["message"]["content"] for choice in choices}) > 1
        assert any(entry["logprob"] < entry["top_logprobs"][0]["logprob"] for entry in entries_of(choices))


@pytest.fixture
def launch(make_run: Launch) -> Launch:
    return make_run


@pytest.mark.pipeline
class TestMakeRun:
    def test_it_prints_what_the_page_shows(self, launch: Launch) -> None:
        shown = block(README, "make run").output
        assert shown is not None
        assert_shows(shown, launch.output.read_text(), is_sampled=True)

    def test_a_killed_processor_comes_back(self, launch: Launch) -> None:
        launch.other_terminal(block(EXPERIMENTS, "kill -9 $(cat .data/run/processor.pid)").command)
        launch.wait_for("supervisor: processor started", 60)

    def test_a_restart_takes_one_command(self, launch: Launch) -> None:
        said = launch.other_terminal(block(README, "make restart-processor").command)
        assert said.splitlines()[-2:] == ["processor: stopped", "processor: started"]

    def test_a_killed_engine_comes_back_as_the_page_shows(self, launch: Launch) -> None:
        killing = block(README, "make status")
        shown = [each.text for each in blocks(README) if each.text.startswith("supervisor: engine died")]
        status = launch.other_terminal(killing.command)
        assert [line.split()[1] for line in status.splitlines()] == ["RUNNING"] * 5
        launch.wait_for("supervisor: engine started", 60)
        assert_shows(shown[0], launch.output.read_text())
