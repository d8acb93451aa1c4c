"""What a launch shows once it is up: the programs' own lines, and which of them died or came back."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from launch.engine_log import phase_of
from launch.logs import LogTail
from launch.supervisor import Supervisor

POLL_S = 0.5
MAX_LINE_WIDTH = 200
SHOWN = re.compile(r" ERROR |Traceback|: (request|serving|waiting for|stopping|left etcd)\b")
"""The components' own lines about requests and about themselves; SGLang's and Dynamo's stay in the logs."""


def watch(supervisor: Supervisor, components: Sequence[str] = ()) -> None:
    """Print what is new until a KeyboardInterrupt ends it: what components do, and deaths of any program.

    Raises:
        SupervisorError: supervisord is gone.
    """
    tails = {name: LogTail(supervisor.log_file(name)) for name in components}
    for tail in tails.values():
        tail.new_lines()
    supervisor.events()
    while True:
        for event in supervisor.events():
            if text := in_words(event):
                print(f"supervisor: {text}", flush=True)
        for name, tail in tails.items():
            for line in tail.new_lines():
                if text := worth_showing(name, line):
                    print(f"{name}: {text}"[:MAX_LINE_WIDTH], flush=True)
        supervisor.states()
        time.sleep(POLL_S)


def worth_showing(name: str, line: str) -> str | None:
    """A line of a component's log as it is shown, or None."""
    if SHOWN.search(line):
        return line
    return phase_of(line) if name == "engine" else None


def in_words(event: str) -> str | None:
    """What an event of supervisord means to a reader, or None where it means nothing new."""
    kind, _, rest = event.partition(": ")
    name = rest.split()[0].strip("':,")
    match kind:
        case "exited":
            return f"{name} died {rest.partition(' ')[2]}; it is started again, the others are left alone"
        case "spawned":
            return f"{name} started, {rest.partition(' ')[2].removeprefix('with ')}"
        case "stopped":
            return f"{name} stopped as asked {rest.partition(' ')[2]}"
        case "gave up":
            return f"{name} dies whenever it starts; its log says why, `make restart-{name}` tries again"
    return None
