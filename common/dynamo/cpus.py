"""Which CPUs a process runs on, where its operator says so.

The event loop and Dynamo's threads take turns with the interpreter lock, several times for every dict. Where they have
several CPUs, each turn wakes another one up; on one CPU the same work takes half of the CPU time (docs/performance.md),
and no longer, because the lock lets only one of them run anyway.
"""

import os
import re
import sys
from contextlib import suppress

VARIABLE = "DYN_CHAT_CPUS"
_RANGE = re.compile(r"\s*(\d+)(?:-(\d+))?\s*")


def chosen_cpus() -> set[int]:
    """The CPUs in DYN_CHAT_CPUS, such as `3`, `2-3` or `0,4-5`; none where it is not set.

    Exits with an error where it says anything else, or names a CPU that this process may not use.
    """
    text = os.environ.get(VARIABLE, "")
    if not text.strip():
        return set()
    matches = [_RANGE.fullmatch(part) for part in text.split(",")]
    if None in matches:
        sys.exit(f"error: {VARIABLE}={text}: expected numbers of CPUs, such as 3, 2-3 or 0,4-5.")
    cpus = {cpu for match in matches if match for cpu in range(int(match[1]), int(match[2] or match[1]) + 1)}
    allowed = os.sched_getaffinity(0)
    if not cpus or not cpus <= allowed:
        sys.exit(f"error: {VARIABLE}={text}: this process may use {','.join(map(str, sorted(allowed)))}.")
    return cpus


def stay_on(cpus: set[int]) -> None:
    """Keep all threads of this process, and those they will start, to these CPUs. Child processes stay where they are.

    So call it when SGLang's processes have been started: they need the other CPUs.
    """
    for thread_id in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread_id), cpus)
