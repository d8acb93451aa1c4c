"""`make run`: everything on one machine, the chapter's question and its answer, and then it stays up."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine

import httpx

from launch.command import LaunchError, run_command, say
from launch.conversation import show_choices_of_the_router, show_turns_of_engines
from launch.first_question import fetch, show_answer
from launch.infra import require_given_servers, server_programs
from launch.logs import current_phase, show_new_lines, shown
from launch.program import Program
from launch.settings import LOOPBACK, Settings
from launch.supervisor import Supervisor

POLL_S = 0.5
PROGRESS_INTERVAL_S = 5.0
MAX_PROGRESS_WIDTH = 110
ROUTER_START_S = 60.0
MANY_CPUS = 8  # those of SGLang, and one for each of a few processes


async def run(settings: Settings, watch: Callable[[Supervisor], Coroutine[None, None, None]] | None = None) -> None:
    """Start, wait, ask, show, stay. watch: runs beside all that, as `make dev` does."""
    await require_given_servers(settings)
    folder = settings.data_folder / "run"
    *components, router = component_programs(settings)
    supervisor = Supervisor(folder, [*server_programs(settings, folder), *components])
    async with supervisor.running():
        beside = [asyncio.create_task(watch(supervisor))] if watch else []
        try:
            names = ", ".join(program.name for program in supervisor.programs)
            say(f"run: starting {names}; logs in {shown(folder)}/logs")
            await wait_until_ready(supervisor, settings)
            await asyncio.to_thread(show_answer, settings)
            if settings.has_router:
                await show_router(settings, supervisor, router)
                components.append(router)
            if not settings.is_run_once:
                show_what_next(settings)
                shown_logs = [show_new_lines(each.name, supervisor.log_file(each.name)) for each in components]
                await asyncio.gather(supervisor.keep_running(), *beside, *shown_logs)
        except asyncio.CancelledError:
            say("run: stopping; streams get time to finish, Ctrl-C once more ends them")
            if settings.is_run_once:
                raise LaunchError("stopped before it was done") from None
            raise
        finally:
            for task in beside:
                task.cancel()


def component_programs(settings: Settings) -> list[Program]:
    """The chapter's three commands, with as many engines as are wanted, and the router's, which is started later.

    The frontend stops first, so that what it waits for is still there.
    """
    kv_events = ["--kv-events"] if settings.has_router else []
    engine = ["engine.py", "--model-path", settings.model, *kv_events, *settings.engine_args]
    engine_names = ["engine", *(f"engine-{number}" for number in range(2, settings.num_engines + 1))]
    commands = {
        **dict.fromkeys(engine_names, engine),
        "processor": ["processor.py", "--model", settings.model],
        "frontend": ["frontend.py", "--host", LOOPBACK, "--port", str(settings.http_port)],
        "router": ["router.py"],
    }
    return [script_program(settings, name, command) for name, command in commands.items()]


def script_program(settings: Settings, name: str, command: list[str], **variables: str) -> Program:
    """A script and its arguments, with what the environment says, the servers' addresses, and `variables`."""
    return Program(
        name=name,
        command=[sys.executable, *command],
        environ=os.environ | settings.server_variables | {"PYTHONUNBUFFERED": "1"} | variables,
        ports={"HTTP_PORT": settings.http_port} if name == "frontend" else {},
    )


async def show_router(settings: Settings, supervisor: Supervisor, router: Program) -> None:
    """A conversation before the router is there, and one after."""
    await asyncio.to_thread(show_turns_of_engines, settings)
    supervisor.start(router)
    await wait_until_logged(supervisor, router.name, "serving inference/router/find_worker")
    await asyncio.to_thread(show_choices_of_the_router, settings)


async def wait_until_logged(supervisor: Supervisor, name: str, words: str) -> None:
    """Raises:
    LaunchError: the program keeps dying, or has not said so within ROUTER_START_S.
    """
    log = supervisor.log_file(name)
    try:
        async with asyncio.timeout(ROUTER_START_S):
            await supervisor.until(lambda: words in log.read_text(errors="replace"))
    except TimeoutError:
        raise LaunchError(f"{shown(log)} does not say: {words}") from None
    await asyncio.sleep(POLL_S)  # until processors have heard of it


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
            ends = "".join(supervisor.end_of_log(name, 5) for name in ("engine", "processor", "frontend"))
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
    except httpx.HTTPError:
        return "Waiting for frontend."
    try:
        ready = json.loads(body)
        if status != 200:
            return str(ready["error"]["message"])
        missing = settings.num_engines - ready["engines"]
        return f"Waiting for {missing} of {settings.num_engines} engines." if missing > 0 else None
    except (ValueError, LookupError, TypeError):
        return f"/ready says {status}."


def show_what_next(settings: Settings) -> None:
    """How to talk to it, look into it, and stop it."""
    say(f"run: the pipeline stays up at {settings.frontend_url}; its own docs are at {settings.frontend_url}/docs")
    say("run: ask again with the curl above, from another terminal")
    say("run: change engine.py and `make restart-engine`: the others go on; also -processor, -frontend")
    if (num_cpus := os.cpu_count() or 1) >= MANY_CPUS:
        say(f"run: each script uses one or two of {num_cpus} CPUs; docs/deployment.md says what more of each brings")
    say("run: Ctrl-C stops everything. What happens meanwhile:")


async def main() -> None:
    """`python -m launch.run`, behind `make run`."""
    await run(Settings.from_environ(os.environ))


if __name__ == "__main__":
    sys.exit(run_command("run", main()))
