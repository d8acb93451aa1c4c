"""The path of one request through the pipeline, for those who ask to see it.

Each process tells of itself: when its first and its last dict left, and whom it called meanwhile. All times count
from the moment at which that process received the request, by its own clock: no two clocks are ever compared. The
caller knows which instance it called, so nobody needs to know its own name. The time of a call that the worker does
not account for was spent between the two processes.

It is off unless asked for: HTTP clients ask with a header, and every call then passes the question on.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from common.wire import CallTrace, EngineChunk, HopTrace, ProcessorChunk

HEADER = "x-show-path"


class RequestPath:
    """What one process notes about one request. Begin it when the request arrives."""

    def __init__(self) -> None:
        self._received_ns = time.monotonic_ns()
        self.trace = HopTrace()

    def _now_us(self) -> int:
        return (time.monotonic_ns() - self._received_ns) // 1000

    def calling(self, instance_id: int) -> "CallNotes":
        call = CallTrace(instance=f"{instance_id:x}", called_us=self._now_us())
        self.trace.calls.append(call)
        return CallNotes(call, self._now_us)

    def answering(self) -> None:
        """Note that something leaves this process."""
        self.trace.last_us = self._now_us()
        if self.trace.first_us is None:
            self.trace.first_us = self.trace.last_us

    def to_json(self) -> dict[str, Any]:
        """The whole path, as a frontend tells it to its client. `pid`: a frontend is in no registry, and has no id."""
        self.answering()
        return {"pid": os.getpid(), **msgspec.to_builtins(self.trace)}


class CallNotes:
    """What a caller notes about one call."""

    def __init__(self, call: CallTrace, now_us: Callable[[], int]) -> None:
        self._call, self._now_us = call, now_us

    def received(self, chunk: ProcessorChunk | EngineChunk) -> None:
        self._call.last_us = self._now_us()
        if self._call.first_us is None:
            self._call.first_us = self._call.last_us
        self._call.stage = chunk.path or self._call.stage

    def broke(self) -> None:
        self._call.last_us = self._now_us()
        self._call.is_broken = True
