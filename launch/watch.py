"""What a launch shows once it is up: the programs' own lines, and which of them died or came back."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launch.logs import LogTail
from launch.supervisor import Supervisor

POLL_S = 0.5
ROUTINE = ("Prefill batch", "Decode batch")
"""SGLang's lines about each batch stay in its log."""


def watch(supervisor: Supervisor, shown: Sequence[str] = ()) -> None:
    """Print what is new until a KeyboardInterrupt ends it: lines of the programs in `shown`, deaths of any.

    Raises:
        SupervisorError: supervisord is gone.
    """
    tails = {name: LogTail(supervisor.log_file(name)) for name in shown}
    for tail in tails.values():
        tail.new_lines()
    supervisor.events()
    width = max((len(name) for name in shown), default=0)
    while True:
        for event in supervisor.events():
            if text := in_words(event):
                print(f"supervisor: {text}", flush=True)
        for name, tail in tails.items():
            for line in tail.new_lines():
                if not any(routine in line for routine in ROUTINE):
                    print(f"{name:{width}} | {line}", flush=True)
        supervisor.states()
        time.sleep(POLL_S)


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
