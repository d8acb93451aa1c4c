"""Variables that end a script at once where they hold nothing that Dynamo takes."""

import os
import subprocess
import sys

import pytest

from common.environment import check_system_port
from tests.processes import ROOT


@pytest.mark.parametrize("text", ["", "-1", "0", "32767"])
def test_system_ports_of_dynamo(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", text)
    check_system_port()


@pytest.mark.parametrize("text", ["32768", "70000", "abc"])
def test_any_other_ends_the_script_with_one_line(text: str) -> None:
    script = subprocess.run(
        [sys.executable, "frontend.py"], cwd=ROOT, env=os.environ | {"DYN_SYSTEM_PORT": text}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert script.returncode == 1
    # Dynamo 1.6 itself warns of it, too, when it is imported.
    assert script.stderr.splitlines()[-1] == f"error: DYN_SYSTEM_PORT={text}: expected a port up to 32767."
