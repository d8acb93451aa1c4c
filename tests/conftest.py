"""Fixtures: one NATS and etcd, one pipeline on a fake engine and one on the real model, for all tests."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests import programs
from tests.model_copies import make_hermes_model, make_thinking_model
from tests.processes import MODEL, ROOT, Infra, Pipeline, new_pipeline, running

_num_skipped: Counter[str] = Counter()  # by the program that was missing


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several files run side by side, what shares the real model stays together."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    for item in items:
        item.add_marker(
            pytest.mark.xdist_group("the real model" if item.get_closest_marker("pipeline") else item.path.name)
        )


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


@pytest.fixture(scope="session")
def pipeline(infra: Infra, tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The three real scripts with the real model, started in the least helpful order."""
    with running(scripts := Pipeline(infra, tmp_path_factory.mktemp("pipeline"))):
        scripts.frontend()
        scripts.processor()
        scripts.engine()
        scripts.wait_ready(240)
        yield scripts


@pytest.fixture
def client(pipeline: Pipeline) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pipeline.url, timeout=120) as client:
        yield client
