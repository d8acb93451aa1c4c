"""Fixtures: one NATS and etcd, one pipeline on a fake engine and one on the real model, for all tests."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests import programs
from tests.model_copies import make_hermes_model, make_thinking_model
from tests.pages import CHAPTER_1, README, Launch, block
from tests.processes import MODEL, ROOT, Infra, Pipeline, new_pipeline, running

_IS_BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
_num_skipped: Counter[str] = Counter()  # by the program that was missing


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the tests that need no process, while those engines start that the tests behind them need (`begun`).

    Where files run side by side, those with the real model come first.
    """
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    kinds = {marker.name for marker in item.iter_markers()}
    if kinds.isdisjoint({"process", "pipeline", "browser"}):
        return 3 if _IS_BESIDE_OTHERS else 0
    return 1 + ("last" in kinds) if "pipeline" in kinds else 3


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """File by file, and all files with the real model in one process. (xdist's own groups need an older pytest.)"""
    from xdist.scheduler import LoadScopeScheduling

    with_the_model = {path.name for path in (ROOT / "tests").glob("test_*.py") if "mark.pipeline" in path.read_text()}

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.split("::")[0]).name
            return "the real model" if name in with_the_model else name

    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if not programs.is_installed(program):
                if programs.ARE_REQUIRED:
                    pytest.fail(f"{program} is not installed", pytrace=False)
                item.user_properties.append(("missing", program))
                pytest.skip(f"{program} is not installed")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "setup":
        _num_skipped.update(str(program) for name, program in report.user_properties if name == "missing")


def pytest_unconfigure() -> None:
    """The last line of the run."""
    if _num_skipped:
        skipped = ", ".join(f"{count} that need {program}" for program, count in _num_skipped.items())
        print(f"Tests were skipped: {skipped}. To have them: apt-get install {programs.packages(_num_skipped)}")


@pytest.fixture(scope="session")
def embedded_model() -> str:
    """The folder of the embedded model, as clients name it."""
    if not (ROOT / MODEL / "model.safetensors").exists():
        pytest.fail(f"{MODEL} is missing: run `make model` first")
    return MODEL


@pytest.fixture(scope="session")
def tokenizer(embedded_model: str) -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / embedded_model / "tokenizer.json"))


@pytest.fixture(scope="session")
def infra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Infra]:
    with running(servers := Infra(tmp_path_factory.mktemp("infra"))):
        yield servers.start()


@pytest.fixture
def own_infra(tmp_path: Path) -> Iterator[Infra]:
    """Servers of one test's own, to be harmed."""
    with running(servers := Infra(tmp_path / "infra")):
        yield servers.start()


@pytest.fixture
def own_scripts(own_infra: Infra, tmp_path: Path, embedded_model: str) -> Iterator[Pipeline]:
    """A frontend and a processor of one test's own, to be harmed; engines are the test's to start."""
    pipeline = Pipeline(own_infra, tmp_path / "scripts")
    with running(pipeline):
        pipeline.frontend()
        pipeline.processor()
        yield pipeline


@pytest.fixture(scope="session")
def fake_pipeline(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The real frontend and processor, on an engine of made-up tokens."""
    with new_pipeline(tmp_path_factory.mktemp("fake-pipeline")) as pipeline:
        pipeline.fake_engine("--can-constrain")
        pipeline.processor()
        pipeline.frontend()
        pipeline.wait_ready()
        yield pipeline


@pytest.fixture
def fake_client(fake_pipeline: Pipeline) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_pipeline.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The real frontend, and a processor for each kind of chat template, on an engine that echoes what a user says.

    "hermes" calls tools, "closed" and "open" think: the prompt of "open" begins its thoughts. The model's own does
    neither.
    """
    folder = tmp_path_factory.mktemp("echo")
    models = {
        "hermes": make_hermes_model(folder / "hermes"),
        "closed": make_thinking_model(folder / "closed", is_open=False),
        "open": make_thinking_model(folder / "open", is_open=True),
    }
    with new_pipeline(folder) as pipeline:
        pipeline.fake_engine("--echo", "--can-constrain", "--token-interval-ms", "2")
        pipeline.processor()
        for name, model in models.items():
            pipeline.script("processor.py", "--model", str(model), "--served-model-name", name)
        pipeline.frontend()
        pipeline.wait_ready(processors=1 + len(models))
        yield pipeline


@pytest.fixture(scope="session", autouse=True)
def _begin_early(request: pytest.FixtureRequest) -> None:
    if not _IS_BESIDE_OTHERS and _begun_ones(request) and (ROOT / MODEL / "model.safetensors").exists():
        request.getfixturevalue("begun")


def _begun_ones(request: pytest.FixtureRequest) -> set[str]:
    names = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    return names & {"pipeline", "make_run", "make_chapter_1"}


@pytest.fixture(scope="session")
def begun(
    request: pytest.FixtureRequest, infra: Infra, tmp_path_factory: pytest.TempPathFactory, embedded_model: str
) -> Iterator[dict[str, Any]]:
    """All with the real model that the chosen tests use, begun at once: an engine is up after half a minute, of which
    it needs one CPU.
    """
    found: dict[str, Any] = {}
    with ExitStack() as begun:
        for name in sorted(_begun_ones(request)):
            folder = tmp_path_factory.mktemp(name)
            if name == "pipeline":  # in the least helpful order
                found[name] = scripts = Pipeline(infra, folder)
                begun.enter_context(running(scripts))
                scripts.frontend()
                scripts.processor()
                scripts.engine()
            elif name == "make_run":
                found[name] = Launch(folder, *block(README, "make run").command.split())
                begun.enter_context(running(found[name]))
            else:  # leases of 2 s: so etcd need not hang for long
                command = block(CHAPTER_1, "make chapter-1").command.split()
                found[name] = Launch(folder, *command, ETCD_LEASE_TTL="2")
                begun.enter_context(running(found[name]))
        yield found


@pytest.fixture(scope="session")
def pipeline(begun: dict[str, Any]) -> Pipeline:
    """The three real scripts with the real model."""
    scripts: Pipeline = begun["pipeline"]
    scripts.wait_ready(480)
    return scripts


@pytest.fixture(scope="module")
def make_run(begun: dict[str, Any]) -> Iterator[Launch]:
    yield from launched(begun["make_run"])


@pytest.fixture(scope="module")
def make_chapter_1(begun: dict[str, Any]) -> Iterator[Launch]:
    yield from launched(begun["make_chapter_1"])


def launched(launch: Launch) -> Iterator[Launch]:
    with running(launch):
        launch.wait_for("Ctrl-C stops everything")
        yield launch


@pytest.fixture
def client(pipeline: Pipeline) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pipeline.url, timeout=300) as client:
        yield client
