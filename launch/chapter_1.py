"""`make chapter-1`: the chapter taken literally, its three scripts in docs/chapter-1/, on one machine.

Servers, environment and supervisor are those of `make run`: a reader breaks one and then the other in the same way.
"""

import asyncio
import os
import sys

import torch

from common.environment import prepare_environment
from common.sglang.engine_args import CPU_DEFAULTS, CPU_ENVIRONMENT
from launch.command import run_command, say
from launch.first_question import show_answer
from launch.infra import listens, require_given_servers, server_programs
from launch.logs import shown
from launch.model import ROOT
from launch.program import Program
from launch.run import script_program
from launch.settings import Settings
from launch.supervisor import Supervisor


async def run(settings: Settings) -> None:
    """Start, wait, ask, show, stay."""
    await require_given_servers(settings)
    folder = settings.data_folder / "run"  # of `make run`, so that `make status` and the pid files are the same
    supervisor = Supervisor(folder, [*server_programs(settings, folder), *chapter_programs(settings)])
    async with supervisor.running():
        say(f"chapter-1: starting nats, etcd and the scripts of docs/chapter-1; logs in {shown(folder)}/logs")
        await supervisor.until(lambda: listens(settings.http_port))  # the frontend waits for the others
        await asyncio.to_thread(show_answer, settings)
        if not settings.is_run_once:
            say("chapter-1: break it as docs/chapter-1/README.md says. Ctrl-C stops everything")
            await supervisor.keep_running()


def chapter_programs(settings: Settings) -> list[Program]:
    """The three scripts. Without a GPU the engine gets what engine.py sets by itself there."""
    has_gpu = torch.cuda.is_available()
    engine_args = [*([] if has_gpu else cpu_flags()), *settings.engine_args]
    arguments = {
        "engine": ["--model-path", settings.model, *engine_args],
        "processor": ["--model", settings.model],
        "frontend": ["--port", str(settings.http_port)],
    }
    # SGLang loads our platform by its name, `common...`, which other packages of the environment have, too.
    on_cpu = {"SGLANG_PLATFORM": "cpu_torch_native", "PYTHONPATH": str(ROOT)} | CPU_ENVIRONMENT
    return [
        script_program(settings, name, [f"docs/chapter-1/{name}.py", *words], **({} if has_gpu else on_cpu))
        for name, words in arguments.items()
    ]


def cpu_flags() -> list[str]:
    flags = []
    for name, value in CPU_DEFAULTS.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


async def main() -> None:
    """`python -m launch.chapter_1`, behind `make chapter-1`."""
    prepare_environment()  # the scripts are plain Dynamo: so it uses NATS, and stays on this machine, as with ours
    await run(Settings.from_environ(os.environ))


if __name__ == "__main__":
    sys.exit(run_command("chapter-1", main()))
