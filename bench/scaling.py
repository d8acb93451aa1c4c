"""What more engines and more processors add.

With slow engines (8 requests at a time, 20 ms a token) their number decides on the throughput. With instant ones the
machine's cores do: then requests per CPU second tell what a role could do with more of them.
"""

import json
import re
import statistics
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from bench.measures import Measures
from bench.peers import OursScaled, Setting
from bench.plan import Case, Measuring
from bench.processes import Child

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

    def __str__(self) -> str:
        speed = "slow" if self.is_slow else "instant"
        return f"{self.num_engines} {speed} engines, {self.num_processors} processors"


SIZES = [
    *(Size(num_engines, num_processors, True) for num_processors in (1, 2) for num_engines in (1, 2, 4)),
    *(Size(num_engines, num_processors, False) for num_processors in (1, 2) for num_engines in (1, 2, 4)),
]


class Fleet(OursScaled):
    """Our scripts in some number. It is ready when all of them are."""

    title = "some engines, some processors, one frontend"
    num_frontends = 1

    def __init__(self, setting: Setting, size: Size) -> None:
        self.name = str(size).replace(" ", "-").replace(",", "")  # type: ignore[misc]
        self.size = size
        engine_args = [*setting.engine_args, *(_SLOW_ARGS if size.is_slow else ())]
        super().__init__(replace(setting, engine_args=engine_args))
        self.num_processors = size.num_processors

    def env(self) -> dict[str, str]:
        return super().env() | ({"FAKE_STEP_MS": _SLOW_STEP_MS} if self.size.is_slow else {})

    def start_scripts(self) -> None:
        super().start_scripts()
        for number in range(1, self.size.num_engines):
            self.child(f"engine{number}", self.setting.engine_script("engine.py"), **self.env())

    def is_ready(self) -> bool:
        if not super().is_ready():
            return False
        with urllib.request.urlopen(f"{self.url}/ready", timeout=10) as response:
            there = json.load(response)
        return there["engines"] == self.size.num_engines and there["processors"] == self.size.num_processors

    def num_answered(self, role: str) -> list[int]:
        """Requests that each process of a role has logged."""

        def count(child: Child) -> int:
            return child.log_path.read_text(errors="replace").count(" prompt tokens, ")

        return [count(child) for child in self.children if role_of(child.name) == role]


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
    """A table. One size is up at a time, for the memory; the sizes take turns, round after round."""
    done: dict[Size, list[Figures]] = {size: [] for size in SIZES}
    for number in range(num_rounds):
        for size in SIZES:
            fleet = Fleet(replace(setting, folder=setting.folder / f"round{number}"), size)
            fleet.bring_up(timeout_s)
            try:
                measuring = Measuring([fleet], executor, lambda _: None)
                before = {role: fleet.num_answered(role) for role in ("processor", "engine")}
                measured = measuring.measure(fleet, size.case)
                after = {role: fleet.num_answered(role) for role in before}
            finally:
                fleet.stop()
            done[size].append(figures(measured, before, after))
            print(size, done[size][-1], flush=True)
    return markdown(done)


def markdown(done: dict[Size, list[Figures]]) -> str:
    """The medians of the rounds; ratios are to one engine and one processor."""
    rows = [
        "| engines | processors | requests/s | ratio | requests per CPU second: frontend | processors | engines "
        "| least to most asked engine | processor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base: dict[bool, float] = {}
    for size, rounds in done.items():
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
