"""More frontends on the same pipeline, with settings of their own."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.processes import Pipeline


@contextlib.contextmanager
def frontend_beside(
    pipeline: Pipeline, folder: Path, *args: str, env: Mapping[str, str] | None = None
) -> Iterator[Pipeline]:
    """Another frontend before the processors and engines of `pipeline`; its `url` and logs are its own."""
    beside = Pipeline(pipeline.infra, folder)
    try:
        beside.frontend(*args, env=env)
        beside.wait_ready()
        yield beside
    finally:
        beside.stop()
