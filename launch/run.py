"""`make run`: everything on one machine, the chapter's question and its answer, and then it stays up."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error

from launch.command import LaunchError, run_command
from launch.engine_log import current_phase
from launch.first_question import ask, curl_command, etcdctl_command, instances
from launch.infra import local_opener, own_ports, require_given_servers, server_programs, wait_for_own_servers
from launch.logs import last_lines, shown
from launch.model import ROOT
from launch.ports import require_free
from launch.settings import LOOPBACK, Settings
from launch.supervisor import Supervisor, SupervisorError
from launch.supervisor_config import Program
from launch.watch import watch

COMPONENTS = ("engine", "processor", "frontend")
POLL_S = 0.5
PROGRESS_INTERVAL_S = 5.0
MAX_PROGRESS_WIDTH = 110
NUM_LINES_OF_PHASE = 50


def main() -> int:
    """`python -m launch.run`, behind `make run`."""
    argparse.ArgumentParser(prog="python -m launch.run", description=__doc__).parse_args()
    return run_command("run", lambda: run(Settings.from_environ(os.environ)))


def run(settings: Settings) -> None:
    """Start, wait, ask, show, stay."""
    require_free([*own_ports(settings), settings.http_port])
    require_given_servers(settings)
    folder = settings.data_folder / "run"
    programs = [*server_programs(settings, folder), *component_programs(settings)]
    with Supervisor(folder, programs, environ=component_environ(settings), directory=ROOT) as supervisor:
        try:
            say(f"starting {', '.join(program.name for program in programs)}; logs in {shown(folder)}/logs")
            wait_for_own_servers(supervisor, settings)
            wait_until_ready(supervisor, settings)
            show_answer(settings)
            if not settings.is_run_once:
                show_what_next(settings)
                watch(supervisor, COMPONENTS)
        except KeyboardInterrupt:
            say("stopping; streams get time to finish, Ctrl-C once more ends them")
            if settings.is_run_once:
                raise LaunchError("stopped before it was done") from None
            raise


def component_programs(settings: Settings) -> list[Program]:
    """The chapter's three commands. The frontend stops first, so that what it waits for is still there."""
    python = sys.executable
    engine = [python, "engine.py", "--model-path", settings.model, *settings.engine_args]
    processor = [python, "processor.py", "--model", settings.model]
    frontend = [python, "frontend.py", "--host", LOOPBACK, "--port", str(settings.http_port.number)]
    commands = zip(COMPONENTS, (engine, processor, frontend), strict=True)
    return [
        Program(name=name, command=command, priority=priority)
        for priority, (name, command) in enumerate(commands, start=20)
    ]


def component_environ(settings: Settings) -> dict[str, str]:
    """The environment, with the servers in the variables that Dynamo reads."""
    servers = {"NATS_SERVER": settings.nats_server, "ETCD_ENDPOINTS": settings.etcd_endpoints}
    return os.environ | servers | {"PYTHONUNBUFFERED": "1"}


def wait_until_ready(supervisor: Supervisor, settings: Settings) -> None:
    """Return once the frontend says that it reaches a processor and an engine; meanwhile, show what goes on.

    Raises:
        SupervisorError: a program keeps dying, or the deadline passed.
    """
    started_at = shown_at = time.monotonic()
    while missing := what_is_missing(settings):
        supervisor.require_alive()
        now = time.monotonic()
        if now - started_at > settings.ready_timeout_s:
            raise SupervisorError(_not_ready(supervisor, settings, missing))
        if now - shown_at >= PROGRESS_INTERVAL_S:
            shown_at = now
            phase = current_phase(last_lines(supervisor.log_file("engine"), NUM_LINES_OF_PHASE))
            say(f"{now - started_at:4.0f} s  {missing} The engine: {phase}"[:MAX_PROGRESS_WIDTH])
        time.sleep(POLL_S)
    say(f"{time.monotonic() - started_at:4.0f} s  ready: frontend, processor and engine reach each other")


def what_is_missing(settings: Settings) -> str | None:
    """Ask the frontend's /ready. None where nothing is missing, else a sentence."""
    url = f"http://{LOOPBACK}:{settings.http_port.number}/ready"
    try:
        with local_opener().open(url, timeout=5):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return _error_message(error)
    except (OSError, http.client.HTTPException):
        return "Waiting for frontend."


def _error_message(response: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(response.read())["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return f"/ready says {response.code}."


def _not_ready(supervisor: Supervisor, settings: Settings, missing: str) -> str:
    ends = [
        f"\n  {name}: {line}"
        for name in COMPONENTS
        for line in last_lines(supervisor.log_file(name), 5) or ["no line in its log"]
    ]
    seconds = f"{settings.ready_timeout_s:.0f} s (READY_TIMEOUT_S)"
    return f"not ready after {seconds}. {missing} The ends of the logs:{''.join(ends)}"


def show_answer(settings: Settings) -> None:
    """The chapter's fourth terminal, and its look into etcd.

    Raises:
        WrongAnswer: either is not what it should be.
    """
    print(f"\n$ {curl_command(settings)}", flush=True)
    started_at = time.monotonic()
    answer = ask(settings)
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    say(f"answered in {time.monotonic() - started_at:.1f} s")
    print(f"\n$ {etcdctl_command(settings)}")
    print(instances(settings, os.environ), flush=True)


def show_what_next(settings: Settings) -> None:
    """How to talk to it, look into it, and stop it."""
    say(f"the pipeline stays up at {settings.frontend_url}; its own docs are at {settings.frontend_url}/docs")
    say("ask again with the curl above, from another terminal")
    say("change engine.py and `make restart-engine`: the others go on; also -processor, -frontend")
    say("Ctrl-C stops everything. What happens meanwhile:")


def say(line: str) -> None:
    print(f"run: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
