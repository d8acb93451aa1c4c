"""What the checks share: NATS and etcd; and for those that ask over HTTP, the reader's processor and frontend."""

from collections.abc import Iterator

import pytest

from tests.processes import Infra, Pipeline, running


@pytest.fixture(scope="session")
def no_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Only NATS and etcd so far."""
    infra = Infra(tmp_path_factory.mktemp("infra"))
    pipeline = Pipeline(infra, tmp_path_factory.mktemp("logs"))
    with running(infra.start()), running(pipeline):
        yield pipeline


@pytest.fixture(scope="session")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """The processor and the frontend, and an engine that says the same token over and over now and then."""
    infra = Infra(tmp_path_factory.mktemp("infra"))
    pipeline = Pipeline(infra, tmp_path_factory.mktemp("logs"))
    with running(infra.start()), running(pipeline):
        pipeline.fake_engine("--token-interval-ms", "5", token_ids=[*range(1000, 1010), *[1010] * 40])
        pipeline.processor()
        pipeline.frontend()
        pipeline.wait_ready()
        yield pipeline
