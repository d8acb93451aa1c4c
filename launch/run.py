"""What `make infra`, `make run` and `make chapter-1` do: start, wait, ask, show, stay."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Coroutine

import httpx

from common.dynamo.network import SERVERS, wait_for_servers
from common.environment import prepare_environment
from launch.logs import current_phase, show_new_lines
from launch.programs import chapter_programs, component_programs, server_programs
from launch.questions import fetch, show_answer, show_choices_of_the_router, show_turns_of_engines
from launch.settings import LOOPBACK, LaunchError, Settings, say, shown
from launch.supervisor import Program, Supervisor

POLL_S = 0.5
PROGRESS_INTERVAL_S = 5.0
MAX_PROGRESS_WIDTH = 110
ROUTER_START_S = 60.0
GIVEN_SERVER_S = 2.0
MANY_CPUS = 8  # those of SGLang, and one for each of a few processes
DEFAULT_SERVERS = ("nats://127.0.0.1:4222", "http://127.0.0.1:2379")
"""What Dynamo looks for where no variable says otherwise."""


async def infra(settings: Settings) -> None:
    """NATS and etcd alone, until somebody stops them: its own ones, whatever is set for others."""
    settings = settings.model_copy(update={"given_nats_server": None, "given_etcd_endpoints": None})
    folder = settings.data_folder / "infra"
    supervisor = Supervisor(folder, server_programs(settings, folder))
    async with supervisor.running():
        ports = [port for program in supervisor.programs for port in program.ports.values()]
        await supervisor.until(lambda: all(map(listens, ports)))
        say(f"infra: NATS at {settings.nats_server}, with JetStream; logs in {shown(folder)}/logs")
        say(f"infra: etcd at {settings.etcd_endpoints}")
        if (settings.nats_server, settings.etcd_endpoints) != DEFAULT_SERVERS:
            variables = " ".join(f"{name}={value}" for name, value in settings.server_variables.items())
            say(f"infra: in the other terminals first: export {variables}")
        say("infra: Ctrl-C stops both")
        await supervisor.keep_running()


Watch = Callable[[Supervisor, asyncio.Event], Coroutine[None, None, None]]


async def run(settings: Settings, watch: Watch | None = None) -> None:
    """Start, wait, ask, show, stay. watch: runs beside all that, and may restart programs once its event is set."""
    await require_given_servers(settings)
    folder = settings.run_folder
    *components, router = component_programs(settings)
    supervisor = Supervisor(folder, [*server_programs(settings, folder), *components])
    all_is_shown = asyncio.Event()
    async with supervisor.running():
        beside = [asyncio.create_task(watch(supervisor, all_is_shown))] if watch else []
        try:
            names = ", ".join(program.name for program in supervisor.programs)
            say(f"run: starting {names}; logs in {shown(folder)}/logs")
            await wait_until_ready(supervisor, settings)
            await asyncio.to_thread(show_answer, settings)
            if settings.has_router:
                await show_router(settings, supervisor, router)
                components.append(router)
            all_is_shown.set()
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


async def chapter_1(settings: Settings) -> None:
    """The chapter taken literally. A reader breaks one and then the other in the same way."""
    prepare_environment()  # the scripts are plain Dynamo: so it uses NATS, and stays on this machine, as with ours
    await require_given_servers(settings)
    folder = settings.run_folder
    supervisor = Supervisor(folder, [*server_programs(settings, folder), *chapter_programs(settings)])
    async with supervisor.running():
        say(f"chapter-1: starting nats, etcd and the scripts of docs/chapter-1; logs in {shown(folder)}/logs")
        await supervisor.until(lambda: listens(settings.http_port))  # the frontend waits for the others
        await asyncio.to_thread(show_answer, settings)
        if not settings.is_run_once:
            say("chapter-1: break it as docs/chapter-1/README.md says. Ctrl-C stops everything")
            await supervisor.keep_running()


async def require_given_servers(settings: Settings) -> None:
    """Servers that the environment names are used, not started: they must be there.

    Raises:
        ServersMissing: one is not; the message names it and its variable.
    """
    given = {"NATS_SERVER": settings.given_nats_server, "ETCD_ENDPOINTS": settings.given_etcd_endpoints}
    servers = [server for server in SERVERS if given[server.variable]]
    for server in servers:
        say(f"launch: using {server}, which the environment names, instead of starting one")
    await wait_for_servers(GIVEN_SERVER_S, servers)


def listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


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
