"""The way of one request through the pipeline, for those who ask to see it.

Each process tells of itself: when its first and its last dict left, and whom it called meanwhile. All times count
from the moment at which that process received the request, by its own clock: no two clocks are ever compared. The
caller knows which instance it called, so nobody needs to know its own name. What a call took longer than the worker
says it worked is the way between the two.

It is off unless asked for: HTTP clients ask with a header, and every call then passes the question on.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from common.wire import PATH, SHOW_PATH, Call, Stage, is_terminal, read_stage, to_wire

HEADER = "x-show-path"


class RequestPath:
    """What one process notes about one request. Begin it when the request arrives."""

    def __init__(self) -> None:
        self._received_ns = time.monotonic_ns()
        self._stage = Stage()

    @classmethod
    def asked_by_client(cls, headers: Mapping[str, str]) -> "RequestPath | None":
        """A path where the client wants one: `x-show-path: 1`."""
        return cls() if headers.get(HEADER) == "1" else None

    @classmethod
    def asked_by_caller(cls, request: dict[str, Any]) -> "RequestPath | None":
        """A path where the caller's dict wants one, which says so no longer."""
        return cls() if request.pop(SHOW_PATH, False) else None

    def _now_us(self) -> int:
        return (time.monotonic_ns() - self._received_ns) // 1000

    def calling(self, instance_id: int) -> "CallNotes":
        call = Call(instance=f"{instance_id:x}", called_us=self._now_us())
        self._stage.calls.append(call)
        return CallNotes(call, self._now_us)

    def answering(self) -> None:
        """Note that something leaves this process."""
        self._stage.last_us = self._now_us()
        if self._stage.first_us is None:
            self._stage.first_us = self._stage.last_us

    def to_wire(self) -> dict[str, Any]:
        """The stage as a worker tells it to its caller."""
        return to_wire(self._stage)

    def to_json(self) -> dict[str, Any]:
        """The whole way, as a frontend tells it to its client. `pid`: a frontend is in no registry, and has no id."""
        self.answering()
        return {"pid": os.getpid(), **msgspec.to_builtins(self._stage)}


class CallNotes:
    """What a caller notes about one call."""

    def __init__(self, call: Call, now_us: Callable[[], int]) -> None:
        self._call, self._now_us = call, now_us

    def received(self, data: Any) -> None:
        """Raises:
        BadUpstream: the worker tells nonsense about its work.
        """
        self._call.last_us = self._now_us()
        if self._call.first_us is None:
            self._call.first_us = self._call.last_us
        if is_terminal(data):
            self._call.stage = read_stage(data)

    def broke(self) -> None:
        self._call.last_us = self._now_us()
        self._call.is_broken = True


def with_path(data: dict[str, Any], path: RequestPath | None) -> dict[str, Any]:
    """What a worker sends, and with its last dicts the path, where one is asked for."""
    if path is None:
        return data
    path.answering()
    return {**data, PATH: path.to_wire()} if is_terminal(data) else data
