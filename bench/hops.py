"""Every millisecond between a client and SGLang: one streamed request at a time on one connection.

`python -m bench.hops FILE SCRIPT [ARGUMENTS]` runs a script and notes when a request passes certain points of it. With
one request at a time no note needs to say whose it is: FILE gets lines of `time point` (seconds of `perf_counter`,
which all processes of a machine share) when the script ends.
"""

import atexit
import importlib
import inspect
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.client import Load, Reply, run_load
from bench.peers import Ours, Setting

# In the order in which a request passes them, until its first event; the first word is the script. What is called, and
# whether that is the point, or its return.
WATCHED = (
    ("frontend has the headers", "common.http.middleware", "RequestId.__call__", True),
    ("frontend has checked the request", "common.http.chat", "parse_chat_request", False),
    ("frontend calls a processor", "common.dynamo.runtime", "Client.direct", True),
    ("processor has the request", "common.observability.request_records", "RequestRecord.asks", True),
    ("processor has token ids", "common.text.chat_tokenizer", "ChatTokenizer.encode_chat", False),
    ("processor calls an engine", "common.dynamo.runtime", "Client.direct", True),
    ("engine has the request", "common.observability.request_records", "RequestRecord.asks", True),
    ("engine calls SGLang", "common.sglang.engine", "sglang_sampling_params", False),
    ("engine has a token", "common.observability.request_records", "RequestRecord.answers", True),
    ("processor has a token", "common.text.choice", "Choice.push", True),
    ("processor has text", "common.text.generated_text", "GeneratedText.push", False),
    ("frontend has text", "common.http.chat", "AnswerStream.check", True),
    ("frontend has an event", "common.http.chat", "AnswerStream.events", False),
)
POINTS = ("client sends", *(point for point, *_ in WATCHED), "client has text")
_STOP_S = 15.0


class Watched(Ours):
    name, title = "hops", f"{Ours.title}, watched"

    def command(self, name: str, command: list[str]) -> list[str]:
        python, *rest = command
        return [python, "-m", "bench.hops", str(self.folder / f"{name}.times"), *rest]

    def stop(self) -> None:
        for child in reversed(self.children[2:]):  # the servers last: a graceful stop writes the notes
            child.terminate()
            child.stop(_STOP_S)
        super().stop()

    def read_notes(self) -> list[tuple[float, str]]:
        lines = (line for path in self.folder.glob("*.times") for line in path.read_text().splitlines())
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
        if missing := [point for point in POINTS if point not in passed]:
            raise ValueError(f"a request was not seen at: {', '.join(missing)}")
        for earlier, later in pairwise(POINTS):
            steps[later].append((passed[later] - passed[earlier]) * 1000)
    return [(point, statistics.median(times), sorted(times)[int(len(times) * 0.9)]) for point, times in steps.items()]


def measure_hops(setting: Setting, *, num_requests: int, timeout_s: float) -> str:
    """The table."""
    watched = Watched(setting)
    watched.bring_up(timeout_s)
    try:
        load = Load(requests_per_user=num_requests, is_stream=True, max_tokens=8)
        run_load(watched.url, setting.model, replace(load, requests_per_user=20, first_prompt=10**6))  # warms it up
        replies = run_load(watched.url, setting.model, load).replies
    finally:
        watched.stop()
    if errors := [reply.error for reply in replies if reply.error]:
        raise RuntimeError(f"{len(errors)} requests failed, the first one with: {errors[0]}")
    rows = [f"| {point} | {median:.2f} | {ninth:.2f} |" for point, median, ninth in hops(replies, watched.read_notes())]
    total = statistics.median((reply.first_content_at - reply.sent_at) * 1000 for reply in replies)
    return "\n".join(
        ["| until | ms, median | ms, 90th percentile |", "|---|---|---|", *rows, f"| TTFT | {total:.2f} | |", ""]
    )


def _watch(module: str, name: str, note: Callable[[], None], *, is_call: bool) -> None:
    """Replace what is called `name` by one that notes when it is called, or when it returns."""
    *owner, name = name.split(".")
    holder: Any = importlib.import_module(module)
    for each in owner:
        holder = getattr(holder, each)
    original: Callable[..., Any] = getattr(holder, name)

    def noted_call(*args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    def noted_return(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        note()
        return result

    async def noted_end(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs)
        note()
        return result

    noted = noted_call if is_call else noted_end if inspect.iscoroutinefunction(original) else noted_return
    setattr(holder, name, noted)


def _run_watched(path: Path, command: list[str]) -> None:
    notes: list[str] = []
    script = next(Path(word).stem for word in command if word.endswith(".py"))

    def note(point: str) -> None:
        notes.append(f"{time.perf_counter()!r} {point}\n")

    for point, module, name, is_call in WATCHED:
        if point.startswith(script):
            _watch(module, name, partial(note, point), is_call=is_call)
    importlib.import_module("common.dynamo.runtime")  # its exit handler ends the process: ours comes before it
    atexit.register(lambda: path.write_text("".join(notes)))
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    _run_watched(Path(sys.argv[1]), sys.argv[2:])
