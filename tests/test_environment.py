"""Variables that say what a process opens and where it runs, or end it where they hold nonsense."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from common.environment import CPUS_VARIABLE, check_system_port, chosen_cpus
from tests.processes import ROOT, Infra, Pipeline, running

ALLOWED = sorted(os.sched_getaffinity(0))
FIRST = ALLOWED[0]


@pytest.mark.parametrize("text", ["", "-1", "0", "32767"])
def test_system_ports_of_dynamo(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", text)
    check_system_port()


@pytest.mark.parametrize("text", ["32768", "70000", "abc"])
def test_any_other_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", text)
    with pytest.raises(SystemExit, match=f"^error: DYN_SYSTEM_PORT={text}: expected a port up to 32767.$"):
        check_system_port()


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("", set()),
        (f"{FIRST}", {FIRST}),
        (f" {FIRST} , {FIRST}-{FIRST} ", {FIRST}),
        (f"{ALLOWED[0]}-{ALLOWED[-1]}", None),
    ],
)
def test_numbers_and_ranges(monkeypatch: pytest.MonkeyPatch, text: str, cpus: set[int] | None) -> None:
    monkeypatch.setenv(CPUS_VARIABLE, text)
    assert chosen_cpus() == (set(range(ALLOWED[0], ALLOWED[-1] + 1)) if cpus is None else cpus)


@pytest.mark.parametrize("text", ["two", "1;2", "-1", "3-", ",", "5-4", "9999"])
def test_anything_else_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(CPUS_VARIABLE, text)
    with pytest.raises(SystemExit, match=rf"^error: {CPUS_VARIABLE}={text}: .+\.$"):
        chosen_cpus()


@pytest.mark.parametrize(("variable", "text"), [("DYN_SYSTEM_PORT", "70000"), (CPUS_VARIABLE, "two")])
def test_such_an_error_ends_a_script_with_one_line(variable: str, text: str) -> None:
    script = subprocess.run(
        [sys.executable, "frontend.py"], cwd=ROOT, env=os.environ | {variable: text}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert script.returncode == 1
    # Dynamo 1.6 itself warns of a system port, too, when it is imported.
    assert script.stderr.splitlines()[-1].startswith(f"error: {variable}={text}: ")
    assert "Traceback" not in script.stderr


def test_threads_stay_and_children_do_not() -> None:
    source = f"""
import os, subprocess, sys, threading
from common.environment import stay_on
child = subprocess.Popen(["sleep", "60"])
gate = threading.Event()
thread = threading.Thread(target=gate.wait)
thread.start()
stay_on({{{FIRST}}})
later = threading.Thread(target=gate.wait)
later.start()
print([os.sched_getaffinity(each.native_id) for each in (threading.main_thread(), thread, later)])
print(sorted(os.sched_getaffinity(child.pid)))
gate.set()
child.kill()
"""
    script = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert script.stdout.splitlines() == [str([{FIRST}] * 3), str(ALLOWED)]


@pytest.mark.process
def test_a_pipeline_on_one_cpu_answers(own_infra: Infra, tmp_path: Path, embedded_model: str) -> None:
    pipeline = Pipeline(own_infra, tmp_path / "scripts", env={CPUS_VARIABLE: str(FIRST)})
    with running(pipeline):
        pipeline.fake_engine()
        pipeline.processor()
        pipeline.frontend()
        pipeline.wait_ready()
        request = {"model": embedded_model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
        answer = httpx.post(f"{pipeline.url}/v1/chat/completions", json=request, timeout=300)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 5
        for process in pipeline.processes:
            assert process.popen is not None
            threads = os.listdir(f"/proc/{process.popen.pid}/task")
            assert [os.sched_getaffinity(int(thread)) for thread in threads] == [{FIRST}] * len(threads)
