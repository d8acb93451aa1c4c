"""Fixtures: one NATS and etcd, one pipeline on a fake engine and one on the real model, for all tests."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests import programs
from tests.processes import MODEL, ROOT, Infra, Pipeline, running

_num_skipped: Counter[str] = Counter()  # by the program that was missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


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
    servers = Infra(tmp_path_factory.mktemp("infra"))
    try:
        yield servers.start()
    finally:
        servers.stop()


@pytest.fixture
def own_infra(tmp_path: Path) -> Iterator[Infra]:
    """Servers of one test's own, to be harmed."""
    servers = Infra(tmp_path / "infra")
    try:
        yield servers.start()
    finally:
        servers.stop()


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
    servers = Infra(tmp_path_factory.mktemp("fake-infra"))
    pipeline = Pipeline(servers, tmp_path_factory.mktemp("fake-pipeline"))
    try:
        servers.start()
        pipeline.fake_engine("--can-constrain")
        pipeline.processor()
        pipeline.frontend()
        pipeline.wait_ready()
        yield pipeline
    finally:
        pipeline.stop()
        servers.stop()


@pytest.fixture
def fake_client(fake_pipeline: Pipeline) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_pipeline.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def pipeline(infra: Infra, tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """The three real scripts with the real model, started in the least helpful order."""
    scripts = Pipeline(infra, tmp_path_factory.mktemp("pipeline"))
    try:
        scripts.frontend()
        scripts.processor()
        scripts.engine()
        scripts.wait_ready(240)
        yield scripts
    finally:
        scripts.stop()


@pytest.fixture
def client(pipeline: Pipeline) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pipeline.url, timeout=120) as client:
        yield client
