"""docs/exercises/: each check fails on the checkout as it is, and passes with the solution."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.checkout import copy_checkout
from tests.pages import block
from tests.processes import ROOT

EXERCISES = ROOT / "docs" / "exercises"
PAGE = EXERCISES / "README.md"
NUMBERS = sorted(solution.stem for solution in (EXERCISES / "solutions").glob("*.patch"))


def outcomes(checkout: Path) -> dict[str, set[str]]:
    """By exercise: whether its tests "passed", "failed", or both."""
    checks = [str(path.relative_to(checkout)) for path in sorted(checkout.glob("docs/exercises/check_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--junitxml=junit.xml", *checks]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(checkout / "junit.xml").iter("testcase"):
        number = re.search(r"check_(\d)", case.attrib["classname"])
        assert number is not None
        has_failed = case.find("failure") is not None or case.find("error") is not None
        found.setdefault(number[1], set()).add("failed" if has_failed else "passed")
    return found


@pytest.mark.process
def test_each_check_fails_without_the_solution_and_passes_with_it(tmp_path: Path, embedded_model: str) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    before = outcomes(checkout)
    assert [number for number in NUMBERS if "failed" in before[number]] == NUMBERS
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # not a part of a repository around it
    apply_first = block(PAGE, "git apply").command
    for number in NUMBERS:
        apply = apply_first.replace("1.patch", f"{number}.patch")
        subprocess.run(["bash", "-c", apply], cwd=checkout, env=alone, check=True)
    assert outcomes(checkout) == {number: {"passed"} for number in NUMBERS}
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=E,F,W", "--line-length=120"]
    subprocess.run([*ruff, "common", *(path.name for path in checkout.glob("*.py"))], cwd=checkout, check=True)


def test_every_exercise_has_a_task_a_check_a_solution_and_a_target() -> None:
    tasks = re.findall(r"^## (\d)\. ", PAGE.read_text(), re.MULTILINE)
    checks = [path.name.split("_")[1] for path in sorted(EXERCISES.glob("check_*.py"))]
    assert tasks == checks == NUMBERS
    check = block(PAGE, "make check-exercise-1").command
    without_setup = [*check.split(), "--dry-run", "-o", "setup", "-o", "model"]
    done = subprocess.run(without_setup, cwd=ROOT, capture_output=True, text=True)
    assert "docs/exercises/check_1_" in done.stdout
