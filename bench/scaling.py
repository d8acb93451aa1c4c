"""What more engines and more processors add.

With slow engines (8 requests at a time, 20 ms per token) their number decides on the throughput. With instant ones the
machine's cores do: then requests per CPU second tell what a role could do with more of them.
"""

import json
import re
import statistics
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace

from bench.measures import Measures
from bench.peers import OursScaled, Setting
from bench.plan import Case, Measuring
from bench.processes import Child, wait_until

_STOP_S = 20.0
_SLOW_STEP_MS, _SLOW_ARGS = "20", ("--max-running-requests", "8")
ROLES = ("frontend", "processor", "engine")


@dataclass(frozen=True)
class Size:
    num_engines: int
    num_processors: int
    is_slow: bool

    @property
    def case(self) -> Case:
        """Enough requests at once that no engine is ever without work."""
        return Case(64, False, 4 if self.is_slow else 20, 32 if self.is_slow else 128)


# In the order in which one is made of the other, by starting more or by stopping some.
STEPS = ((1, 1), (2, 1), (4, 1), (4, 2), (2, 2), (1, 2))


class Fleet(OursScaled):
    """Our scripts in some number, behind one frontend."""

    title = "some engines, some processors, one frontend"
    num_processors, num_frontends = 1, 1

    def __init__(self, setting: Setting, *, is_slow: bool) -> None:
        self.name = "slow" if is_slow else "instant"  # type: ignore[misc]
        self.is_slow = is_slow
        self._num_started = 1
        super().__init__(replace(setting, engine_args=[*setting.engine_args, *(_SLOW_ARGS if is_slow else ())]))

    def env(self) -> dict[str, str]:
        return super().env() | ({"FAKE_STEP_MS": _SLOW_STEP_MS} if self.is_slow else {})

    def of(self, role: str) -> list[Child]:
        return [child for child in self.children if role_of(child.name) == role]

    def resize(self, size: Size, timeout_s: float) -> None:
        """Start what is missing and stop what is too much, the last first; until all of it is known to be there."""
        commands = {
            "engine": self.setting.engine_script("engine.py"),
            "processor": self.setting.script("processor.py", "--model", self.setting.model),
        }
        wanted = {"engine": size.num_engines, "processor": size.num_processors}
        for role, number in wanted.items():
            while len(self.of(role)) < number:
                self.child(f"{role}{self._num_started}", commands[role], **self.env())
                self._num_started += 1
            for child in self.of(role)[number:]:
                child.terminate()
                child.stop(_STOP_S)
                self.children.remove(child)

        def is_there() -> bool:
            for child in self.children:
                child.check()
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/ready", timeout=10) as response:
                there = json.load(response)
                return all(there[f"{role}s"] == number for role, number in wanted.items())
            return False

        wait_until(is_there, timeout_s, str(size))

    def num_answered(self, role: str) -> list[int]:
        """Requests that each process of a role has logged."""
        return [child.log_path.read_text(errors="replace").count(" prompt tokens, ") for child in self.of(role)]


def role_of(name: str) -> str:
    return re.split(r"[\d:]", name)[0]


@dataclass
class Figures:
    """requests_per_cpu_s: by role, all its processes together. evenness: the least asked process to the most asked."""

    requests_per_s: float
    requests_per_cpu_s: dict[str, float]
    evenness: dict[str, float]
    num_errors: int


def figures(measured: Measures, before: dict[str, list[int]], after: dict[str, list[int]]) -> Figures:
    cpu_ms = dict.fromkeys(ROLES, 0.0)
    for name, spent in measured.cpu_ms_per_request.items():
        if (role := role_of(name)) in cpu_ms:
            cpu_ms[role] += spent
    counts = {role: [late - early for early, late in zip(before[role], after[role], strict=True)] for role in before}
    return Figures(
        measured.requests_per_s,
        {role: 1000 / spent for role, spent in cpu_ms.items() if spent},
        {role: min(count) / max(count) for role, count in counts.items()},
        measured.num_errors,
    )


def measure_scaling(setting: Setting, executor: Executor, *, num_rounds: int, timeout_s: float) -> str:
    """A table. One fleet is up at a time, for the memory; it grows and shrinks."""
    done: dict[Size, list[Figures]] = {}
    for number in range(num_rounds):
        for is_slow in (True, False):
            fleet = Fleet(replace(setting, folder=setting.folder / f"round{number}"), is_slow=is_slow)
            try:
                fleet.bring_up(timeout_s)
                for num_engines, num_processors in STEPS:
                    size = Size(num_engines, num_processors, is_slow)
                    fleet.resize(size, timeout_s)
                    done.setdefault(size, []).append(measure(fleet, size, executor))
                    print(size, done[size][-1], flush=True)
            finally:
                fleet.stop()
    return markdown(done)


def measure(fleet: Fleet, size: Size, executor: Executor) -> Figures:
    before = {role: fleet.num_answered(role) for role in ("processor", "engine")}
    measured = Measuring([fleet], executor, lambda _: None).measure(fleet, size.case)
    return figures(measured, before, {role: fleet.num_answered(role) for role in before})


def markdown(done: dict[Size, list[Figures]]) -> str:
    """The medians of the rounds; ratios are to one engine and one processor."""
    rows = [
        "| engines | processors | requests/s | ratio | requests per CPU second: frontend | processors | engines "
        "| least to most asked engine | processor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base: dict[bool, float] = {}
    for size, rounds in sorted(
        done.items(), key=lambda item: (not item[0].is_slow, item[0].num_processors, item[0].num_engines)
    ):
        speed = median([each.requests_per_s for each in rounds])
        base.setdefault(size.is_slow, speed)
        per_cpu_s = [f"{median([each.requests_per_cpu_s[role] for each in rounds]):,.0f}" for role in ROLES]
        even = [f"{median([each.evenness[role] for each in rounds]):.2f}" for role in ("engine", "processor")]
        engines = f"{size.num_engines} {'slow' if size.is_slow else 'instant'}"
        columns = [engines, str(size.num_processors), f"{speed:.1f}", f"{speed / base[size.is_slow]:.2f}"]
        rows.append("| " + " | ".join([*columns, *per_cpu_s, *even]) + " |")
    num_errors = sum(each.num_errors for rounds in done.values() for each in rounds)
    return "\n".join(rows) + f"\n\nFailed requests: {num_errors}.\n"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
