"""README, CONTRIBUTING and docs/: their commands run and print what the pages show; what they name exists.

In the pages, a block of `sh` or `python` is a command. A block of `text` or `json` right behind it is what it prints.
"""

import ast
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from common.wire import read_engine_chunk, read_engine_request, read_processor_chunk
from tests.call_endpoint import call_endpoint
from tests.processes import BIN, MODEL, ROOT, SHORT_LEASE, Infra, Pipeline, Process, free_port, wait_until

README, EXPERIMENTS = ROOT / "README.md", ROOT / "docs" / "experiments.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

# Commands that no test here runs as they are written, each with the reason.
NOT_RUN = {
    "make test": "this is it",
    "make test-quick": "a part of this",
    "make infra": "an endless one: tests/test_launch.py runs the module behind it",
    "make status\nkill -9": "would find other engines of this machine: test_pipeline.py and test_launch.py kill theirs",
    "make restart-processor": "needs `make run`: tests/test_launch.py restarts a program in the same way",
    "python engine.py": "compared with the command of the running pipeline",
    "python processor.py": "compared with the command of the running pipeline",
    "python frontend.py": "compared with the command of the running pipeline",
    "source .venv/bin/activate": "the tests' own environment",
    "sed -i": "applied to a copy of the file",
    "python echo_engine.py": "run from a temporary folder",
    "etcdctl watch": "endless: run beside the kill",
    "kill -9": "would find other processors of this machine: the test kills its own",
}


class Block(NamedTuple):
    """A fenced block, and what follows it directly as its output, if anything does."""

    language: str
    text: str
    output: str | None

    @property
    def command(self) -> str:
        """Without comments."""
        return "\n".join(line for line in self.text.splitlines() if not line.startswith("# "))


def blocks(page: Path) -> list[Block]:
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        output = None
        if following and following[1] in ("text", "json"):
            between = page.read_text()[fence.end() : following.start()].strip()
            if not between or (between.endswith(":") and "\n\n" not in between):
                output = following[2]
        found.append(Block(fence[1], fence[2].rstrip("\n"), output))
    return found


def block(page: Path, start: str, language: str = "sh", nth: int = 0) -> Block:
    return [b for b in blocks(page) if b.language == language and b.command.startswith(start)][nth]


def section(page: Path, title: str) -> str:
    return page.read_text().split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


MASKS = (
    (r"chatcmpl-[0-9a-f]{32}", "chatcmpl-ID"),
    (r'"created": ?\d+', '"created":TIME'),
    (r'"instance_id":\d+', '"instance_id":N'),
    (r"(?<=[-/])[0-9a-f]{10,16}\b", "LEASE"),
    (r"\s+[\d.]+ s\b", " N s"),
    (r"pid \d+", "pid N"),
    (r"(localhost|127\.0\.0\.1):\d+", "HOST"),
    (r" --endpoints \S+", ""),
    (r"logs in \S+", "logs in FOLDER"),
)
SAMPLED = ((r'"content": ".+"', "CONTENT"), (r'"(completion|total)_tokens": \d+', "N"), (r'"(stop|length)"', "END"))


def masked(text: str, *, is_sampled: bool = False) -> str:
    """Without ids, times and ports; with `is_sampled`, also without the model's words and how many they were."""
    for pattern, replacement in MASKS + (SAMPLED if is_sampled else ()):
        text = re.sub(pattern, replacement, text)
    return text


def assert_shows(shown: str, real: str, *, is_sampled: bool = False) -> None:
    """Every line of a page's output is in the real one, in that order; "..." stands for any number of lines."""
    lines = iter(masked(real, is_sampled=is_sampled).splitlines())
    for line in masked(shown, is_sampled=is_sampled).splitlines():
        assert line == "..." or line in lines, f"{line!r} is not in, or not in this order:\n{real}"


