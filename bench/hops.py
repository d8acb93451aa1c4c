"""Every millisecond between a client and SGLang: one streamed request at a time on one connection."""

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import pairwise

from bench.http_client import Reply
from bench.load import Load, run_load
from bench.peers import Ours, Setting

# In the order in which a request passes them, until its first event.
POINTS = (
    "client sends",
    "frontend has the headers",
    "frontend has checked the request",
    "frontend calls a processor",
    "processor has the request",
    "processor has token ids",
    "processor calls an engine",
    "engine has the request",
    "engine calls SGLang",
    "engine has a token",
    "processor has a token",
    "processor has text",
    "frontend has text",
    "frontend has an event",
    "client has text",
)
_STOP_S = 15.0


class Watched(Ours):
    """Ours, with each script noting when a request passes it."""

    name, title = "hops", "frontend.py, processor.py, engine.py, watched"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.notes = [self.folder / f"{script}.times" for script in ("engine", "processor", "frontend")]

    def start_scripts(self) -> None:
        env = self.env()
        commands = (
            self.setting.engine_script("engine.py"),
            self.setting.script("processor.py", "--model", self.setting.model),
            self.setting.script("frontend.py", "--port", str(self.port)),
        )
        for notes, (python, *command) in zip(self.notes, commands, strict=True):
            self.child(notes.stem, [python, "-m", "bench.hop_times", str(notes), *command], **env)

    def stop(self) -> None:
        for child in reversed(self.children[2:]):  # the servers last: a graceful stop writes the notes
            child.terminate()
            child.stop(_STOP_S)
        super().stop()

    def read_notes(self) -> list[tuple[float, str]]:
        lines = (line for path in self.notes for line in path.read_text().splitlines())
        return sorted((float(at), point) for at, _, point in (line.partition(" ") for line in lines))


def hops(replies: Sequence[Reply], notes: Sequence[tuple[float, str]]) -> list[tuple[str, float, float]]:
    """For each point but the first: its name, and the median and 90th percentile of the milliseconds since the one
    before it."""
    steps: dict[str, list[float]] = {point: [] for point in POINTS[1:]}
    for reply in replies:
        passed = {"client sends": reply.sent_at}
        for at, point in notes:
            if reply.sent_at < at < reply.first_content_at:
                passed.setdefault(point, at)
        passed["client has text"] = reply.first_content_at
        missing = [point for point in POINTS if point not in passed]
        if missing:
            raise ValueError(f"a request was not seen at: {', '.join(missing)}")
        for earlier, later in pairwise(POINTS):
            steps[later].append((passed[later] - passed[earlier]) * 1000)
    return [(point, statistics.median(times), sorted(times)[int(len(times) * 0.9)]) for point, times in steps.items()]


def measure_hops(setting: Setting, executor: Executor, *, num_requests: int, timeout_s: float) -> str:
    """The table."""
    watched = Watched(setting)
    watched.bring_up(timeout_s)
    try:
        load = Load(watched.url, setting.model, requests_per_user=num_requests, is_stream=True, max_tokens=8)
        run_load(replace(load, requests_per_user=20, first_prompt=10**6), executor, 1)  # warms it up
        outcome = run_load(load, executor, 1)
    finally:
        watched.stop()
    errors = [reply.error for reply in outcome.replies if reply.error]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first one with: {errors[0]}")
    found = hops(outcome.replies, watched.read_notes())
    (setting.folder.parent / "hops.json").write_text(json.dumps(found, indent=1))
    total = statistics.median((reply.first_content_at - reply.sent_at) * 1000 for reply in outcome.replies)
    rows = [f"| {point} | {median:.2f} | {ninth:.2f} |" for point, median, ninth in found]
    return "\n".join(
        ["| until | ms, median | ms, 90th percentile |", "|---|---|---|", *rows, f"| TTFT | {total:.2f} | |", ""]
    )
