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

TEST_FILES = sorted(path.name for path in Path(__file__).parent.glob("test_*.py"))
_num_skipped: Counter[str] = Counter()  # by the program that was missing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", default="1/1", help="which part of the tests to run, such as 2/3 (tests/side_by_side.py)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    part, num_parts = map(int, config.getoption("--part").split("/"))
    if num_parts > 1:
        others = [item for item in items if _part_of(item, num_parts) != part]
        items[:] = [item for item in items if _part_of(item, num_parts) == part]
        config.hook.pytest_deselected(items=others)


def _part_of(item: pytest.Item, num_parts: int) -> int:
    """The first has what shares the real model, the others take turns at the rest of the files."""
    if item.get_closest_marker("pipeline"):
        return 1
    return 2 + TEST_FILES.index(item.path.name) % (num_parts - 1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if not programs.is_installed(program):
                if programs.ARE_REQUIRED:
                    pytest.fail(f"{program} is not installed", pytrace=False)
                _num_skipped[program] += 1
                pytest.skip(f"{program} is not installed")


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