def sh(command: str, pipeline: Pipeline, *, timeout_s: float = 120, **environ: str) -> str:
    """Run as a reader would, in an activated environment, with the pipeline's ports for the usual ones."""
    command = command.replace("localhost:8080", f"localhost:{pipeline.http_port}")
    command = command.replace("127.0.0.1:8222", environ.get("MONITORING", "127.0.0.1:8222"))
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{command}"], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
        env={**os.environ, **pipeline.env, **in_environment(pipeline.infra), **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def entries_of(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logprobs of all tokens of all choices."""
    return [entry for choice in choices for entry in choice["logprobs"]["content"]]


def in_environment(infra: Infra) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "ETCDCTL_ENDPOINTS": f"127.0.0.1:{infra.etcd_port}", "NO_PROXY": "localhost,127.0.0.1"}


class TestPages:
    def test_every_command_is_run_by_a_test_or_listed_with_a_reason(self) -> None:
        source = Path(__file__).read_text().split("class TestPages", 1)[1]
        starts = set(re.findall(r'block\(\w+, "([^"]+)"', source)) | set(NOT_RUN)
        commands = {b.command for page in (README, EXPERIMENTS) for b in blocks(page) if b.language in ("sh", "python")}
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
        missing = [
            page.name for page in PAGES if page != README and f"{page.relative_to(ROOT)})" not in README.read_text()
        ]
        assert not missing

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_make_targets_exist(self, page: Path) -> None:
        makefile = (ROOT / "Makefile").read_text()
        targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
        code = re.findall(r"`([^`\n]+)`", page.read_text()) + [b.command for b in blocks(page) if b.language == "sh"]
        named = {target for text in code for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", text)}
        components = {f"restart-{name}" for name in ("nats", "etcd", "engine", "processor", "frontend")}
        assert named <= targets | components

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_files_exist(self, page: Path) -> None:
        named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|yaml|txt))`", page.read_text())) - {
            "echo_engine.py"
        }
        assert not [name for name in named if not (ROOT / name).exists()]

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
        json.loads(text)
        for text in re.findall(r"```json\n(.+?)```", section(README, "What crosses the wire"), re.DOTALL)
    ]


def test_the_wire_examples_are_what_wire_py_reads() -> None:
    _, engine_request, engine_chunk, processor_chunk, error = wire_examples()
    read_engine_request(engine_request)
    read_engine_chunk(engine_chunk)
    read_processor_chunk(processor_chunk)
    with pytest.raises(Exception, match=re.escape(error["error"]["message"])):
        read_engine_chunk(error)


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
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=body, timeout=60)


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
        engine = bench.serve(code)
        asking = block(EXPERIMENTS, "curl -s http://localhost:8080/v1/chat/completions", nth=1)
        assert asking.output is not None
        assert sh(asking.command, bench.pipeline).strip() == asking.output.strip()
        bench.retire(engine)

    def test_etcd_forgets_who_is_killed_and_learns_who_comes(self, bench: Bench, tmp_path: Path) -> None:
        shown = block(EXPERIMENTS, "kill -9").output
        assert shown is not None
        watched = tmp_path / "watched"
        command = ["bash", "-c", f"exec {block(EXPERIMENTS, 'etcdctl watch').command}"]
        wait_until(lambda: len(bench.infra.instance_keys()) == 1, 30, "the processor alone")
        with watched.open("w") as file:
            watch = subprocess.Popen(command, stdout=file, env={**os.environ, **in_environment(bench.infra)})
        try:
            time.sleep(1)  # the watch says nothing when it begins
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
        in_etcd = sh(block(README, "etcdctl get --prefix v1/instances").command, bench.pipeline)
        assert all(f'"nats_tcp":{subject}' in in_etcd for subject in subjects.split())
        bench.retire(engine)

    def test_a_long_answer_is_not_on_nats(self, bench: Bench) -> None:
        def num_messages() -> int:
            text = sh(
                block(EXPERIMENTS, "curl -s 127.0.0.1:8222/varz").command, bench.pipeline, MONITORING=bench.monitoring
            )
            return sum(map(int, re.findall(r"\d+", text)))

        engine = bench.pipeline.fake_engine()
        bench.pipeline.wait_ready()
        before = num_messages()
        answer = ask(bench.pipeline, MODEL, max_tokens=500, stream=True)
        assert answer.text.count("data: ") > 400
        assert num_messages() - before < 50
        bench.retire(engine)

    def test_without_an_engine_the_answer_is_the_503_of_the_page(self, bench: Bench) -> None:
        shown = re.findall(r'^\{"error":.*No instance.*\}$', README.read_text(), re.MULTILINE)
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
        commands = {process.name: process.command for process in pipeline.processes}
        for script in ("engine.py", "processor.py", "frontend.py"):
            is_frontend = script == "frontend.py"
            address = ["--host", pipeline.address, "--port", str(pipeline.http_port)] if is_frontend else []
            typed = block(README, f"python {script}").command.split()
            assert [*typed[1:], *address] == list(commands[script][1:])

    def test_curl_gets_the_answer_of_the_page(self, pipeline: Pipeline) -> None:
        asking = block(README, "curl -X POST")
        assert asking.output is not None
        assert masked(sh(asking.command, pipeline)).strip() == masked(asking.output).strip()

    def test_etcd_says_what_the_page_says(self, pipeline: Pipeline) -> None:
        looking = block(README, "etcdctl get --prefix v1/instances")
        assert looking.output is not None
        assert masked(sh(looking.command, pipeline)).strip() == masked(looking.output).strip()

    def test_openais_client_streams(self, pipeline: Pipeline) -> None:
        program = block(README, "from openai import OpenAI", "python")
        assert program.output is not None
        assert sh(f"python -c '{program.text}'", pipeline) == program.output

    def test_the_engine_sends_the_wire_examples_tokens_and_no_rounding_changes_them(self, pipeline: Pipeline) -> None:
        """It is the answer that several tests expect: each token leads by more than CPUs and batches differ."""
        _, engine_request, engine_chunk, _, _ = wire_examples()
        with_logprobs = engine_request | {"output_options": {"stream": False, "logprobs": 2}}
        (plain,), (chunk,) = call_endpoint(pipeline, "engine", "generate", [engine_request, with_logprobs])
        assert plain == engine_chunk
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

    def test_make_run_prints_what_the_page_shows(self, embedded_model: str, tmp_path: Path) -> None:
        running = block(README, "make run")
        assert running.output is not None
        ports = {f"{name}_PORT": str(free_port()) for name in ("NATS", "NATS_MONITORING", "ETCD", "HTTP")}
        environ = os.environ | ports | {"RUN_ONCE": "1", "DATA_DIR": str(tmp_path)}
        done = subprocess.run(
            running.command.split(), cwd=ROOT, capture_output=True, text=True, timeout=280, env=environ
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert_shows(running.output, done.stdout, is_sampled=True)
