"""What becomes of a test whose program is missing."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.parametrize("is_required", [False, True])
def test_a_missing_program_is_in_the_last_line_or_a_failure(is_required: bool) -> None:
    without_path = {"PATH": "/nowhere", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pytest_timeout", "tests/test_overload.py", "-k", "slowhttptest"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, **without_path, "REQUIRE_PROGRAMS": "1" if is_required else ""},
    )  # fmt: skip
    assert done.returncode == int(is_required), done.stdout
    if is_required:
        assert "slowhttptest is not installed" in done.stdout
    else:
        last_line = done.stdout.splitlines()[-1]
        assert last_line.startswith("Tests were skipped: 3 that need slowhttptest.")
        assert last_line.endswith("apt-get install slowhttptest")
