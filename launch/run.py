"""`make run`: everything on one machine, the chapter's question and its answer, and then it stays up."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from launch.command import LaunchError, run_command, say
from launch.first_question import fetch, show_answer
from launch.infra import require_given_servers, server_programs
from launch.logs import current_phase, show_new_lines, shown
from launch.program import Program
from launch.settings import LOOPBACK, Settings
from launch.supervisor import Supervisor

COMPONENTS = ("engine", "processor", "frontend")
POLL_S = 0.5
PROGRESS_INTERVAL_S = 5.0
MAX_PROGRESS_WIDTH = 110


async def run(settings: Settings) -> None:
    """Start, wait, ask, show, stay."""
    await require_given_servers(settings)
    folder = settings.data_folder / "run"
    supervisor = Supervisor(folder, [*server_programs(settings, folder), *component_programs(settings)])
    async with supervisor.running():
        try:
            names = ", ".join(program.name for program in supervisor.programs)
            say(f"run: starting {names}; logs in {shown(folder)}/logs")
            await wait_until_ready(supervisor, settings)
            await asyncio.to_thread(show_answer, settings)
            if not settings.is_run_once:
                show_what_next(settings)
                shown_logs = [show_new_lines(name, supervisor.log_file(name)) for name in COMPONENTS]
                await asyncio.gather(supervisor.keep_running(), *shown_logs)
        except asyncio.CancelledError:
            say("run: stopping; streams get time to finish, Ctrl-C once more ends them")
            if settings.is_run_once:
                raise LaunchError("stopped before it was done") from None
            raise


def component_programs(settings: Settings) -> list[Program]:
    """The chapter's three commands. The frontend stops first, so that what it waits for is still there."""
    python = sys.executable
    commands = {
        "engine": [python, "engine.py", "--model-path", settings.model, *settings.engine_args],
        "processor": [python, "processor.py", "--model", settings.model],
        "frontend": [python, "frontend.py", "--host", LOOPBACK, "--port", str(settings.http_port)],
    }
    servers = {"NATS_SERVER": settings.nats_server, "ETCD_ENDPOINTS": settings.etcd_endpoints}
    environ = os.environ | servers | {"PYTHONUNBUFFERED": "1"}
    ports = {"frontend": {"HTTP_PORT": settings.http_port}}
    return [
        Program(name=name, command=commands[name], environ=environ, ports=ports.get(name, {})) for name in COMPONENTS
    ]


async def wait_until_ready(supervisor: Supervisor, settings: Settings) -> None:
    """Return once the frontend says that it reaches a processor and an engine; meanwhile, show what goes on.

    Raises:
        LaunchError: a program keeps dying, or the deadline passed.
    """
    started_at = shown_at = time.monotonic()
    while missing := await asyncio.to_thread(what_is_missing, settings):
        supervisor.require_alive()
        now = time.monotonic()
        if now - started_at > settings.ready_timeout_s:
            ends = "".join(supervisor.end_of_log(name, 5) for name in COMPONENTS)
            seconds = f"{settings.ready_timeout_s:.0f} s (READY_TIMEOUT_S)"
            raise LaunchError(f"not ready after {seconds}. {missing}{ends}")
        if now - shown_at >= PROGRESS_INTERVAL_S:
            shown_at = now
            phase = current_phase(supervisor.log_file("engine"))
            say(f"run: {now - started_at:4.0f} s  {missing} The engine: {phase}"[:MAX_PROGRESS_WIDTH])
        await asyncio.sleep(POLL_S)
    say(f"run: {time.monotonic() - started_at:4.0f} s  ready: frontend, processor and engine reach each other")


def what_is_missing(settings: Settings) -> str | None:
    """Ask the frontend's /ready. None where nothing is missing, else a sentence."""
    try:
        status, body = fetch(f"http://{LOOPBACK}:{settings.http_port}/ready", timeout_s=5)
    except OSError:
        return "Waiting for frontend."
    try:
        return None if status == 200 else str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"/ready says {status}."


def show_what_next(settings: Settings) -> None:
    """How to talk to it, look into it, and stop it."""
    say(f"run: the pipeline stays up at {settings.frontend_url}; its own docs are at {settings.frontend_url}/docs")
    say("run: ask again with the curl above, from another terminal")
    say("run: change engine.py and `make restart-engine`: the others go on; also -processor, -frontend")
    say("run: Ctrl-C stops everything. What happens meanwhile:")


async def main() -> None:
    """`python -m launch.run`, behind `make run`."""
    await run(Settings.from_environ(os.environ))


if __name__ == "__main__":
    sys.exit(run_command("run", main()))
