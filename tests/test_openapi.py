"""The OpenAPI document, held against the running frontend and processor by schemathesis; and the page for people.

FUZZ_CASES (default 400) is how many requests it makes up for chat completions, FUZZ_SEED which.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from common.arguments import FrontendArgs
from common.errors import PipelineError
from common.http.openapi import openapi_document
from common.http.server import Pipeline as HttpPipeline
from common.http.server import create_app
from common.observability.metrics import Metrics
from common.openai.request import NO_OPS, ChatCompletionRequest
from common.openai.request_parts import IGNORED
from tests.frontends import frontend_beside
from tests.processes import ROOT, Pipeline

FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "400"))
TIMEOUT_S = 240 + FUZZ_CASES
FUZZ_SEED = os.environ.get("FUZZ_SEED", "1")
CHAT = "/v1/chat/completions"
CONFIG = ROOT / "tests" / "schemathesis.toml"
# Paths of the routes whose parameters take anything cannot be made wrong; it is not worth a complaint.
SETTINGS = ("--continue-on-failure", "--suppress-health-check", "filter_too_much", "--generation-database", "none")


def fuzz(url: str, cases: int, *args: str) -> int:
    """Run schemathesis on /openapi.json, with so many made-up requests for each operation beside those that it makes of
    the document itself; returns the number of all, which passed.
    """
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG),
        "run", f"{url}/openapi.json", "--no-color",
        "--max-examples", str(cases), "--seed", FUZZ_SEED, *SETTINGS, *args,
    ]  # fmt: skip
    env = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.openapi_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    # A failing request may be a page long; its answer stands before it.
    report = "\n".join(line[:1000] for line in done.stdout.splitlines())
    assert done.returncode == 0, report + done.stderr[-2000:]
    num_cases = re.search(r"(\d+) generated, \1 passed", report)
    assert num_cases, report
    return int(num_cases[1])


@pytest.mark.process
@pytest.mark.timeout(TIMEOUT_S)
def test_schemathesis_finds_nothing_in_chat_completions(fake_pipeline: Pipeline) -> None:
    phases = ("--phases", "coverage,fuzzing")
    assert fuzz(fake_pipeline.url, FUZZ_CASES, "--include-path", CHAT, *phases) >= FUZZ_CASES
    statuses = re.findall(rf": POST {CHAT} (\d+)", fake_pipeline.processes[-1].log)
    assert statuses.count("200") > len(statuses) / 5, "hardly a request was valid"
    assert statuses.count("400") > len(statuses) / 5, "hardly a request was invalid"


@pytest.mark.process
@pytest.mark.timeout(TIMEOUT_S)
def test_schemathesis_finds_nothing_on_the_other_routes(fake_pipeline: Pipeline) -> None:
    assert fuzz(fake_pipeline.url, FUZZ_CASES // 8, "--exclude-path", CHAT) >= FUZZ_CASES // 8


@pytest.mark.process
@pytest.mark.timeout(TIMEOUT_S)
def test_schemathesis_finds_no_way_around_the_api_key(fake_pipeline: Pipeline, tmp_path: Path) -> None:
    with frontend_beside(fake_pipeline, tmp_path, "--api-key", "secret") as keyed:
        fuzz(keyed.url, FUZZ_CASES // 20, "--header", "Authorization: Bearer secret")


@pytest.mark.process
def test_the_docs_page_shows_the_document(fake_client: httpx.Client) -> None:
    assert fake_client.get("/openapi.json").json() == openapi_document(is_key_required=False)
    page = fake_client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text


@pytest.mark.parametrize("is_key_required", [False, True])
def test_the_document_is_valid_openapi(is_key_required: bool) -> None:
    schemathesis.openapi.from_dict(openapi_document(is_key_required=is_key_required)).validate()


def test_every_route_is_in_the_document() -> None:
    nobody: Any = None
    app = create_app(nobody, HttpPipeline(nobody, nobody, nobody), FrontendArgs(), Metrics("frontend"))
    routes = {route.path.replace(":path", "") for route in app.routes if getattr(route, "include_in_schema", False)}
    assert routes == set(openapi_document(is_key_required=False)["paths"])


def test_without_the_page_the_document_knows_nothing_of_it() -> None:
    document = str(openapi_document(is_key_required=False, is_page_served=False)["paths"])
    assert "/pipeline" not in document
    assert "x-show-path" not in document


def test_the_key_is_documented_where_one_is_required() -> None:
    operations = openapi_document(is_key_required=True)["paths"]
    for path, methods in operations.items():
        for operation in methods.values():
            assert (
                ("401" in operation["responses"]) == ("security" in operation) == path.startswith(("/v1/", "/pipeline"))
            )
    assert "security" not in str(openapi_document(is_key_required=False))


def page_rows(title: str) -> list[list[str]]:
    """The cells of a table in docs/openai-api.md."""
    section = (ROOT / "docs" / "openai-api.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line][2:]


def test_the_page_tells_of_each_field_what_becomes_of_it() -> None:
    told = {name: row[1] for row in page_rows("Fields of a request") for name in re.findall(r"`(\w+)`", row[0])}
    assert told.keys() == ChatCompletionRequest.model_fields.keys() | NO_OPS.keys()
    for name, values in NO_OPS.items():
        assert told[name] == ("ignored" if values is IGNORED or values == (True, False) else "refused")


def test_the_page_has_every_error() -> None:
    told = {(int(row[0]), code) for row in page_rows("Errors") for code in re.findall(r"null|(?<=`)\w+(?=`)", row[1])}
    pending, known = [PipelineError], set()
    while pending:
        pending += (subclasses := pending.pop().__subclasses__())
        known |= {(error.status, error.code or "null") for error in subclasses}
    assert told == known
