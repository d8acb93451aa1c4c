"""docs/clients.md: each of its blocks, run by the real client from its registry, against the real pipeline.

The clients are in environments of their own: .venv-clients, and .venv-clients/node. `make test-clients` makes both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import Block, blocks
from tests.processes import ROOT, Pipeline

pytestmark = [pytest.mark.clients, pytest.mark.pipeline]

CLIENTS = ROOT / ".venv-clients"
NODE = CLIENTS / "node"
PAGE = [block for block in blocks(ROOT / "docs" / "clients.md") if block.language in ("python", "sh", "js")]
CITIES = ("Berlin", "Paris", "Rome")
PROGRAM = {
    "python": [str(CLIENTS / "bin" / "python"), "-c"],
    "js": ["node", "--input-type=module", "--eval"],
    "sh": ["bash", "-euc"],
}


def run(block: Block, pipeline: Pipeline, folder: Path) -> str:
    """What it prints. It finds nothing but the clients, the model and the pipeline."""
    text = block.text.replace("localhost:8080", f"localhost:{pipeline.http_port}")
    path = os.pathsep.join([str(CLIENTS / "bin"), os.environ["PATH"]])
    if "sglang" in text:
        path = os.pathsep.join([str(Path(sys.executable).parent), path])
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    environ = {
        "PATH": path, "HOME": str(folder), "LLM_USER_PATH": str(folder), "NO_PROXY": "localhost,127.0.0.1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }  # fmt: skip
    done = subprocess.run(
        [*PROGRAM[block.language], text], cwd=folder, env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def last_line(printed: str) -> str:
    return printed.strip().splitlines()[-1]


def asks_for(word: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [b for b in PAGE if word in b.text], ids=lambda block: block.text[:50])


ANSWERS = [b for b in PAGE if "capital" in b.text and "Rome" not in b.text]


@pytest.mark.parametrize("block", ANSWERS, ids=lambda block: block.text[:50])
def test_a_client_gets_the_answer(block: Block, pipeline: Pipeline, tmp_path: Path) -> None:
    assert last_line(run(block, pipeline, tmp_path)) == "The capital of France is Paris."


@asks_for("Rome")
def test_a_client_gets_an_object(block: Block, pipeline: Pipeline, tmp_path: Path) -> None:
    assert last_line(run(block, pipeline, tmp_path)) in CITIES


def chats_since(pipeline: Pipeline, num_before: int) -> list[str]:
    lines = [line for line in pipeline.processes[0].log.splitlines() if "POST /v1/chat/completions" in line]
    return lines[num_before:]


@pytest.mark.parametrize("tool", ["aiperf", "guidellm", "sglang.bench_serving"])
def test_a_load_tool_gets_all_its_answers(tool: str, pipeline: Pipeline, tmp_path: Path) -> None:
    (block,) = [b for b in PAGE if b.language == "sh" and tool in b.text]
    num_before = len(chats_since(pipeline, 0))
    run(block, pipeline, tmp_path)
    chats = chats_since(pipeline, num_before)
    assert len(chats) >= 4
    assert all(" 200, ok" in line and " 8 completion tokens" in line for line in chats), chats


def test_every_block_is_run() -> None:
    load = [b for b in PAGE if b.language == "sh" and "capital" not in b.text]
    assert len(ANSWERS) + sum("Rome" in b.text for b in PAGE) + len(load) == len(PAGE)
    assert len(load) == 3
